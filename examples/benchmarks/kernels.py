"""The C++ kernels against the best that eager torch can do on the CPU, and whole training steps.

    python examples/benchmarks/kernels.py            # writes results/kernels.{md,json}; some ten minutes

GroupNorm + activation on every feature map of ResNet-50 (ReLU, 32 groups) and EfficientNet-Lite0 (ReLU6, 8 groups) at
224 px, N in 1, 2, 8, contiguous and channels_last, forward (inference) and forward + backward. The opponent is the
fastest eager form of each row: `F.group_norm` and the activation in place, for channels_last also with a way through
contiguous. Starting autograd's engine takes longer than both directions of a small norm, and a network starts it once
for all its norms: so forward + backward runs several norms of the row's shape, on tensors of their own, through one
backward. Every row is checked against fp64 first; then all contenders take turns, and a ratio is the median of the
ratios within the turns, so that what else the machine does hits both sides. Everything runs twice: with the system's
allocator, and with one that keeps large blocks (glibc gives them back to the kernel after each call, and eager torch,
which allocates more often, pays more for that). The training step of ResNet-50 is that of `gnswap.convert(model,
groups=32, absorb=True)`: the 33 activations that follow a norm directly are computed by it; the 16 behind a shortcut's
sum stay, as in torch.

Rows are stored as they are measured, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from _report import RESULTS, Rows, code_version, environment, markdown_table, write
from _turns import take_turns
from torch import Tensor, nn

import gnswap
from gnswap import ops

THREADS = 2
BATCHES = (1, 2, 8)
# every (C, height = width) that a norm sees, and how often does not matter here
RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14)]
RESNET50 += [(512, 14), (512, 7), (2048, 7)]
LITE0 = [(32, 112), (96, 112), (96, 56), (144, 56), (144, 28), (240, 28), (240, 14), (480, 14), (672, 14), (672, 7)]
LITE0 += [(1152, 7)]
DIRECTIONS = ("forward", "forward + backward")
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# glibc: never mmap a block, never give memory back
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "tuned": TUNED}
TARGETS = {
    ("forward", "NCHW"): 1.4,
    ("forward", "NHWC"): 1.6,
    ("forward + backward", "NCHW"): 1.7,
    ("forward + backward", "NHWC"): 2.5,
}
# training step of ResNet-50, batch 2: times ours
STEP_TARGETS = {"torch.nn.GroupNorm": 1.1, "BatchNorm": 1.0}
# turns of a row, and the seconds that all its turns may take
TURNS, SECONDS, PATIENCE = (5, 60), 0.35, 4
STEP_TURNS = 10
# Norms that share one backward: as many as have this many elements together
ELEMENTS, MOST_NORMS = 2_000_000, 8


@dataclass(frozen=True)
class Problem:
    """One row: a feature map, its norm, and what is asked of it."""

    network: str
    batch: int
    channels: int
    side: int
    layout: str
    direction: str

    @property
    def act(self) -> str:
        return "relu" if self.network == "resnet50" else "relu6"

    @property
    def groups(self) -> int:
        return 32 if self.network == "resnet50" else 8

    @property
    def key(self) -> str:
        shape = f"{self.batch}x{self.channels}x{self.side}x{self.side}"
        return f"{self.network} {shape} {self.layout} {self.direction}"


def problems() -> Iterator[Problem]:
    """All rows."""
    for network, shapes in (("resnet50", RESNET50), ("lite0", LITE0)):
        for batch in BATCHES:
            for channels, side in shapes:
                for layout in LAYOUTS:
                    for direction in DIRECTIONS:
                        yield Problem(network, batch, channels, side, layout, direction)


class Contenders:
    """The tensors of a row, and the calls that are compared on them."""

    def __init__(self, problem: Problem) -> None:
        rng = torch.Generator().manual_seed(0)
        shape = (problem.batch, problem.channels, problem.side, problem.side)
        self.problem, self.format = problem, LAYOUTS[problem.layout]
        self.train = problem.direction != "forward"
        elements = problem.batch * problem.channels * problem.side**2
        count = max(1, min(MOST_NORMS, ELEMENTS // elements)) if self.train else 1

        def feature_map() -> Tensor:
            return torch.randn(shape, generator=rng).contiguous(memory_format=self.format)

        self.inputs = [
            [
                t.requires_grad_(self.train)
                for t in (
                    feature_map(),
                    torch.randn(problem.channels, generator=rng),
                    torch.randn(problem.channels, generator=rng),
                )
            ]
            for _ in range(count)
        ]
        self.leaves = [t for inputs in self.inputs for t in inputs]
        self.dy = feature_map()
        self.target = torch.empty_like(self.dy)

    def act_(self, y: Tensor) -> Tensor:
        return torch.relu_(y) if self.problem.act == "relu" else F.hardtanh_(y, 0.0, 6.0)

    def gnswap(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm(x, self.problem.groups, weight, bias, act=self.problem.act)

    def eager(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.act_(F.group_norm(x, self.problem.groups, weight, bias))

    def eager_through_contiguous(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.group_norm(x.contiguous(), self.problem.groups, weight, bias)
        return self.act_(y).contiguous(memory_format=self.format)

    def both_directions(self, forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        outputs = [forward(*inputs) for inputs in self.inputs]
        return torch.autograd.grad(outputs, self.leaves, [self.dy] * len(outputs))

    def copy(self) -> None:
        self.target.copy_(self.dy)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """What takes turns; everything but the copy with its backward, where that is asked for."""
        forward: dict[str, Callable[..., Tensor]] = {"gnswap": self.gnswap, "eager": self.eager}
        if self.problem.layout == "NHWC":
            forward["eager through contiguous"] = self.eager_through_contiguous
        if self.train:
            return {name: lambda call=call: self.both_directions(call) for name, call in forward.items()}
        return {**{name: lambda call=call: call(*self.inputs[0]) for name, call in forward.items()}, "copy": self.copy}

    def check(self) -> None:
        """Fail unless our result and gradients are as near to fp64 as a few roundings."""
        first = self.inputs[0]
        leaves = [t.detach().double().requires_grad_(self.train) for t in first]
        z = F.group_norm(leaves[0], self.problem.groups, leaves[1], leaves[2])
        exact = [torch.relu(z) if self.problem.act == "relu" else F.relu6(z)]
        ours = [self.gnswap(*first)]
        if self.train:
            exact += torch.autograd.grad(exact[0], leaves, self.dy.double())
            ours += torch.autograd.grad(ours[0], first, self.dy)
            # at a kink of the activation a rounding decides whether a gradient passes
            near = (z.abs() < 1e-5) | ((z - 6).abs() < 1e-5)
            allowance = float((self.dy.double() * near).abs().sum()) * 4
        for index, (one, other) in enumerate(zip(ours, exact, strict=True)):
            error = float((one.detach().double() - other.detach()).abs().max() / other.detach().abs().max())
            limit = 2e-5 if index == 0 else 2e-5 + allowance
            if not error < limit:
                raise SystemExit(f"{self.problem.key}: wrong result {index}, error {error:.2g}")


def measure(problem: Problem) -> dict[str, Any]:
    """One row: the best eager form, and the ratios to it and (forward) to a copy."""
    contenders = Contenders(problem)
    contenders.check()
    with torch.set_grad_enabled(contenders.train):
        turns = take_turns(contenders.calls(), TURNS, SECONDS, PATIENCE)
    times = turns.times
    best = min((name for name in times if name.startswith("eager")), key=lambda name: statistics.median(times[name]))

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    return {
        "eager_form": best,
        "norms": len(contenders.inputs),
        "quiet_turns": turns.quiet,
        "milliseconds": {name: min(values) for name, values in times.items()},
        "speedup": ratio(best, "gnswap"),
        "over_copy": None if contenders.train else ratio("gnswap", "copy"),
    }


def with_torch_group_norm(model: nn.Module) -> nn.Module:
    """A copy with `torch.nn.GroupNorm(32)` for every BatchNorm."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.GroupNorm(32, module.num_features))
    return model


