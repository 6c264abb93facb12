"""Compile every Triton kernel for sm_80 and sm_90 without a GPU; refuse what spills, loads narrowly or adds in half.

    python examples/benchmarks/aot_gate.py            # the whole table, writes results/aot_gate.{md,json}
    python examples/benchmarks/aot_gate.py --quick    # a few kernels, writes nothing

What a GPU would tell later (bandwidth, launch time) is not known here. What the compiler tells is: registers, the
stack (a spill is a stack frame, or a local load or store in the machine code), shared memory, the width of every
global load, and whether any floating point operation is done in a half type. One wrong entry makes the exit code 1.

A full run takes half an hour on one core. What the compiler said is stored as it comes, so an interrupted run goes on
where it stopped, and only kernels whose source or sizes have changed are compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from _aot_compile import Facts, Launch, facts_of, source_version, specialised
from _report import RESULTS, Rows
from torch import Tensor

from gnswap.ops._triton import _launch
from gnswap.ops._triton._config import Machine

MACHINES = {80: Machine(108, 80), 90: Machine(132, 90)}  # A100, H100
REGISTERS_OF_AN_SM = 65536
MOST_REGISTERS, MOST_SHARED = 255, 48 * 1024
# What streams through a kernel: tensors with the elements of x
READS, WRITES = ("x", "dy", "residual"), ("y", "dx", "dresidual")


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


def check(case: Case, regime: str, launch: Launch, all_launches: list[Launch], facts: Facts | None = None) -> Row:
    """Hold one launch of a case to the rules; compile it unless `facts` are known already."""
    facts = facts or facts_of(launch, case.arch)
    constants, loads = launch.arguments, dict(facts.loads)
    streams = [name for name in READS if constants.get(name) is not None]
    sides = [value for name in ("BLOCK_S", "BLOCK_D", "BLOCK_C", "K", "LANES") if (value := constants.get(name))]
    elements = 1
    for side in sides:
        elements *= side
    threads = launch.num_warps * launch.num_ctas * 32

    faults = [facts.error] if facts.error else list(facts.half)
    if facts.stack or facts.spills:
        faults.append(f"spills: stack {facts.stack} bytes, {facts.spills} local accesses")
    if facts.registers > MOST_REGISTERS or facts.registers * launch.num_warps * 32 > REGISTERS_OF_AN_SM:
        faults.append(f"{facts.registers} registers for {launch.num_warps} warps")
    if facts.shared > MOST_SHARED:
        faults.append(f"{facts.shared} bytes of shared memory")
    width = 0
    if streams and not facts.error:
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
        registers=facts.registers,
        spills=facts.spills,
        shared=facts.shared,
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
# odd numbers of positions
LARGE += [(512, 30, 30, 32), (512, 45, 45, 32), (1024, 15, 15, 32), (256, 45, 45, 32)]
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


def gate(cases: Iterable[Case], progress: Any = None, stored: Rows | None = None) -> list[Row]:
    """Judge every distinct kernel of the cases, compiling those that are not `stored`."""
    rows: list[Row] = []
    seen: set[str] = set()
    for case in cases:
        regime, recorded = launches(case)
        for launch in recorded:
            sizes = f"{launch.kernel.__name__} {specialised(launch)} {launch.num_warps} {launch.num_ctas} {case.arch}"
            if sizes in seen:
                continue
            seen.add(sizes)
            facts, key = None, hashlib.sha256(sizes.encode()).hexdigest()[:16]
            if stored is not None:
                if key not in stored:
                    stored.add(key, {"facts": asdict(facts_of(launch, case.arch))})
                facts = Facts(**stored.rows[key]["facts"])
            rows.append(check(case, regime, launch, recorded, facts))
            if progress:
                progress(rows[-1])
    return rows


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with what made them."""
    faulty = [row for row in rows if row.faults]
    lines = [
        "# Ahead-of-time gate of the Triton kernels",
        "",
        f"`python examples/benchmarks/aot_gate.py`, {time.strftime('%Y-%m-%d')}, triton {triton.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, no GPU.",
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

    def progress(row: Row) -> None:
        print(
            f"{row.kernel:24} sm_{row.arch} {row.dtype:9} {row.case:34} {row.registers:4} {'; '.join(row.faults)}",
            flush=True,
        )

    stored = None if arguments.quick else Rows(RESULTS / "aot_gate.rows.jsonl", source_version())
    rows = gate(quick_cases() if arguments.quick else all_cases(), progress, stored)
    faulty = sum(bool(row.faults) for row in rows)
    if not arguments.quick:
        text = table(rows)
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
