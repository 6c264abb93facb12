"""`examples/benchmarks/gpu.py` without a GPU: what it would time, how it judges and reports, and that it says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import _gpu_contenders
import gpu
from _gpu_contenders import CONTENDERS, Problem, Skip

TINY = Problem(2, 8, 5, 5, groups=2)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "No CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the checks pass on a GPU")
def test_a_failed_check_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("_gpu_checks.all_checks", lambda: dict.fromkeys(["triton is used", "opcheck"]))
    assert gpu.main([]) == 1
    printed = capsys.readouterr()
    assert "FAILED triton is used\nTraceback" in printed.out
    assert "2 checks, 2 failed, 0 not ended" in printed.out
    assert "nothing was timed" in printed.err


def test_a_check_that_does_not_end_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("_gpu_checks.all_checks", lambda: {"opcheck": None})
    assert gpu.run_checks(0.01) == 1
    assert "not ended after 0 s: opcheck\n1 checks, 0 failed, 1 not ended" in capsys.readouterr().out


def test_a_process_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "run_check", os._exit)
    monkeypatch.setattr("_gpu_checks.all_checks", lambda: {7: None})  # its exit status
    assert gpu.run_checks(60) == 1
    assert "FAILED 7\nBrokenProcessPool" in capsys.readouterr().out


def test_the_list_has_what_was_promised() -> None:
    listed = list(gpu.problems())
    assert {problem.batch for problem in listed} == {1, 2, 8, 32}
    assert {problem.channels_last for problem in listed} == {False, True}
    assert len(set(map(str, listed))) == len(listed)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_contenders_agree_with_torch(channels_last: bool, ordered: bool, backward: bool) -> None:
    problem = Problem(2, 8, 5, 5, groups=2, channels_last=channels_last, ordered=ordered)
    for name in ("gnswap", "eager"):
        call = _gpu_contenders.step(problem, CONTENDERS[name], "cpu", backward=backward)
        _gpu_contenders.agrees(call, problem, "cpu", backward=backward)


def test_a_contender_that_computes_something_else_is_seen() -> None:
    def wrong(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, _: None) -> torch.Tensor:
        return torch.nn.functional.group_norm(x, groups, weight, bias)

    call = _gpu_contenders.step(TINY, wrong, "cpu", backward=False)
    with pytest.raises(AssertionError, match="relative error"):
        _gpu_contenders.agrees(call, TINY, "cpu", backward=False)


@pytest.mark.parametrize("name", ["apex", "liger"])
def test_what_is_not_installed_is_skipped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(Skip, match="not installed"):
        CONTENDERS[name](*TINY.tensors("cpu")[:1], 2, *TINY.tensors("cpu")[1:3], None)


def test_what_there_was_no_time_for_is_named(tmp_path: Path) -> None:
    bench = gpu.Bench("cpu", seconds=60)
    for contender in ("gnswap", "eager", "copy"):
        bench.run(TINY, contender)
    bench.end = 0.0
    bench.run(TINY, "liger")
    text = gpu.report(bench.rows, "a test")
    assert text.count(f"| {TINY} |") == 2
    assert "- liger: no time left" in text
    assert "## Not measured: 2" in text
    gpu.write(bench.rows, "a test", tmp_path)
    assert (tmp_path / "gpu.json").exists()


def test_our_own_failure_is_not_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(CONTENDERS, "gnswap", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.Bench("cpu", seconds=60).run(TINY, "gnswap")
    monkeypatch.setitem(CONTENDERS, "eager", broken)
    bench = gpu.Bench("cpu", seconds=60)
    bench.run(TINY, "eager")
    assert [row.note for row in bench.rows] == ["RuntimeError: illegal memory access"] * 2
