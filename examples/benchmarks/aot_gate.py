"""Compile every Triton kernel for sm_80 and sm_90 without a GPU; refuse what spills, loads narrowly or adds in half.

    python examples/benchmarks/aot_gate.py            # the whole table, writes results/aot_gate.{md,json}
    python examples/benchmarks/aot_gate.py --quick    # a few kernels, writes nothing

What a GPU would tell later (bandwidth, launch time) is not known here. What the compiler tells is: registers, the
stack (a spill is a stack frame, or a local load or store in the machine code), shared memory, the width of every
global load, and whether any floating point operation is done in a half type. One wrong entry makes the exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gnswap.ops._triton import _launch
from gnswap.ops._triton._config import Machine

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MACHINES = {80: Machine(108, 80), 90: Machine(132, 90)}  # A100, H100
REGISTERS_OF_AN_SM = 65536
MOST_REGISTERS, MOST_SHARED = 255, 48 * 1024
# What streams through a kernel: tensors with the elements of x
READS, WRITES = ("x", "dy", "residual"), ("y", "dx", "dresidual")
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Case:
    """One call of the op, as sizes."""

    channels: int
    height: int
    width: int
    num_groups: int = 32
    dtype: torch.dtype = torch.float16
    channels_last: bool = False
    ordered: bool = False
    residual: bool = True
    act: str | None = "relu"
    backward: bool = False
    arch: int = 90

    def __str__(self) -> str:
        parts = [f"C{self.channels} {self.height}x{self.width} G{self.num_groups}", self.act or "no act"]
        parts += ["residual"] * self.residual + ["ordered"] * self.ordered
        return " ".join(parts)

    def aligned(self, regime: str) -> bool:
        """Whether the layout allows 16-byte loads: every row of consecutive elements starts at such a boundary."""
        d = self.channels // self.num_groups
        if self.channels_last:
            first = d * self.dtype.itemsize % 16 == 0 or regime == "channels_last_split" or d & (d - 1) == 0
            return first and self.channels * self.dtype.itemsize % 16 == 0
        row = self.height * self.width * (d if regime == "flat" else 1)
        return row * self.dtype.itemsize % 16 == 0


@dataclass(frozen=True)
class Launch:
    """One launch that a case leads to."""

    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_ctas: int


@dataclass(frozen=True)
class Row:
    """What the compiler made of one kernel, and what is wrong with it."""

    case: str
    regime: str
    kernel: str
    arch: int
    dtype: str
    block: str
    warps: int
    ctas: int
    registers: int
    spills: int
    shared: int
    bytes_per_load: int
    accesses: int
    floor: int
    faults: tuple[str, ...]


def launches(case: Case) -> tuple[str, list[Launch]]:
    """The regime of a case and its launches, recorded on tensors without data."""
    recorded: list[Launch] = []

    def record(kernel: Any, _: int, arguments: dict[str, Any], num_warps: int, num_ctas: int) -> None:
        recorded.append(Launch(kernel, arguments, num_warps, num_ctas))

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = meta(1, case.channels, case.height, case.width, dtype=case.dtype)
    if case.channels_last:
        x = x.to(memory_format=torch.channels_last)
    vector = meta(case.channels)
    order = meta(case.channels, dtype=torch.int64) if case.ordered else None
    channels = (x if case.residual else None, vector, vector, order)
    machine = MACHINES[case.arch]
    call = _launch.Call(x, case.num_groups, case.act, case.residual, case.ordered, case.backward, machine, None, record)
    if case.backward:
        statistics = meta(1, case.num_groups)
        mask = [True, True, True, case.residual, False, False]
        _launch.backward(
            x, x, statistics, statistics, case.num_groups, vector, vector, case.act, *channels, mask,
            machine=machine, run=record,
        )  # fmt: skip
    else:
        _launch.forward(x, case.num_groups, vector, vector, 1e-5, case.act, *channels, machine=machine, run=record)
    return call.config.regime, recorded


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


def _not_compiled(case: Case, regime: str, launch: Launch, error: Exception) -> Row:
    fault = f"does not compile: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    dtype = str(case.dtype).removeprefix("torch.")
    sizes = (launch.num_warps, launch.num_ctas, 0, 0, 0, 0, 0, 0)
    return Row(str(case), regime, launch.kernel.__name__, case.arch, dtype, "", *sizes, (fault,))


def check(case: Case, regime: str, launch: Launch, all_launches: list[Launch]) -> Row:
    """Compile one launch of a case and hold it to the rules."""
    try:
        kernel = compiled(launch, case.arch)
    except Exception as error:  # triton raises several types, and each is a kernel that a user would not get
        return _not_compiled(case, regime, launch, error)
    usage, listing = machine_code(kernel.asm["cubin"])
    constants = launch.arguments
    streams = [name for name in READS if constants.get(name) is not None]
    loads = wide_loads(listing)
    sides = [value for name in ("BLOCK_S", "BLOCK_D", "BLOCK_C", "K", "LANES") if (value := constants.get(name))]
    elements = 1
    for side in sides:
        elements *= side
    threads = launch.num_warps * launch.num_ctas * 32
    spills = len(re.findall(r"\b(?:STL|LDL)\b", listing))

    faults = half_arithmetic(kernel.asm["ttir"])
    if usage["STACK"] or spills:
        faults.append(f"spills: stack {usage['STACK']} bytes, {spills} local accesses")
    if usage["REG"] > MOST_REGISTERS or usage["REG"] * launch.num_warps * 32 > REGISTERS_OF_AN_SM:
        faults.append(f"{usage['REG']} registers for {launch.num_warps} warps")
    if kernel.metadata.shared > MOST_SHARED:
        faults.append(f"{kernel.metadata.shared} bytes of shared memory")
    width = 0
    if streams:
        # As many 16-byte loads as it takes to read a block of every stream, where a thread has 16 bytes of it. The
        # compiler drops those of channels that no group has.
        d, rows = constants.get("D", 1), constants.get("BLOCK_D", constants.get("LANES", 1))
        elements = elements * min(d, rows) // rows
        expected = elements * case.dtype.itemsize // (16 * threads) * len(streams)
        width = 16 if loads.get(16, 0) >= max(expected, 1) else max((w for w in loads if w < 16), default=0)
        if case.aligned(regime) and expected and width < 16:
            faults.append(f"loads narrower than they could be: {loads} for {expected} of 16 bytes")
    accesses = sum(one.arguments.get(name) is not None for one in all_launches for name in READS + WRITES)
    distinct = {n for one in all_launches for n in READS + WRITES if one.arguments.get(n) is not None}
    return Row(
        case=str(case),
        regime=regime,
        kernel=launch.kernel.__name__,
        arch=case.arch,
        dtype=str(case.dtype).removeprefix("torch."),
        block="x".join(map(str, sides)),
        warps=launch.num_warps,
        ctas=launch.num_ctas,
        registers=usage["REG"],
        spills=spills,
        shared=kernel.metadata.shared,
        bytes_per_load=width,
        accesses=accesses,
        floor=len(distinct),
        faults=tuple(faults),
    )


# (C, H, W, G): ResNet-50 at 224 px, EfficientNet-Lite0, a VAE's decoder, a detector's pyramid, a head
RESNET50 = [(64, 112, 112, 32), (64, 56, 56, 32), (256, 56, 56, 32), (128, 28, 28, 32), (512, 28, 28, 32)]
RESNET50 += [(256, 14, 14, 32), (1024, 14, 14, 32), (512, 7, 7, 32), (2048, 7, 7, 32)]
LITE0 = [(32, 112, 112, 8), (96, 56, 56, 8), (144, 28, 28, 12), (1152, 7, 7, 32)]
LARGE = [
    (512, 64, 64, 32),
    (256, 256, 256, 32),
    (256, 100, 152, 32),
    (512, 1, 1, 32),
    (2048, 7, 7, 1),
    (1024, 32, 32, 16),
]
# where registers are short
LARGEST_TILES = [(256, 56, 56, 32), (512, 28, 28, 32), (1024, 14, 14, 32), (2048, 7, 7, 32)]


def all_cases() -> Iterator[Case]:
    """The whole table."""
    for arch in MACHINES:
        for backward in (False, True):
            for channels_last in (False, True):
                where = {"arch": arch, "backward": backward, "channels_last": channels_last}
                for shape in RESNET50 + LITE0 + LARGE:
                    for dtype in (torch.float16, torch.float32):
                        yield Case(*shape, dtype=dtype, **where)
                for shape in LARGEST_TILES:
                    yield Case(*shape, dtype=torch.bfloat16, **where)
                    for dtype in (torch.float16, torch.float32):
                        yield Case(*shape, dtype=dtype, ordered=True, **where)
                        yield Case(*shape, dtype=dtype, residual=False, act=None, **where)
                        for act in ("silu", "gelu", "hardswish", "leaky_relu"):
                            yield Case(*shape, dtype=dtype, act=act, **where)


def quick_cases() -> list[Case]:
    """One case a regime and direction."""
    return [
        Case(512, 28, 28, backward=backward, **more)
        for backward in (False, True)
        for more in ({}, {"channels_last": True})
    ] + [Case(1024, 14, 14), Case(256, 100, 152, arch=80)]


def gate(cases: Iterable[Case], progress: Any = None) -> list[Row]:
    """Compile every distinct kernel of the cases."""
    rows: list[Row] = []
    seen: set[str] = set()
    for case in cases:
        regime, recorded = launches(case)
        for launch in recorded:
            key = f"{launch.kernel.__name__} {specialised(launch)} {launch.num_warps} {launch.num_ctas} {case.arch}"
            if key not in seen:
                seen.add(key)
                rows.append(check(case, regime, launch, recorded))
                if progress:
                    progress(rows[-1])
    return rows


def table(rows: list[Row], seconds: float) -> str:
    """The rows as Markdown, with what made them."""
    faulty = [row for row in rows if row.faults]
    lines = [
        "# Ahead-of-time gate of the Triton kernels",
        "",
        f"`python examples/benchmarks/aot_gate.py`, {time.strftime('%Y-%m-%d')}, triton {triton.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, no GPU, {seconds:.0f} s.",
        "",
        f"{len(rows)} kernels, {len(faulty)} with a fault. Registers are per thread; spills are local loads and stores",
        "in the machine code; bytes per load is the width of the loads that stream x, dy and residual; accesses are",
        "reads and writes of an element over all kernels of the call, floor is one of each tensor.",
        "",
        "| case | regime | kernel | arch | dtype | block | warps | CTAs | registers | spills | shared | bytes/load "
        "| accesses | floor | faults |",
        "|" + "---|" * 15,
    ]
    for row in rows:
        values = [*asdict(row).values()]
        lines.append("| " + " | ".join(map(str, values[:-1])) + f" | {'; '.join(row.faults)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the gate and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case a regime; writes nothing")
    arguments = parser.parse_args()
    started = time.perf_counter()

    def progress(row: Row) -> None:
        print(
            f"{row.kernel:24} sm_{row.arch} {row.dtype:9} {row.case:34} {row.registers:4} {'; '.join(row.faults)}",
            flush=True,
        )

    rows = gate(quick_cases() if arguments.quick else all_cases(), progress)
    faulty = sum(bool(row.faults) for row in rows)
    if not arguments.quick:
        text = table(rows, time.perf_counter() - started)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "aot_gate.md").write_text(text)
        versions = {"triton": triton.__version__, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        (RESULTS / "aot_gate.json").write_text(
            json.dumps({**versions, "rows": [asdict(row) for row in rows]}, indent=1)
        )
    print(f"{len(rows)} kernels, {faulty} with a fault")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
