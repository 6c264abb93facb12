"""Check and time the CUDA kernels on this machine's GPU, in one command and under 8 minutes.

    python examples/benchmarks/gpu.py                # checks, then timings; writes results/gpu.{md,json,png}
    python examples/benchmarks/gpu.py --dry-run      # everything that needs no GPU

First every check of `tests/ops/_gpu_checks.py` runs (the tests marked `gpu`), in several processes, since compiling is
what takes the time; one failure ends it. Then GroupNorm+ReLU is timed, forward and forward + backward, against eager
torch, torch.compile, Apex and Liger where they are installed, next to a device copy of the same tensor; some problems
with a channel order, for which the others gather. Last, small batches with other cuts of the work than the chosen one.
What does not fit in the time is named in the result. Needs torch and triton; matplotlib draws the plot if it is there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _gpu_contenders import CONTENDERS, Problem, Skip, agrees, copy, cuts, step
from _report import RESULTS, environment, markdown_table

from gnswap.ops._triton._config import Machine

CHECKS = Path(__file__).parents[2] / "tests" / "ops"
A100, H100 = Machine(108, 80), Machine(132, 90)
# (C, height, width): ResNet-50 at 224 px, a detector's pyramid, a VAE's decoder
SHAPES = [(256, 56, 56), (1024, 14, 14), (64, 112, 112), (512, 28, 28), (2048, 7, 7), (256, 100, 152), (512, 128, 128)]
BATCHES = (1, 2, 8, 32)
CHECKS_SHARE = 0.6  # of the time
FASTEST_FIRST = ("gnswap", "eager", "copy", "apex", "liger", "compile")


@dataclass(frozen=True)
class Row:
    """One measurement: milliseconds, or why there are none."""

    problem: str
    contender: str
    direction: str
    milliseconds: float | None
    gigabytes_per_second: float | None
    note: str = ""


def problems() -> Iterator[Problem]:
    """Every problem, the ones that matter most first: half precision, small batches."""
    for dtype in (torch.float16, torch.float32):
        for batch in BATCHES:
            for shape in SHAPES:
                for channels_last in (False, True):
                    if dtype == torch.float16 or batch == 2:
                        yield Problem(batch, *shape, channels_last=channels_last, dtype=dtype)
    for shape in SHAPES:
        for channels_last in (False, True):
            yield Problem(2, *shape, channels_last=channels_last, ordered=True)


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median time of a call, with a cold L2 cache; on the CPU (dry run) one call."""
    if device == "cpu":
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)
    from triton.testing import do_bench

    return float(do_bench(function, warmup=10, rep=40, return_mode="median"))


