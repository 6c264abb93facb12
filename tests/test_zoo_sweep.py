"""The sweep over the zoo: what kills a network is its row, it goes on where it stopped, and its tables count right."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_zoo import BENCHMARKS, photos


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("zoo")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(importlib.import_module("_report"), "RESULTS", tmp_path)
    return module


def dies(_name: str, _photos: Path) -> dict[str, Any]:
    os._exit(3)


def hangs(_name: str, _photos: Path) -> dict[str, Any]:
    time.sleep(600)
    return {}


def wants_memory(_name: str, _photos: Path) -> dict[str, Any]:
    return {"failed": {}, "sum": float(torch.ones(1 << 33).sum())}


def works(name: str, photos: Path) -> dict[str, Any]:
    return {"failed": {}, "name": name, "photos": str(photos)}


def test_what_kills_a_network_is_its_row(zoo: Any) -> None:
    def row(work: Any, seconds: float) -> dict[str, Any]:
        return zoo.isolated(work, "net", Path("photos.pt"), seconds, 3)

    assert row(works, 100) | {"peak_mib": 0} == {"failed": {}, "name": "net", "photos": "photos.pt", "peak_mib": 0}
    assert row(dies, 100)["failed"]["limits"] == "the process died with exit code 3"
    assert row(hangs, 0.2)["failed"]["limits"] == "not finished after 0.2 s"
    assert "memory" in row(wants_memory, 100)["failed"]["all"]


def breaks(_name: str, _photos: Path) -> dict[str, Any]:
    raise RuntimeError("broken")


def test_a_traceback_does_not_name_this_machine(zoo: Any) -> None:
    error = zoo.isolated(breaks, "net", Path("photos.pt"), 100, 3)["failed"]["all"]
    assert 'File "examples/benchmarks/zoo.py"' in error
    assert "RuntimeError: broken" in error
    assert str(BENCHMARKS.parents[1]) not in error


KILLED = """
import signal, sys, threading, time
from pathlib import Path
sys.path[:0] = [{benchmarks!r}, {root!r}]
import zoo
from tests.test_zoo_sweep import hangs

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, zoo.stop)
    threading.Thread(target=zoo.isolated, args=(hangs, "net", Path("photos.pt"), 600, 3)).start()
    while not zoo.multiprocessing.active_children():
        time.sleep(0.05)
    print(zoo.multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(600)
"""


def test_a_sweep_that_is_ended_takes_its_processes_with_it(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(benchmarks=str(BENCHMARKS), root=str(BENCHMARKS.parents[1])))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as sweep:
        assert sweep.stdout is not None
        child = int(sweep.stdout.readline())
        os.kill(child, 0)  # it lives
        sweep.terminate()
        assert sweep.wait(30) == 128 + signal.SIGTERM
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} is still there")


SIZES = (("a", "one", 1), ("b", "one", 2), ("c", "two", 3), ("d", "one", 4), ("e", "two", 5))
KNOWN = {
    name: {"key": name, "family": family, "parameters": parameters, "types": {"BatchNorm2d": 1}}
    for name, family, parameters in SIZES
}


def filled() -> dict[str, dict[str, Any]]:
    passed = {"code": "abc", "failed": {}, "passed": ["output"], "size": [3, 96, 96], "distance": 0.25}
    failed = {"code": "def", "failed": {"revert": "Traceback: broken"}, "passed": ["output"], "size": [3, 64, 64]}
    return {
        "values": {"a": passed, "b": failed, "c": {**passed, "does_not_apply": {"pickle": "no | pickle"}}},
        "meta": {"b": {**failed, "failed": {}}, "d": failed},
        "export": {"a": {**passed, "error": 2e-6}, "b": {**failed, "original_fails": "ValueError: no"}, "c": failed},
    }


def test_the_table_counts(zoo: Any) -> None:
    _, _, *lines = zoo.as_table(filled(), KNOWN).splitlines()
    every, one, two = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert every == ["**all**", "5", "2", "1", "1", "1", "2", "0.25", "0.25", "1", "1", "1", "2e-06"]
    assert one[-4:] == ["1", "0", "1", "2e-06"]
    assert two[-4:] == ["0", "1", "0", "–"]
    by_check = zoo.per_check(filled())
    assert "| output | 3 | 0 | 0 | 2 | 0 | 0 |" in by_check
    assert "| pickle | 0 | 0 | 1 | 0 | 0 | 0 |" in by_check


def test_the_summary_says_what_is_missing_and_of_which_code(zoo: Any) -> None:
    summary = zoo.summary(filled(), KNOWN)
    assert summary["values"] == {"passed": 2, "failed": 1, "not run": 2}
    assert summary["meta"] == {"passed": 1, "failed": 1, "not run": 1}
    assert summary["export"] == {"passed": 1, "original fails": 1, "failed": 1, "not run": 2}
    assert summary["covered by values or shapes"] == 3
    assert summary["rows by version of gnswap"]["values"] == {"abc": 2, "def": 1}


def test_the_page_of_failures_has_every_error(zoo: Any) -> None:
    page = zoo.failures(filled())
    assert page.count("Traceback: broken") == 4
    assert "## b: revert (values, gnswap def)" in page
    assert "The BatchNorm original fails as well:\n\n```text\nValueError: no" in page
    assert "| pickle | no \\| pickle | 1 |" in page


def test_every_exception_has_its_reason(zoo: Any) -> None:
    header, _, *lines = zoo.exceptions(filled(), KNOWN).splitlines()
    assert header == "| exception | networks |"
    assert lines == [
        "| does not apply: pickle: no \\| pickle (c) | 1 |",
        "| failed: revert (export): Traceback: broken (c) | 1 |",
        "| failed: revert (export): the BatchNorm original fails as well (b) | 1 |",
        "| failed: revert (meta): Traceback: broken (d) | 1 |",
        "| failed: revert (values): Traceback: broken (b) | 1 |",
        "| not run: export: too little time (d, e) | 2 |",
        "| not run: values: too little time or memory so far; 0 pass the checks of shapes (d, e) | 2 |",
    ]


def test_families_take_turns(zoo: Any) -> None:
    assert zoo.families_first(KNOWN) == ["a", "c", "b", "e", "d"]


def test_a_census_of_another_timm_is_refused(zoo: Any) -> None:
    with pytest.raises(SystemExit, match=r"Run examples/benchmarks/zoo_counts\.py first"):
        zoo.census()


def test_the_sweep_goes_on_where_it_stopped(zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    census = (BENCHMARKS / "results" / "zoo_counts.rows.jsonl").read_text()
    (tmp_path / "zoo_counts.rows.jsonl").write_text(census)
    ran: list[str] = []
    outcomes = iter(["broken"])  # the first row of test_resnet fails

    def isolated(_work: Any, name: str, *_rest: object) -> dict[str, Any]:
        ran.append(name)
        error = next(outcomes, "") if name == "test_resnet" else ""
        return {"failed": {"output": error} if error else {}, "passed": []}

    monkeypatch.setattr(zoo, "isolated", isolated)
    two = ["--jobs", "1", "--models", "test_resnet", "starnet_s050"]
    for extra, expected in (
        ([], ["starnet_s050", "test_resnet"]),  # a family each, the smaller first
        ([], []),
        (["--retry-failed"], ["test_resnet"]),
        (["--retry-failed"], []),
        (["--report"], []),
        (["--export"], ["starnet_s050", "test_resnet"]),
        (["--meta"], []),  # both have a row with values
        (["--fresh"], ["starnet_s050", "test_resnet"]),
    ):
        ran.clear()
        monkeypatch.setattr("sys.argv", ["zoo.py", *two, *extra])
        zoo.main()
        assert sorted(ran) == sorted(expected), extra
    assert json.loads((tmp_path / "zoo.json").read_text())["values"]["passed"] == 2
    assert (tmp_path / "zoo_failures.md").exists()


def test_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    export = importlib.import_module("_zoo_export")
    row = export.examine("test_resnet", photos(), (64,))
    assert not row["failed"]
    assert 0 < row["error"] < 1e-5
    assert (row["size"], row["axes"]) == ([3, 64, 64], ["batch"])
    written = SimpleNamespace(opset=18, notes=(), norms=(), dynamic_axes=("batch",))
    monkeypatch.setattr(export.gnswap, "export_onnx", lambda *_, **__: written)
    monkeypatch.setattr(export.torch.onnx, "export", lambda *_, **__: None)
    monkeypatch.setattr(export, "onnxruntime_output", lambda _, x: [torch.zeros(len(x), 1000)])
    row = export.examine("test_resnet", photos(), (64,))
    assert row["failed"]["parity"].startswith("relative error 1, torch's own in fp32")
    assert row["original_fails"] == "relative error 1"