def networks() -> dict[str, nn.Module]:
    """ResNet-50 as it is, with torch's GroupNorm, and converted: activations in the norms, and left where they are."""
    torch.manual_seed(0)
    original = timm.create_model("resnet50").train()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="7 layers got another number of groups")  # 64 channels in 16 groups
        return {
            "BatchNorm": original,
            "torch.nn.GroupNorm": with_torch_group_norm(original),
            "gnswap": gnswap.convert(original, groups=32, absorb=True).model,
            "gnswap, activations apart": gnswap.convert(original, groups=32).model,
        }


def measure_step(layout: str) -> dict[str, Any]:
    """Whole training steps of ResNet-50, batch 2, 224 px."""
    format_ = LAYOUTS[layout]
    x = torch.randn(2, 3, 224, 224).contiguous(memory_format=format_)
    labels = torch.tensor([1, 2])
    calls = {}
    for name, model in networks().items():
        model.to(memory_format=format_)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

        calls[name] = step
    turns = take_turns(calls, (STEP_TURNS, STEP_TURNS), 0.0)
    times = turns.times

    def speedups(ours: str) -> dict[str, float]:
        return {
            name: statistics.median(other / mine for other, mine in zip(times[name], times[ours], strict=True))
            for name in STEP_TARGETS
        }

    return {
        "quiet_turns": turns.quiet,
        "milliseconds": {name: min(values) for name, values in times.items()},
        "speedup": speedups("gnswap"),
        "speedup_apart": speedups("gnswap, activations apart"),
    }


def measure_all(allocator: str, rows: Rows) -> None:
    """Measure what is missing of one allocator."""
    torch.set_num_threads(THREADS)
    if (backend := ops.backend_report()).name != "cpp":
        raise SystemExit(f"the C++ kernels do not run here: {backend.reason}")
    for problem in problems():
        if (key := f"{allocator}: {problem.key}") not in rows:
            rows.add(key, {"allocator": allocator, **vars(problem), **measure(problem)})
    for layout in LAYOUTS:
        if (key := f"{allocator}: step {layout}") not in rows:
            rows.add(key, {"allocator": allocator, "layout": layout, "direction": "step", **measure_step(layout)})


