"""The ahead-of-time gate compiles our kernels for GPUs that are not there, and can say no."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is where torch for CUDA is")
sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import aot_gate  # noqa: E402
import triton.language as tl  # noqa: E402
from aot_gate import Case, Launch  # noqa: E402


@triton.jit
def adds_in_half(x, y, BLOCK_S: tl.constexpr):  # noqa: N803
    lane = tl.arange(0, BLOCK_S)
    tl.store(y + lane, tl.load(x + lane) + tl.load(x + lane))


@triton.jit
def spills(x, y, BLOCK_S: tl.constexpr):  # noqa: N803
    lane = tl.arange(0, BLOCK_S)
    value = tl.load(x + lane).to(tl.float32)
    tl.store(y + lane, (value / tl.sum(value)).to(tl.float16))


@triton.jit
def loads_one_by_one(x, y, BLOCK_S: tl.constexpr):  # noqa: N803
    lane = tl.arange(0, BLOCK_S)
    tl.store(y + lane, tl.load(x + lane * 3))


@triton.jit
def nonsense(x, y, BLOCK_S: tl.constexpr):  # noqa: N803
    tl.store(y + tl.arange(0, BLOCK_S), tl.load(x + tl.arange(0, 3)))


def judged(kernel: Any, block: int, case: Case | None = None) -> aot_gate.Row:
    case = case or Case(64, 64, 64, arch=80)
    x = torch.empty(block * 3, dtype=case.dtype, device="meta")
    launch = Launch(kernel, {"x": x, "y": x, "BLOCK_S": block}, num_warps=4, num_ctas=1)
    return aot_gate.check(case, "tile", launch, [launch])


def test_one_case_of_each_layout_passes() -> None:
    rows = aot_gate.gate(
        [Case(64, 16, 16, 16, backward=last, channels_last=last, arch=90 - 10 * last) for last in (0, 1)]
    )
    assert [row.kernel for row in rows] == ["tile_forward", "channels_last_backward", "sum_parts"]
    assert [row.faults for row in rows] == [(), (), ()]
    assert all(row.registers > 0 and row.spills == 0 for row in rows)
    assert rows[0].bytes_per_load == rows[1].bytes_per_load == 16
    assert (rows[0].accesses, rows[0].floor) == (3, 3)
    assert (rows[1].accesses, rows[1].floor) == (5, 5)


def test_arithmetic_in_half_is_refused() -> None:
    assert "arith.addf in f16" in judged(adds_in_half, 1024).faults


def test_a_spill_is_refused() -> None:
    row = judged(spills, 65536)
    assert row.spills > 0
    assert any(fault.startswith("spills: stack") for fault in row.faults)


def test_narrow_loads_are_refused() -> None:
    row = judged(loads_one_by_one, 1024)
    assert row.bytes_per_load == 2
    assert any(fault.startswith("loads narrower than they could be") for fault in row.faults)


def test_what_does_not_compile_is_refused() -> None:
    assert any(fault.startswith("does not compile: CompilationError") for fault in judged(nonsense, 1024).faults)


def test_unaligned_rows_may_load_narrowly() -> None:
    assert judged(loads_one_by_one, 1024, Case(64, 7, 7, arch=80)).faults == ()


def test_a_split_is_counted_over_both_passes() -> None:
    regime, recorded = aot_gate.launches(Case(256, 100, 152, residual=False, arch=80))
    assert regime == "split"
    assert [launch.kernel.__name__ for launch in recorded] == ["split_moments", "split_apply"]


def test_the_table_says_how_it_was_made_and_what_is_wrong() -> None:
    text = aot_gate.table([judged(adds_in_half, 1024)])
    assert "python examples/benchmarks/aot_gate.py" in text
    assert "1 kernels, 1 with a fault" in text
    assert "arith.addf in f16" in text
