"""Which code computes the norm: a pure function of what is known before any data is touched.

Why pure and not measured at run time: another kernel sums in another order, and the same input must give the same
bits every time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gnswap._record import Record
from gnswap.ops import _cpu_library

#: Dtypes the op takes.
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Backend(NamedTuple):
    """The chosen code and why, in words."""

    name: str
    reason: str


_CPP = Backend("cpp", "C++ kernels, compiled on this machine")


def choose_backend(device_type: str, dtype: torch.dtype) -> Backend:
    """Choose the code for tensors of one device type and dtype.

    Args:
        device_type: `tensor.device.type`.
        dtype: dtype of the input.

    Returns:
        `"triton"`: our kernels for CUDA, unless the environment has GNSWAP_CUDA_KERNEL=off; `"cpp"`: our kernels
        for the CPU, unless it has GNSWAP_CPU_KERNEL=off (the first call loads them, the first ever compiles them);
        `"aten"`: ATen's GroupNorm on a contiguous buffer, with the rest in place; `"reference"`: plain torch.

    Example:
        >>> choose_backend("mps", torch.float32).name
        'reference'
    """
    if device_type == "cuda" and dtype in DTYPES:
        obstacle = _no_triton(os.environ.get("GNSWAP_CUDA_KERNEL"))
        if dtype == torch.float64:
            obstacle = "the Triton kernels compute in fp32"
        return Backend("aten", obstacle) if obstacle else Backend("triton", f"Triton kernels for {dtype} on cuda")
    if device_type == "cpu" and dtype in DTYPES:
        kernels = _cpu_library.library()
        return Backend("aten", kernels) if isinstance(kernels, str) else _CPP
    return Backend("reference", f"no tested kernel for {dtype} on {device_type}; plain torch is always right")


@functools.cache
def _no_triton(switch: str | None) -> str | None:
    """Why the Triton kernels cannot run here, or None; kept, because asking the driver takes longer than a norm."""
    if switch == "off":
        return "GNSWAP_CUDA_KERNEL=off"
    if not torch.version.cuda:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the Triton kernels are checked from sm_80 on, and this is sm_{capability[0]}{capability[1]}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler for its launcher: install gcc, or set CC"
    return None


@dataclass(frozen=True)
class BackendReport(Record):
    """What computes the norm for one kind of tensor here, and why.

    Attributes:
        device: `"cpu"`, `"cuda"`, ...
        dtype: `"float32"`, ...
        name: `"cpp"`, `"triton"`, `"aten"` or `"reference"`, as in `choose_backend`.
        reason: why this one, in words; where it is not the fastest, what is missing.
        path: the compiled library, where the C++ kernels run.
        isa: the instruction set they chose: `"avx512"`, `"avx2"` or `"generic"`.
        compiler: what compiled them.
        autograd: `"c++"`, or why small calls are slower than they could be (csrc/eager.cpp could not be compiled).
    """

    device: str
    dtype: str
    name: str
    reason: str
    path: str | None = None
    isa: str | None = None
    compiler: str | None = None
    autograd: str | None = None


def backend_label(device_type: str, dtype: torch.dtype) -> str:
    """A few words for what computes the norm, at once: nothing is loaded or compiled to know.

    Args:
        device_type: `tensor.device.type`.
        dtype: dtype of the input.

    Example:
        >>> backend_label("mps", torch.float32)
        'reference'
    """
    if device_type != "cpu" or dtype not in DTYPES:
        return choose_backend(device_type, dtype).name
    kernels = _cpu_library.loaded()
    if kernels is None:
        return "cpp, not loaded yet"
    return "aten" if isinstance(kernels, str) else f"cpp {kernels.isa}"


def backend_report(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> BackendReport:
    """Say what computes the norm and why; loads (and the first time compiles) the C++ kernels to know.

    Args:
        device_type: `tensor.device.type`.
        dtype: dtype of the input.

    Example:
        >>> backend_report("mps").name
        'reference'
    """
    name, reason = choose_backend(device_type, dtype)
    report = {"device": device_type, "dtype": str(dtype).removeprefix("torch."), "name": name, "reason": reason}
    kernels = _cpu_library.library() if name == "cpp" else None
    if isinstance(kernels, _cpu_library.Library):
        report |= {"path": str(kernels.path), "isa": kernels.isa, "compiler": kernels.compiler}
        report["autograd"] = kernels.eager if isinstance(kernels.eager, str) else "c++"
    return BackendReport(**report)