def finished(rows: list[dict[str, Any]]) -> list[str]:
    """The allocators with all rows; the steps come last."""
    steps = [row["allocator"] for row in rows if row["direction"] == "step"]
    return [allocator for allocator in ALLOCATORS if steps.count(allocator) == len(LAYOUTS)]


def summary(rows: list[dict[str, Any]]) -> str:
    """Medians and worst rows against what was asked for."""
    table = []
    for allocator in finished(rows):
        mine = [row for row in rows if row["allocator"] == allocator]
        for (direction, layout), target in TARGETS.items():
            some = [row for row in mine if row["direction"] == direction and row["layout"] == layout]
            speedups = sorted(row["speedup"] for row in some)
            below = sum(value < 1 for value in speedups)
            worst = f"{speedups[0]:.2f}"
            median = f"{statistics.median(speedups):.2f}"
            table.append([allocator, f"{direction}, {layout}", median, f"{target}", worst, f"{below} of {len(some)}"])
        copies = [row["over_copy"] for row in mine if row["direction"] == "forward"]
        table.append([allocator, "forward time / copy time", f"{statistics.median(copies):.2f}", "2.3", "", ""])
        for row in mine:
            if row["direction"] == "step":
                for opponent, target in STEP_TARGETS.items():
                    name = f"ResNet-50 training step against {opponent}, {row['layout']}"
                    table.append([allocator, name, f"{row['speedup'][opponent]:.2f}", f"{target}", "", ""])
                    apart = f"{row['speedup_apart'][opponent]:.2f}"
                    table.append([allocator, f"{name}, without `absorb=True`", apart, "", "", ""])
    loud = sum(row["quiet_turns"] < TURNS[0] for row in rows if row["direction"] != "step")
    steps = " / ".join(str(row["quiet_turns"]) for row in rows if row["direction"] == "step")
    text = markdown_table(["allocator", "what", "median", "asked for", "worst row", "rows below 1"], table)
    return (
        f"{text}\nTurns with waits for a processor are left out; {loud} rows had fewer than {TURNS[0]} turns without, "
        f"so that all their turns count, and the steps had {steps} of {STEP_TURNS}.\n"
    )


def details(rows: list[dict[str, Any]]) -> str:
    """Every feature map: speed-ups at N = 1, 2, 8."""
    table = []
    for network, shapes in (("resnet50", RESNET50), ("lite0", LITE0)):
        for layout in LAYOUTS:
            for channels, side in shapes:
                cells = [network, f"{channels}x{side}x{side}", layout]
                for allocator in finished(rows):
                    for direction in DIRECTIONS:
                        wanted = {
                            "network": network,
                            "channels": channels,
                            "side": side,
                            "layout": layout,
                            "allocator": allocator,
                            "direction": direction,
                        }
                        found = {row["batch"]: row for row in rows if wanted.items() <= row.items()}
                        cells.append(" / ".join(f"{found[batch]['speedup']:.2f}" for batch in BATCHES))
                table.append(cells)
    header = ["network", "feature map", "layout"]
    header += [f"{direction}, {allocator}" for allocator in finished(rows) for direction in DIRECTIONS]
    return markdown_table(header, table)


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--allocator", choices=list(ALLOCATORS), help=argparse.SUPPRESS)  # the runs of this script
    arguments = parser.parse_args()
    code = code_version()
    path = RESULTS / "kernels.rows.jsonl"
    if arguments.allocator:
        measure_all(arguments.allocator, Rows(path, code))
        return
    Rows(path, code, fresh=arguments.fresh)
    for allocator, variables in ALLOCATORS.items():
        print(f"allocator: {allocator}", file=sys.stderr)
        subprocess.run(
            [sys.executable, __file__, "--allocator", allocator], env={**os.environ, **variables}, check=True
        )
        report(path, code)


def report(path: Path, code: str) -> None:
    """Write the tables of the allocators that are measured, so that an interrupted run leaves one."""
    rows = list(Rows(path, code).rows.values())
    done = finished(rows)
    rows = [row for row in rows if row["allocator"] in done]
    backend = ops.backend_report()
    known = {key: value for key, value in backend.to_dict().items() if key != "path"}  # a place on this machine
    data = {**environment(code), "backend": known, "threads": THREADS, "rows": rows}
    title = f"GroupNorm + activation on the CPU against the best eager form ({backend.isa}, {THREADS} threads)"
    missing = [f"Not measured yet: the {allocator} allocator.\n" for allocator in ALLOCATORS if allocator not in done]
    by_map = "\nSpeed-ups by feature map, at N = 1 / 2 / 8:\n\n" + details(rows)
    write("kernels", title, "\n".join([summary(rows), *missing]) + by_map, data)


if __name__ == "__main__":
    main()
