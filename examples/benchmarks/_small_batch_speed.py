"""Time and peak memory of one training step of every network that `small_batch.py` compares.

Times: rounds of one step of every network, in an order drawn anew for each round, so that a busy moment of the machine
hits all alike; what counts is the ratio to the BatchNorm network's step of the same round. Memory: the highest resident
size (Linux's VmHWM) of a process that does nothing but steps of one network, above what it held before the first, with
the network and the photos there. "fresh" and "annealed" compute what "naive" and "gnswap" compute and are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import _elpv
import torch
from _report import Rows, markdown_table
from _small_batch_nets import Bench, Setting, optimizer_of
from rich.progress import track
from torch import Tensor, nn

from gnswap._timing import ratios

TIMED = ("BatchNorm", "BatchNorm, frozen", "naive GroupNorm", "gnswap, pure", "gnswap", "gnswap, healed first")
WARM_UP, ROUNDS = 3, 30
MEMORY_STEPS = 3


class Stepper:
    """One network with its optimizer and one batch of photos; calling it does a step of training."""

    def __init__(self, bench: Bench, method: str, batch: int) -> None:
        self.net = bench.network(method, 0)
        self.optimizer = optimizer_of(self.net, 1e-4)
        self.x: Tensor = _elpv.as_input(bench.train.photos[:batch])
        self.labels = bench.train.labels[:batch]

    def __call__(self) -> None:
        loss = nn.functional.cross_entropy(self.net(self.x), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def key(setting: Setting, batch: int) -> str:
    return f"{setting}: speed, batch {batch}"


def times(bench: Bench, batch: int) -> dict[str, list[float]]:
    """Seconds of each step of each network, round by round."""
    steppers = {method: Stepper(bench, method, batch) for method in TIMED}
    order, taken = random.Random(0), {method: [0.0] * ROUNDS for method in TIMED}
    for round_ in track(range(-WARM_UP, ROUNDS), f"steps at batch {batch}", transient=True):
        for method in order.sample(TIMED, len(TIMED)):
            start = time.perf_counter()
            steppers[method]()
            if round_ >= 0:
                taken[method][round_] = time.perf_counter() - start
    return taken


def peak_mb(method: str, batch: int, setting: Setting, arguments: argparse.Namespace, code: str) -> float:
    """Peak memory of training steps in a process of its own."""
    told = {"method": method, "batch": batch, "setting": vars(setting), "cache": str(arguments.cache), "code": code}
    command = [sys.executable, __file__, json.dumps(told)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: float = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(rows: Rows, setting: Setting, arguments: argparse.Namespace) -> None:
    """A row for each batch size that has none yet."""
    parts = _elpv.split(_elpv.load(setting.pixels, arguments.cache))
    bench = Bench(setting, parts, arguments.cache, rows.code)
    for batch in arguments.batches:
        if key(setting, batch) in rows:
            continue
        taken = times(bench, batch)
        peaks = {method: peak_mb(method, batch, setting, arguments, rows.code) for method in TIMED}
        found = {
            method: {
                "ms": 1e3 * median(taken[method]),
                "ratio": ratios(taken[method], taken["BatchNorm"]),
                "peak_mb": peaks[method],
            }
            for method in TIMED
        }
        rows.add(
            key(setting, batch), {"kind": "speed", "batch": batch, "threads": torch.get_num_threads(), "speed": found}
        )


def as_table(rows: Rows, setting: Setting) -> str:
    """Time and memory of each network beside the BatchNorm network's; nothing where nothing was measured."""
    measured = sorted(
        (row for name, row in rows.rows.items() if name.startswith(f"{setting}: speed")), key=lambda row: row["batch"]
    )
    if not measured:
        return ""
    cells = []
    for method in TIMED:
        cell = [method]
        for row in measured:
            found, plain = row["speed"][method], row["speed"]["BatchNorm"]
            low, middle, high = found["ratio"]
            memory = found["peak_mb"] / plain["peak_mb"]
            cell.append(f"{middle:.2f}x ({low:.2f} to {high:.2f}), {memory:.2f}x")
        cells.append(cell)
    threads = measured[0]["threads"]
    # no milliseconds: they are those of a machine with other work on it, the ratio is taken round by round
    header = [f"a step, {threads} thread(s): time to BatchNorm's (quartiles), memory to its"]
    return markdown_table([*header, *(f"batch {row['batch']}" for row in measured)], cells)


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


def _main(told: dict[str, Any]) -> float:
    setting, cache = Setting(**told["setting"]), Path(told["cache"])
    bench = Bench(setting, _elpv.split(_elpv.load(setting.pixels, cache)), cache, told["code"])
    step = Stepper(bench, told["method"], told["batch"])
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(MEMORY_STEPS):
        step()
    return _status("VmHWM") - held


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
