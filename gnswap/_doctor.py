"""doctor: what runs on this machine, and why the rest does not.

Why a report and not a log: a slow fallback is not an error, so nobody is told of it until they ask.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata

import torch

from gnswap import _providers
from gnswap._errors import MissingDependencyError
from gnswap._record import Record
from gnswap.ops import _cpu_library
from gnswap.ops._backend import choose_backend

_PACKAGES = ("gnswap", "torch", "triton", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class Finding(Record):
    """One thing that a network may run on.

    Attributes:
        what: a device of torch, or an execution provider of onnxruntime.
        uses: what computes there; "-" where nothing does.
        because: the reason, in words.
    """

    what: str
    uses: str
    because: str


@dataclasses.dataclass(frozen=True)
class Doctor(Record):
    """What `gnswap doctor` found.

    Attributes:
        kernels: for each device of torch, the code that computes the norm in fp32.
        providers: for each execution provider, whether `gnswap validate` can use it.
        versions: of the packages that matter; only those that are installed.
    """

    kernels: tuple[Finding, ...]
    providers: tuple[Finding, ...]
    versions: dict[str, str]


def examine() -> Doctor:
    """Look at this machine; compiles the C++ kernels if no call has done it before.

    Example:
        >>> [finding.what for finding in examine().kernels]
        ['cpu', 'cuda']
    """
    return Doctor(
        kernels=tuple(_kernel(device) for device in ("cpu", "cuda")),
        providers=tuple(_provider(name) for name in _providers.PROVIDERS),
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
    )


def _kernel(device: str) -> Finding:
    backend = choose_backend(device, torch.float32)
    library = _cpu_library.library() if backend.name == "cpp" else None
    if isinstance(library, _cpu_library.Library):
        slow = f"; small calls are slow: {library.eager}" if isinstance(library.eager, str) else ""
        return Finding(device, "cpp", f"{library.isa}, compiled by {library.compiler}, {library.path}{slow}")
    return Finding(device, backend.name, backend.reason)


def _provider(name: str) -> Finding:
    try:
        runtime = _providers.require_onnxruntime()
        missing = _providers.missing_libraries(name)
    except MissingDependencyError as error:
        return Finding(name, "-", str(error))
    if _providers.PROVIDERS[name] not in runtime.get_available_providers():
        return Finding(name, "-", "not in this build of onnxruntime")
    if missing:
        return Finding(name, "-", f"missing: {', '.join(missing)}")
    return Finding(name, _providers.PROVIDERS[name], "its libraries are here; validate checks every node")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
