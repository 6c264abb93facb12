"""The C++ kernels as a library: compiled on first use, kept in the user's cache, loaded into torch.

Why compiled on the user's machine: the wheel stays pure Python, no torch is dragged into an isolated build, and one
set of sources serves every platform that has a compiler. The library uses torch's stable ABI only, so what was
compiled once serves every Python and every torch from 2.10 on. Why all instruction sets in one file, chosen when it
is loaded: a home directory may be shared by machines that differ.

A second, small library is the short way in for eager calls (csrc/eager.cpp). It alone is made for one version of torch
and Python, and whatever keeps it from being compiled costs speed only.

Nothing happens at import. Without a compiler everything works, on ATen, and one log line says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SOURCES = Path(__file__).parent / "csrc"
_TORCH = Path(torch.__file__).parent
_SHARED_FLAGS = ["-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
_FLAGS = [*_SHARED_FLAGS, "-std=c++17", "-ftree-vectorize", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# No -ffast-math anywhere: with it GCC before 13 links code that flushes subnormal numbers in the whole process.
_FMA = ["-mavx2", "-mfma", "-mf16c"]
_ISA_FLAGS = {
    "generic": [],
    "avx2": _FMA,
    "avx512": [*_FMA, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"],
}
_EAGER_FLAGS = [*_SHARED_FLAGS, "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
_EAGER_MODULE = "gnswap_eager"
_COMPILE_SECONDS = 600.0
_log = logging.getLogger("gnswap")


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        path: its file.
        isa: the instruction set it chose.
        compiler: what made it.
        eager: the module of csrc/eager.cpp, or why there is none.
    """

    path: Path
    isa: str
    compiler: str
    eager: Any | str


class _CannotBuildError(Exception):
    """Why there are no C++ kernels; never leaves this module."""


_lock = threading.Lock()
_state: Library | str | None = None  # a text: why there is none


def library() -> Library | str:
    """The C++ kernels, or why they cannot be had.

    The first call of a process loads them, and the first on a machine compiles them, which takes some ten seconds.
    Where they cannot be had, that call logs one warning. GNSWAP_CPU_KERNEL=off (or 0) turns them off;
    GNSWAP_CPU_ISA=generic, avx2 or avx512 chooses the instruction set; CXX names the compiler.
    """
    global _state
    if _state is None:
        with _lock:
            if _state is None:
                _state = _load()
    return _state


def loaded() -> Library | str | None:
    """What `library` found; None where nothing has asked yet. Loads nothing."""
    return _state


def _load() -> Library | str:
    switch = os.environ.get("GNSWAP_CPU_KERNEL")
    if switch in ("0", "off"):
        return f"GNSWAP_CPU_KERNEL={switch}"
    try:
        path = _built()
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        return _described(path)
    except (_CannotBuildError, OSError) as error:
        _log.warning("GroupNorm runs on ATen, not on the C++ kernels: %s", error)
        return str(error)


def _described(path: Path) -> Library:
    functions = ctypes.CDLL(str(path))
    functions.gnswap_cpu_isa.restype = functions.gnswap_cpu_compiler.restype = ctypes.c_char_p
    wanted = os.environ.get("GNSWAP_CPU_ISA")
    if wanted and not functions.gnswap_cpu_use_isa(wanted.encode()):
        raise _CannotBuildError(f"GNSWAP_CPU_ISA={wanted} is not an instruction set of this machine")
    isa, compiler = functions.gnswap_cpu_isa().decode(), functions.gnswap_cpu_compiler().decode()
    return Library(path, isa, compiler, _eager(functions))


def _eager(functions: ctypes.CDLL) -> Any | str:
    try:
        loader = importlib.machinery.ExtensionFileLoader(_EAGER_MODULE, str(_built_eager()))
        spec = importlib.util.spec_from_loader(_EAGER_MODULE, loader)
        assert spec is not None
        module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (_CannotBuildError, ImportError) as error:
        _log.info("small GroupNorm calls are slower than they could be: %s", error)
        return str(error)
    module.kernels = ctypes.cast(functions.gnswap_cpu_kernels, ctypes.c_void_p).value
    return module


def _built() -> Path:
    """The kernels' file in the cache, compiled if it is not there yet."""
    sources = [path for path in _SOURCES.iterdir() if path.name != "eager.cpp"]
    return _in_cache("gnswap_cpu", sources, (_FLAGS, _ISA_FLAGS), _compile)


