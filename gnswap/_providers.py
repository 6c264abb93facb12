"""Sessions of onnxruntime that run where they were asked to run, or fail.

Why this needs a file: onnxruntime answers a request for CUDA on a machine without it with a session on the CPU, a
line on stderr and no exception; `get_available_providers` lists what was compiled in, not what works; and single
nodes may still go to the CPU when the provider itself loads.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnswap._errors import ArgumentError, MissingDependencyError, ProviderError, ValidationError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_ADVICE = {
    "libcuda.so": "the NVIDIA driver (on the host; no pip package holds it)",
    "libnvinfer": "pip install tensorrt, its folder on LD_LIBRARY_PATH",
    "libnvonnxparser": "pip install tensorrt, its folder on LD_LIBRARY_PATH",
    "libcu": "pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "libnv": "pip install 'onnxruntime-gpu[cuda,cudnn]'",
}
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16
_REAL = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def open_session(
    path: str | os.PathLike[str],
    provider: str,
    *,
    threads: int | None = None,
    shared_cores: bool = False,
    provider_options: Mapping[str, str] | None = None,
    profile: Path | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` with every node on one provider.

    Args:
        path: the ONNX file.
        provider: "cpu", "cuda" or "tensorrt".
        threads: of the CPU inside one operator; None leaves it to onnxruntime.
        shared_cores: idle threads give their cores back between runs instead of waiting busily for the next.
        provider_options: of onnxruntime's provider, such as ``{"enable_cuda_graph": "1"}``. On CUDA TF32 is off where
            they do not say otherwise: it has three digits, too few to tell a rounding error from a mistake.
        profile: beginning of the name of the file that onnxruntime writes its profile to.

    Raises:
        ArgumentError: an unknown provider.
        MissingDependencyError: onnxruntime is not installed.
        ProviderError: the provider does not run here (names the missing libraries), or a node would run on
            another one (names the nodes).
        ValidationError: onnxruntime cannot read the file.
    """
    if provider not in PROVIDERS:
        raise ArgumentError("unknown provider", where="provider", expected=", ".join(PROVIDERS), found=repr(provider))
    if not Path(path).is_file():
        raise ArgumentError("no such file", where="path", found=str(path), fix="gnswap.export_onnx writes one.")
    runtime, wanted = require_onnxruntime(), PROVIDERS[provider]
    options = {"session.force_spinning_stop": "1"} if shared_cores else {}
    if provider != "cpu":
        # the CPU must not be listed as well: onnxruntime calls that a conflict
        options["session.disable_cpu_ep_fallback"] = "1"
    extra = {**({"use_tf32": "0"} if provider == "cuda" else {}), **(provider_options or {})}
    if wanted not in runtime.get_available_providers():
        raise ProviderError(
            f"this build of onnxruntime has no {wanted}",
            found=", ".join(runtime.get_available_providers()),
            fix="Run: pip uninstall onnxruntime, then pip install onnxruntime-gpu (the two exclude each other).",
        )
    noise: list[str] = []
    try:
        with _captured(noise):
            if provider != "cpu" and hasattr(runtime, "preload_dlls"):
                runtime.preload_dlls()  # finds CUDA and cuDNN in the nvidia-* packages that torch brings
            session = _construct(runtime, path, wanted, options, extra, threads, profile)
    except Exception as error:  # onnxruntime has a dozen exception classes, all direct children of Exception
        _diagnose(runtime, path, provider, error, noise)
    sys.stderr.write("".join(noise))  # a session came of it, so this is no diagnosis of ours
    if (placed := session.get_providers()[:1]) != [wanted]:
        raise _unavailable(provider, f"the session runs on {', '.join(placed)}", noise)
    require_placement(session.get_provider_graph_assignment_info(), wanted)
    return session


def require_placement(assignment: list[Any], wanted: str) -> None:
    """Refuse a session of which a node runs on another provider than the one asked for.

    Args:
        assignment: what `InferenceSession.get_provider_graph_assignment_info` returned.
        wanted: onnxruntime's name of the provider.

    Raises:
        ProviderError: names up to ten of the nodes; or the assignment is empty, which proves nothing.
    """
    strays = [
        f"{node.name} ({node.op_type}) on {part.ep_name}"
        for part in assignment
        if part.ep_name != wanted
        for node in part.get_nodes()
    ]
    if strays:
        more = f" and {len(strays) - 10} more" if len(strays) > 10 else ""
        raise ProviderError(
            f"{len(strays)} nodes would not run on {wanted}",
            found=", ".join(strays[:10]) + more,
            fix="A result from a mixture of devices says nothing about the provider; export with fixed sizes "
            "(dynamic_size=False), or validate on provider='cpu'.",
        )
    if not any(part.get_nodes() for part in assignment):
        raise ProviderError(
            "onnxruntime did not say where the nodes run", expected=wanted, fix="Use onnxruntime 1.22 or newer."
        )


