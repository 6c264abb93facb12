"""One Triton kernel compiled for a GPU that is not there, and what the compiler and the machine code say about it."""

from __future__ import annotations

import collections
import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gnswap.ops._triton import _launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """One launch that a case leads to."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_ctas: int


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as triton's just-in-time compiler would derive them from the arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = TRITON_TYPES[value.dtype]
            attributes[(index,)] = aligned
        elif parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialise):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and specialise:
                attributes[(index,)] = aligned
    return signature, constants, attributes


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel, compiled for `arch`."""
    signature, constants, attributes = specialised(launch)
    options = {"num_warps": launch.num_warps, "num_ctas": launch.num_ctas}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def machine_code(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and disassembly of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = _tool("nvdisasm", str(path))
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return numbers, listing


def half_arithmetic(ttir: str) -> list[str]:
    """Floating point operations that are done in fp16 or bf16, conversions aside."""
    found = re.findall(r"(arith\.(?:addf|subf|mulf|divf)|math\.\w+)[^\n]*:\s*(?:tensor<[\dx]*)?(b?f16)\b", ttir)
    return [f"{operation} in {dtype}" for operation, dtype in found]


def wide_loads(listing: str) -> dict[int, int]:
    """How many global loads of each width in bytes the machine code has."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = re.findall(r"\bLDG\.E((?:\.\w+)*)", listing)
    return dict(
        collections.Counter(next((widths[part] for part in suffix.split(".") if part in widths), 4) for suffix in found)
    )


@dataclass(frozen=True)
class Facts:
    """What the compiler made of one launch; `error` where it made nothing."""

    error: str = ""
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    loads: tuple[tuple[int, int], ...] = ()
    half: tuple[str, ...] = ()


def facts_of(launch: Launch, arch: int) -> Facts:
    """Compile one launch and read what came out."""
    try:
        kernel = compiled(launch, arch)
    except Exception as error:  # triton raises several types, and each is a kernel that a user would not get
        return Facts(f"does not compile: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")
    usage, listing = machine_code(kernel.asm["cubin"])
    return Facts(
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=len(re.findall(r"\b(?:STL|LDL)\b", listing)),
        shared=kernel.metadata.shared,
        loads=tuple(wide_loads(listing).items()),
        half=tuple(half_arithmetic(kernel.asm["ttir"])),
    )


def source_version() -> str:
    """Changes with the compiler, and with any source that it reads or that reads its output."""
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted([*Path(_launch.__file__).parent.glob("_kernels_*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
