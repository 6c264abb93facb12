"""Fine-tuning with tiny batches: BatchNorm, GroupNorm as everybody swaps it in, and gnswap, at batch 1 to 16.

    pip install -e '.[dev]' && pip install --no-deps elpv-dataset==1.0.0.post1
    python examples/benchmarks/small_batch.py            # a night on two cores
    python examples/benchmarks/small_batch.py --evening  # an hour and a half on two cores, with small photos
    python examples/benchmarks/small_batch.py --quick    # about an hour on one core, and fewer of them
    python examples/benchmarks/small_batch.py speed      # time and peak memory of a step (any setting)
    python examples/benchmarks/small_batch.py report     # table and figures of what is measured so far

Task: ELPV (`_elpv.py`), solar cells with a defect or without; EfficientNet-Lite0 with its ImageNet weights and a new
head. Every run sees the same number of photos in the same order; the methods are `_small_batch_nets.METHODS`. The
learning rate grows with the batch (`learning_rate`). It is searched once for each baseline and once for gnswap's four
together, at batch 4, on photos that are neither trained nor tested on, with a seed of its own (`best_rate`). Runs are
rows of a file, the most telling first: stopped at any time, the script goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import math
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _elpv
import _small_batch_report
import _small_batch_speed
import torch
from _report import RESULTS, Rows, code_version
from _small_batch_nets import (
    HEALED,
    LIGHT_BATCHES,
    METHODS,
    RATE_OF,
    REFERENCE_BATCH,
    Bench,
    Setting,
    learning_rate,
)
from photos import CACHE
from rich.console import Console
from rich.progress import Progress

BATCHES = (1, 2, 16, 4, 8)  # in the order they are run
SEARCHED = (0.0001, 0.0003, 0.001)
SEARCH_SEED = 1000
PRESETS: dict[str, dict[str, Any]] = {
    "night": {"pixels": 160, "samples": 2624, "judges": 984, "heal_steps": 600, "seeds": 3, "jobs": 2},
    "evening": {"pixels": 96, "samples": 2624, "judges": 984, "heal_steps": 60, "seeds": 2, "jobs": 2},
    "quick": {"pixels": 96, "samples": 640, "judges": 492, "heal_steps": 60, "seeds": 2, "jobs": 1},
    "smoke": {"pixels": 64, "samples": 8, "judges": 24, "heal_steps": 2, "seeds": 1, "jobs": 1},
}

Task = tuple[str, int, int, float]  # method, batch, seed, learning rate


def search_key(setting: Setting, method: str, base: float) -> str:
    return f"{setting}: search, {method}, lr {base:g}"


def run_key(setting: Setting, method: str, batch: int, seed: int) -> str:
    return f"{setting}: {method}, batch {batch}, seed {seed}"


def best_rate(rows: Rows, setting: Setting, method: str, positives: int) -> float:
    """The lowest of the searched rates that is not worse than the best one by more than its standard error.

    Worse in the area under the ROC curve on the validation photos: accuracy is a matter of a few photos there, and a
    network that learned nothing has 0.69. And not simply the best: at the highest rate that still works some of the
    runs fail, which one search does not show (the rule: Breiman et al., *Classification and Regression Trees*, 1984).

    Args:
        positives: how many of the validation photos show a defect.
    """
    found = {base: rows.rows[search_key(setting, method, base)] for base in SEARCHED}
    best = max(found.values(), key=lambda row: row["auc"])
    least = best["auc"] - auc_error(best["auc"], positives, best["photos"] - positives)
    return min(base for base, row in found.items() if row["auc"] >= least)


def auc_error(auc: float, positives: int, negatives: int) -> float:
    """The standard error of an area under the ROC curve (Hanley & McNeil, 1982)."""
    one, two = auc / (2 - auc) - auc**2, 2 * auc**2 / (1 + auc) - auc**2
    return math.sqrt((auc * (1 - auc) + (positives - 1) * one + (negatives - 1) * two) / (positives * negatives))


_bench: Bench | None = None  # of this process


def start_process(setting: Setting, cache: Path, code: str) -> None:
    """Load photos and networks, once in each process."""
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(setting, _elpv.split(_elpv.load(setting.pixels, cache)), cache, code)


def work(task: Task) -> dict[str, Any]:
    """One row."""
    assert _bench is not None
    method, batch, seed, lr = task
    if seed == SEARCH_SEED:
        return _bench.run(method, batch, seed, lr, _bench.validation)[1]
    net, row = _bench.run(method, batch, seed, lr, _bench.test)
    return row | ({"light": _bench.under_other_light(net)} if batch in LIGHT_BATCHES else {})


@contextlib.contextmanager
def workers(jobs: int, *start: Any) -> Iterator[Any]:
    """A function like `map`, in order, that works in this process or in `jobs` others."""
    if jobs == 1:
        start_process(*start)
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, start_process, start) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def measure(rows: Rows, setting: Setting, arguments: argparse.Namespace) -> None:
    """Search the learning rates, then run what is missing: the first seed of everything first."""
    start = (setting, arguments.cache, rows.code)
    parts = _elpv.split(_elpv.load(setting.pixels, arguments.cache))
    positives = int(parts[1].labels.sum())
    if HEALED in arguments.methods and arguments.jobs > 1:  # made here, so that the processes find it
        Bench(setting, parts, *start[1:]).network(HEALED, 0)
    searches: dict[str, Task] = {
        search_key(setting, method, base): (method, REFERENCE_BATCH, SEARCH_SEED, learning_rate(base, REFERENCE_BATCH))
        for base in SEARCHED
        for method in dict.fromkeys(RATE_OF[method] for method in arguments.methods)
    }
    with workers(arguments.jobs, *start) as mapped:
        store(rows, "search", searches, mapped)
        base = {method: best_rate(rows, setting, RATE_OF[method], positives) for method in arguments.methods}
        runs: dict[str, Task] = {
            run_key(setting, method, batch, seed): (method, batch, seed, learning_rate(base[method], batch))
            for seed in range(arguments.seeds)
            for batch in arguments.batches
            for method in arguments.methods
        }
        store(rows, "run", runs, mapped)


def store(rows: Rows, kind: str, tasks: dict[str, Task], mapped: Any) -> None:
    """Do the tasks that have no row yet, and store each row as it comes."""
    missing = {key: task for key, task in tasks.items() if key not in rows}
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task(kind, total=len(tasks), completed=len(tasks) - len(missing))
        for (key, (method, batch, seed, _)), row in zip(missing.items(), mapped(work, missing.values()), strict=True):
            rows.add(key, {"kind": kind, "method": method, "batch": batch, "seed": seed, **row})
            bar.advance(shown)
            if not console.is_terminal:
                print(f"{key}: accuracy {row['accuracy']:.3f}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    """The command line; what is not given comes from the preset."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("train", "speed", "report"), default="train")
    presets = parser.add_mutually_exclusive_group()
    for name, says in (
        ("evening", "an hour and a half on two cores"),
        ("quick", "about an hour on one core"),
        ("smoke", "seconds: only to see that it runs"),
    ):
        presets.add_argument(f"--{name}", dest="preset", action="store_const", const=name, help=says)
    for name, says in (
        ("pixels", "side of the photos"),
        ("samples", "photos seen in a run"),
        ("judges", "test photos looked at"),
        ("heal-steps", "steps of healing for 'healed first'"),
        ("seeds", "runs of each method and batch size"),
        ("jobs", "processes, of one thread each"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{says} (night: {PRESETS['night'][name.replace('-', '_')]})")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), metavar="N")
    parser.add_argument("--fresh", action="store_true", help="forget what is measured")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where photos and networks are kept (%(default)s)")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset or "night"]
    for name, value in preset.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    """Measure what is missing and write what is known."""
    arguments = options()
    setting = Setting(arguments.pixels, arguments.samples, arguments.judges, arguments.heal_steps)
    rows = Rows(RESULTS / "small_batch.rows.jsonl", code_version(), fresh=arguments.fresh)
    if arguments.what == "train":
        measure(rows, setting, arguments)
    if arguments.what == "speed":
        _small_batch_speed.measure(rows, setting, arguments)
    _small_batch_report.write_all(rows, setting, arguments)


if __name__ == "__main__":
    main()