def require_onnxruntime() -> Any:
    """The `onnxruntime` module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError(
            "validating needs onnxruntime", found=str(error), fix="Run: pip install 'gnswap[onnx]'"
        ) from error


def missing_libraries(provider: str) -> tuple[str, ...]:
    """Shared libraries that onnxruntime's provider needs and this process cannot load (Linux; elsewhere empty)."""
    runtime, linker = require_onnxruntime(), shutil.which("ldd")
    # TensorRT's provider hands single nodes to CUDA's, so it needs both
    names = {"cpu": (), "cuda": ("cuda",), "tensorrt": ("cuda", "tensorrt")}[provider]
    missing: dict[str, None] = {}
    for name in names:
        library = Path(runtime.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
        if linker is None or not library.exists():
            continue
        listing = subprocess.run([linker, str(library)], capture_output=True, text=True, check=False).stdout
        missing |= dict.fromkeys(re.findall(r"^\s*(\S+) => not found", listing, re.MULTILINE))
    return tuple(name for name in missing if not _loads(name))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _construct(
    runtime: Any,
    path: Any,
    wanted: str,
    options: Mapping[str, str],
    provider_options: Mapping[str, str],
    threads: int | None = None,
    profile: Path | None = None,
) -> Any:
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3
    if threads is not None:
        settings.intra_op_num_threads = threads
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    for key, value in {**options, "session.record_ep_graph_assignment_info": "1"}.items():
        settings.add_session_config_entry(key, value)
    return runtime.InferenceSession(os.fspath(path), settings, providers=[(wanted, dict(provider_options))])


def _diagnose(runtime: Any, path: Any, provider: str, error: Exception, noise: list[str]) -> None:
    """Say why a strict session could not be made; always raises."""
    reason = " ".join(str(error).split())[:400]
    if provider == "cpu":
        no_kernel = "NOT_IMPLEMENTED" in reason
        raise ValidationError(
            "onnxruntime cannot run the file",
            where=str(path),
            found=reason,
            fix="The CPU has no kernel for this operator in this precision, as for convolutions in bf16: export in "
            "fp32 or fp16, or ask for provider='cuda'."
            if no_kernel
            else "It is cut off, or no ONNX file: export it again."
            if "INVALID_PROTOBUF" in reason
            else None,
        ) from error
    try:
        # without the flag the session comes into being somewhere, and tells which nodes went where
        with _captured(noise):
            loose = _construct(runtime, path, PROVIDERS[provider], {}, {})
    except Exception:  # as above
        raise _unavailable(provider, reason, noise) from error
    if loose.get_providers()[:1] == [PROVIDERS[provider]]:
        require_placement(loose.get_provider_graph_assignment_info(), PROVIDERS[provider])
    raise _unavailable(provider, reason, noise) from error


def _unavailable(provider: str, reason: str, noise: list[str]) -> ProviderError:
    said = re.findall(r"with error: (\S+?): cannot open", "".join(noise))
    missing = tuple(dict.fromkeys((*missing_libraries(provider), *(name for name in said if not _loads(name)))))
    advice = dict.fromkeys(
        next((text for prefix, text in _ADVICE.items() if name.startswith(prefix)), f"the package with {name}")
        for name in missing
    )
    return ProviderError(
        f"provider {provider!r} does not run on this machine",
        expected=f"every node on {PROVIDERS[provider]}",
        found=f"missing libraries: {', '.join(missing)}" if missing else reason,
        fix=f"Needed: {'; '.join(advice)}. Or ask for provider='cpu'." if advice else "Or ask for provider='cpu'.",
    )


@contextlib.contextmanager
def _captured(noise: list[str]) -> Iterator[None]:
    """Collect what C++ and Python print meanwhile; onnxruntime reports the cause of a failure in no other way."""
    with tempfile.TemporaryFile() as file:
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, _ in saved:
                os.dup2(file.fileno(), number)
            with os.fdopen(os.dup(1), "w") as text, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield
        finally:
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            noise.append(file.read().decode(errors="replace"))


def as_cases(inputs: Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """Inputs as a list of cases, each the tuple of a model's positional inputs.

    A tensor is one case of one input, a tuple of tensors one case of several, anything else several cases.

    Raises:
        ArgumentError: nothing in it, no tensors in it, or an empty tensor.
    """
    cases: list[tuple[Tensor, ...]]
    if isinstance(inputs, Tensor):
        cases = [(inputs,)]
    elif isinstance(inputs, tuple) and all(isinstance(value, Tensor) for value in inputs):
        cases = [inputs] if inputs else []
    else:
        cases = [(case,) if isinstance(case, Tensor) else tuple(case) for case in inputs]
    if not cases:
        raise ArgumentError("no inputs", where="inputs", expected="at least one batch")
    for case in cases:
        if not case or not all(isinstance(value, Tensor) and value.numel() for value in case):
            raise ArgumentError(
                "not a batch of inputs",
                where="inputs",
                expected="tensors with at least one element",
                found=", ".join(f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}" for value in case)
                or "an empty tuple",
            )
    return cases


def fitted(session: Any, case: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One case as a file takes it: fp32, fp16 and bf16 become whichever of these the file declares.

    Raises:
        ArgumentError: another number of inputs, another shape where an axis is fixed, or another dtype.
    """
    declared = session.get_inputs()
    if len(case) != len(declared):
        raise ArgumentError(
            "wrong number of inputs",
            where="inputs",
            expected=f"{len(declared)} ({', '.join(one.name for one in declared)})",
            found=str(len(case)),
            fix="Several inputs of one batch go into one tuple.",
        )
    return tuple(_fitted(one, value) for one, value in zip(declared, case, strict=True))


def _fitted(declared: Any, value: Tensor) -> Tensor:
    fits = len(declared.shape) == value.dim() and all(
        isinstance(size, str) or size == given for size, given in zip(declared.shape, value.shape, strict=True)
    )
    if not fits:
        raise ArgumentError(
            "the file does not take this shape",
            where=declared.name,
            expected="x".join(map(str, declared.shape)),
            found="x".join(map(str, value.shape)),
        )
    wanted = _DTYPES.get(declared.type)
    if value.dtype in _REAL and wanted in _REAL:
        return value.to(wanted)
    if wanted != value.dtype:
        raise ArgumentError(
            "the file does not take this dtype", where=declared.name, expected=declared.type, found=str(value.dtype)
        )
    return value


def run(session: Any, case: tuple[Tensor, ...]) -> list[Tensor]:
    """The session's outputs for one fitted case, on the CPU.

    Raises:
        ValidationError: onnxruntime fails while it runs.
    """
    feed = {one.name: ort_value(value) for one, value in zip(session.get_inputs(), case, strict=True)}
    try:
        return [as_tensor(value) for value in session.run_with_ort_values(None, feed)]
    except Exception as error:  # direct children of Exception, see open_session
        raise ValidationError(
            "onnxruntime fails on an input that the file declares possible",
            where=", ".join("x".join(map(str, value.shape)) for value in case),
            found=" ".join(str(error).split())[:400],
        ) from error


def ort_value(value: Tensor, device: str = "cpu") -> Any:
    """A tensor as an `onnxruntime.OrtValue` on "cpu" or "cuda". bf16, which numpy does not know, goes as its bits."""
    kind, value = require_onnxruntime().OrtValue, value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        if device != "cpu":
            raise ArgumentError("bf16 inputs cannot be put on this device", expected="cpu", found=device)
        return kind.ortvalue_from_numpy_with_onnx_type(value.view(torch.uint16).numpy(), _ONNX_BFLOAT16)
    return kind.ortvalue_from_numpy(value.numpy(), device, 0)


def as_tensor(value: Any) -> Tensor:
    """An `onnxruntime.OrtValue` as a tensor on the CPU."""
    if value.data_type() == "tensor(bfloat16)" and value.device_name() == "cpu":
        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(np.asarray(value.numpy()))


def versions(provider: str) -> dict[str, str]:
    """Versions of torch and onnxruntime and, away from the CPU, of CUDA and the device's name."""
    found = {"torch": str(torch.__version__), "onnxruntime": str(require_onnxruntime().__version__)}
    if provider != "cpu" and torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "device": torch.cuda.get_device_name(0)}
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    if provider == "tensorrt" and importlib.util.find_spec("tensorrt") is not None:
        found["tensorrt"] = importlib.metadata.version("tensorrt")
    return found