class Bench:
    """Measures until the time is up, and keeps a row for what was not measured too."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.end = device, time.monotonic() + seconds
        self.rows: list[Row] = []

    def run(self, problem: Problem, contender: str) -> None:
        """Time one contender on one problem in both directions; its result is checked before."""
        for backward in (False, True):
            direction = "forward + backward" if backward else "forward"
            row = Row(str(problem), contender, direction, None, None)
            if contender == "copy" and backward:
                continue
            if time.monotonic() > self.end:
                self.rows.append(Row(**{**asdict(row), "note": "no time left"}))
                continue
            try:
                call = copy(problem, self.device) if contender == "copy" else step(
                    problem, CONTENDERS[contender], self.device, backward=backward
                )  # fmt: skip
                if contender != "copy":
                    agrees(call, problem, self.device, backward=backward)
                spent = milliseconds(call, self.device)
            except Skip as reason:
                self.rows.append(Row(**{**asdict(row), "note": str(reason)}))
                continue
            except Exception as error:
                if contender == "gnswap" and not isinstance(error, torch.OutOfMemoryError):
                    raise
                self.rows.append(Row(**{**asdict(row), "note": _short(error)}))
                continue
            accesses = 2 if not backward else 5  # a read and a write, and x, dy and dx; the copy's: a read and a write
            speed = accesses * problem.bytes / spent / 1e6
            self.rows.append(Row(**{**asdict(row), "milliseconds": spent, "gigabytes_per_second": speed}))

    def run_cuts(self, problem: Problem) -> None:
        """Time the forward of other cuts of the work than the chosen one."""
        for name, call in cuts(problem, self.device):
            if time.monotonic() > self.end:
                self.rows.append(Row(str(problem), name, "forward", None, None, "no time left"))
                continue
            try:
                spent = milliseconds(call, self.device)
            except Exception as error:  # a cut that was never compiled for this machine may be refused by it
                self.rows.append(Row(str(problem), name, "forward", None, None, _short(error)))
                continue
            self.rows.append(Row(str(problem), name, "forward", spent, 2 * problem.bytes / spent / 1e6))


def run_check(name: str) -> str:
    """Run one check; what went wrong, or nothing."""
    sys.path.append(str(CHECKS))
    from _gpu_checks import all_checks

    try:
        all_checks()[name]()
    except Exception:
        return traceback.format_exc()
    return ""


def run_checks(seconds: float) -> int:
    """Run every check that is marked `gpu`, side by side; the number of those that failed or did not end in time."""
    sys.path.append(str(CHECKS))
    from _gpu_checks import all_checks

    names, failures = list(all_checks()), 0
    # spawned: a forked process cannot use CUDA after its parent has
    pool = ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    running = {pool.submit(run_check, name): name for name in names}
    try:
        for done in as_completed(running, seconds):
            name = running.pop(done)
            error = repr(done.exception()) if done.exception() else done.result()  # a process may die of a check
            if error:
                failures += 1
                print(f"FAILED {name}\n{error}", flush=True)
    except TimeoutError:
        print(f"not ended after {seconds:.0f} s: {', '.join(running.values())}", flush=True)
    for process in list((pool._processes or {}).values()) if running else ():
        process.kill()  # one that hangs would keep us from ending
    pool.shutdown(cancel_futures=True)
    print(f"{len(names)} checks, {failures} failed, {len(running)} not ended", flush=True)
    return failures + len(running)


def report(rows: list[Row], device: str) -> str:
    """Markdown: a table a direction with the contenders side by side, the cuts, and what was not measured."""
    facts = environment("triton")
    lines = [f"# GroupNorm + ReLU on {device}", "", f"`{facts['command']}`, {facts['date']}, {facts['versions']}.", ""]
    lines += ["Milliseconds, median, cold L2 cache; in brackets GB/s at one read and one write of each tensor.", ""]
    measured = {(row.problem, row.contender, row.direction): row for row in rows}
    for direction in ("forward", "forward + backward"):
        names = [n for n in FASTEST_FIRST if any((r.contender, r.direction) == (n, direction) for r in rows)]
        table = []
        for problem in dict.fromkeys(row.problem for row in rows if row.contender in FASTEST_FIRST):
            cells = [measured.get((problem, name, direction)) for name in names]
            table.append([problem, *(_cell(row) for row in cells), _ratio(measured, problem, direction)])
        lines += [f"## {direction}", "", markdown_table(["problem", *names, "best other / gnswap"], table)]
    others = [row for row in rows if row.contender not in FASTEST_FIRST]
    lines += ["## Other cuts, forward", "", markdown_table(
        ["problem", "cut", "time"], [[row.problem, row.contender, _cell(row)] for row in others]
    )]  # fmt: skip
    missing = [row for row in rows if row.milliseconds is None]
    lines += [f"## Not measured: {len(missing)}", ""]
    lines += sorted({f"- {row.contender}: {row.note}" for row in missing})
    return "\n".join(lines) + "\n"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"


def _cell(row: Row | None) -> str:
    if row is None or row.milliseconds is None:
        return "–"
    return f"{row.milliseconds:.4f} ({row.gigabytes_per_second:.0f})"


def _ratio(measured: dict[tuple[str, str, str], Row], problem: str, direction: str) -> str:
    ours = measured.get((problem, "gnswap", direction))
    others = [measured.get((problem, name, direction)) for name in ("eager", "apex", "liger", "compile")]
    times = [row.milliseconds for row in others if row is not None and row.milliseconds is not None]
    if ours is None or ours.milliseconds is None or not times:
        return "–"
    return f"{min(times) / ours.milliseconds:.2f}"


def plot(rows: list[Row], path: Path) -> bool:
    """Speed against that of the copy, one bar a problem; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    speeds = {(row.problem, row.contender): row.gigabytes_per_second for row in rows if row.direction == "forward"}
    names = [p for p in dict.fromkeys(row.problem for row in rows) if speeds.get((p, "copy"))]
    figure = Figure(figsize=(10, 1 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots()
    for offset, contender in enumerate(("eager", "gnswap")):
        shares = [(speeds.get((name, contender)) or 0.0) / (speeds[name, "copy"] or 1.0) for name in names]
        axes.barh([n + 0.4 * offset for n in range(len(names))], shares, height=0.4, label=contender)
    axes.set_yticks([n + 0.2 for n in range(len(names))], names, fontsize=6)
    axes.set_xlabel("effective bandwidth, forward, as a share of a device copy's")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def write(rows: list[Row], device: str, folder: Path) -> None:
    """Write table, numbers and plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.md").write_text(report(rows, device))
    facts = {**environment("triton"), "device": device, "rows": [asdict(row) for row in rows]}
    (folder / "gpu.json").write_text(json.dumps(facts, indent=1))
    print(f"plot: {'written' if plot(rows, folder / 'gpu.png') else 'matplotlib is not installed'}")


def interpreter_check() -> None:
    """A few tiny problems through the kernels themselves, in triton's interpreter."""
    from gnswap.ops._triton._config import choose_config

    for problem in (
        Problem(1, 8, 3, 5, groups=2),
        Problem(1, 8, 4, 4, groups=2, channels_last=True),
        Problem(1, 8, 3, 5, groups=2, ordered=True),
    ):
        for machine in (A100, H100):
            config = choose_config(problem.cut(backward=False), machine)
            call = step(problem, CONTENDERS["gnswap kernels"], "cpu", backward=False, config=config)
            agrees(call, problem, "cpu", backward=False)
            print(f"interpreter: {problem} as {config.regime} agrees")


def dry_run(folder: Path) -> None:
    """Everything as far as it goes without a GPU: the cases, the cuts, the harness, the kernels in the interpreter."""
    from gnswap.ops._triton._config import choose_config

    listed = list(problems())
    for problem in listed:
        chosen = {
            m.arch: [choose_config(problem.cut(backward=b), m).regime for b in (False, True)] for m in (A100, H100)
        }
        print(f"{problem!s:44} sm_80 {'/'.join(chosen[80]):42} sm_90 {'/'.join(chosen[90])}")
    bench = Bench("cpu", seconds=60)
    for problem in (Problem(2, 8, 5, 5, groups=2), Problem(2, 8, 5, 5, groups=2, channels_last=True)):
        for contender in FASTEST_FIRST:
            if contender != "compile":  # minutes of C++ for nothing
                bench.run(problem, contender)
    write(bench.rows, "no GPU: a dry run", folder)
    environment_ = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__, "--interpreter-check"], env=environment_, check=True)
    print(f"{len(listed)} problems, {len(FASTEST_FIRST)} contenders; tables in {folder}")


def main(arguments: list[str] | None = None) -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="do what needs no GPU")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for all of it (default 7)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for table, numbers and plot")
    parser.add_argument("--interpreter-check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if options.interpreter_check:
        interpreter_check()
        return 0
    if options.dry_run:
        dry_run(options.out / "dry_run")
        return 0
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was checked or timed. `--dry-run` does what needs none.", file=sys.stderr)
        return 1
    if run_checks(60 * options.minutes * CHECKS_SHARE):
        print("Not every check passed on this GPU: nothing was timed.", file=sys.stderr)
        return 1

    bench = Bench("cuda", 60 * options.minutes - (time.monotonic() - started))
    for contenders in (FASTEST_FIRST[:3], FASTEST_FIRST[3:5]):
        for problem in problems():
            for contender in contenders:
                bench.run(problem, contender)
    for problem in problems():
        if problem.batch <= 2 and not problem.channels_last and not problem.ordered:
            bench.run_cuts(problem)
    for problem in problems():
        bench.run(problem, "compile")
    write(bench.rows, torch.cuda.get_device_name(), options.out)
    print((options.out / "gpu.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