def _built_eager() -> Path:
    """The same for the short way in, for this Python and this torch."""
    sources = [_SOURCES / name for name in ("eager.cpp", "tensors.h", "problem.h")]
    made_for = (_EAGER_FLAGS, torch.__version__, sysconfig.get_config_var("SOABI"))
    return _in_cache(_EAGER_MODULE, sources, made_for, _compile_eager)


def _in_cache(name: str, sources: list[Path], made_for: Any, compile_: Callable[[list[str], Path], Path]) -> Path:
    digest = hashlib.sha256(repr((made_for, platform.machine(), sys.platform)).encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnswap"
    except RuntimeError as error:  # a user of a container that is in no list of users
        raise _CannotBuildError(f"nowhere to keep them, set XDG_CACHE_HOME: {error}") from error
    path = directory / f"{name}-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    compiler = _compiler()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f"{path.stem}.lock"):
            if not path.exists():  # another process may have been first
                _log.info("compiling the C++ GroupNorm kernels with %s, once, into %s", compiler[0], path)
                with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as build:
                    made = compile_(compiler, Path(build))
                    with made.open("rb") as file:  # a crash of the machine must not leave half of it under its name
                        os.fsync(file.fileno())
                    made.replace(path)
    except OSError as error:
        raise _CannotBuildError(f"cannot write the cache directory {directory}: {error}") from error
    return path


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise _CannotBuildError(f"CXX is no command: {error}") from error
    for command in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    raise _CannotBuildError(
        f"CXX={named[0]} is not a program" if named else "no C++ compiler found; install g++ or set CXX"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock, where the system has them: without it processes compile side by side, and each renames."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], build: Path) -> Path:
    isas = list(_ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]
    jobs = [["op.cpp", "-I", str(_TORCH / "include")]]
    jobs += [["kernels.cpp", f"-DGNSWAP_ISA={isa}", *_ISA_FLAGS[isa]] for isa in isas]
    objects = [str(build / f"{index}.o") for index in range(len(jobs))]
    _run_all(
        [
            [*compiler, *_FLAGS, "-c", str(_SOURCES / job[0]), *job[1:], "-o", target]
            for job, target in zip(jobs, objects, strict=True)
        ]
    )
    return _linked(compiler, objects, build, "torch_cpu", "torch")


def _compile_eager(compiler: list[str], build: Path) -> Path:
    include = _TORCH / "include"
    directories = [include, include / "torch/csrc/api/include", sysconfig.get_paths()["include"]]
    places = [part for directory in directories for part in ("-I", str(directory))]
    target = str(build / "eager.o")
    _run_all([[*compiler, *_EAGER_FLAGS, *places, "-c", str(_SOURCES / "eager.cpp"), "-o", target]])
    return _linked(compiler, [target], build, "torch_python", "torch_cpu", "torch", "c10")


def _linked(compiler: list[str], objects: list[str], build: Path, *libraries: str) -> Path:
    result = build / "library.so"
    # the libraries of torch are in the process already and are found by name
    names = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [f"-l{name}" for name in libraries]
    _run_all([[*compiler, "-shared", *objects, "-L", str(_TORCH / "lib"), *names, "-o", str(result)]])
    return result


def _run_all(commands: list[list[str]]) -> None:
    """Run compiler commands side by side; the first that fails is the reason, and ends the others."""
    with contextlib.ExitStack() as stack:
        try:
            running = [
                stack.enter_context(
                    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                )
                for command in commands
            ]
        except OSError as error:
            raise _CannotBuildError(f"{commands[0][0]} cannot be run: {error}") from error
        try:
            for process in running:
                _, errors = process.communicate(timeout=_COMPILE_SECONDS)
                if process.returncode:
                    lines = errors.splitlines() or ["no output"]
                    reason = next((line for line in lines if "error" in line), lines[0])
                    raise _CannotBuildError(f"{commands[0][0]} failed with code {process.returncode}: {reason}")
        except subprocess.TimeoutExpired as error:
            raise _CannotBuildError(f"{commands[0][0]} did not finish in {_COMPILE_SECONDS:.0f} s") from error
        finally:
            for process in running:
                process.kill()
