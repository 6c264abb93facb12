"""What each lever of the conversion keeps of a pretrained network: groups, softness, photos, corrections. No training.

    pip install -e '.[dev]' && pip install --no-deps opacus==1.6.0
    python examples/benchmarks/fidelity.py          # hours on two cores; what is measured is in the table at any time

Networks: EfficientNet-Lite0 and Lite1 with their ImageNet weights, and a harder one that is trained here first, in four
to six minutes: a MobileNetV2 for photos of clothes, with dead channels (`_clothes.py`). Photos: the 279 of
`data_free.py`, shuffled once; 96 of them judge and are never chosen on, the plan sees 0, 16, 64 or all other 183,
without labels. Of the clothes, 2000 judge.

Rows are stored as they are measured, the ones that say most first, so the script can be stopped at any time and goes
on where it was. The sweep takes longer than the code stands still: every row says which commit measured it, and rows of
earlier commits stay until `--fresh`. A plan with photos gives three rows: with order and signs alone, with all that the
photos chose, and with the weights refitted to the photos beside; the seconds are those to plan, and of a refit its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import _clothes
import torch
from _report import RESULTS, Rows, code_version, environment, markdown_table, version_of, write
from data_free import MODELS, Recorded, by_opacus_unfused, load_photos
from photos import CACHE, photos
from torch import Tensor, nn

import gnswap
from gnswap import _baselines

NETWORKS = (*MODELS, _clothes.NAME)
JUDGES, CLOTHES_JUDGES = 96, 2000
PHOTOS = (16, 64, 183)
GROUPINGS: tuple[dict[str, Any], ...] = (
    {"groups": "auto"},
    *({"groups": groups} for groups in (8, 32, 1, 16)),
    *({"group_size": size} for size in (32, 16, 8)),
)
SOFTNESS = (0.0, 1.0, 0.3, 4.0)
TARGETS = (0.9, 0.97)
LOOSEST = 32.0  # softness that a target may cost
BASELINES = {
    "naive copy of gamma and beta, 32 groups": _baselines.naive_group_norm,
    "fresh GroupNorm, 32 groups": _baselines.fresh_group_norm,
    "opacus ModuleValidator.fix, activations taken apart first": by_opacus_unfused,
}


# for the figure of the README: the cell, the levers, the colour
WAYS = {
    "gamma and beta copied": ("naive copy of gamma and beta, 32 groups", "–", "tab:red"),
    "fresh GroupNorm": ("fresh GroupNorm, 32 groups", "–", "tab:orange"),
    "gnswap, pure, no photos": ("groups=auto, softness=0.0; 0 photos", "all", "#c6dbef"),
    "gnswap, pure, 64 photos": ("groups=auto, softness=0.0; 64 photos", "all", "#6baed6"),
    "the same, refitted": ("groups=auto, softness=0.0; 64 photos", "refitted", "#2171b5"),
    "gnswap, softness 1, 64 photos": ("groups=auto, softness=1.0; 64 photos", "all", "#a1d99b"),
    "gnswap, told to keep .97": (f"groups=auto, fidelity=0.97, max_softness={LOOSEST}; 64 photos", "all", "#31a354"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One plan: the options, how many photos it sees; or one of the baselines."""

    photos: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    baseline: str | None = None

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.options)
        return self.baseline or f"{said}; {self.photos} photos"


def cells() -> list[Cell]:
    """All that is measured, the most telling first."""

    def plans(count: int, groupings: tuple[dict[str, Any], ...], softness: tuple[float, ...]) -> list[Cell]:
        return [
            Cell(count, tuple({**grouping, "softness": value}.items())) for value in softness for grouping in groupings
        ]

    def targets(count: int) -> list[Cell]:
        return [Cell(count, (("groups", "auto"), ("fidelity", t), ("max_softness", LOOSEST))) for t in TARGETS]

    first = [*(Cell(baseline=name) for name in BASELINES), *plans(0, GROUPINGS[:3], (0.0, 1.0))]
    first += plans(64, GROUPINGS[:3], (0.0, 1.0)) + targets(64) + plans(183, GROUPINGS[:3], (0.0, 1.0))
    rest = [cell for count in (0, *PHOTOS) for cell in plans(count, GROUPINGS, SOFTNESS)]
    return list(dict.fromkeys([*first, *rest, *(cell for count in PHOTOS for cell in targets(count))]))


class Bench:
    """One network with its photos."""

    def __init__(self, name: str, cache: Path) -> None:
        if name == _clothes.NAME:
            self.model, count = _clothes.network(cache), CLOTHES_JUDGES
            inputs = _clothes.enlarged(_clothes.inputs(cache)[: count + max(PHOTOS)])
        else:
            self.model, count = MODELS[name](), JUDGES
            inputs = torch.cat([batch for batch, _ in load_photos(self.model, photos(cache))])
            inputs = inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))]
        self.judges = list(inputs[:count].split(16))
        self.others = inputs[count:]
        self.answers = Recorded(self.model, self.judges)

    def rows(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """What a cell measures: a row for each set of levers."""
        start = time.perf_counter()
        if cell.baseline is not None:
            return {"–": {"fidelity": self.fidelity(BASELINES[cell.baseline](self.model))}}
        with warnings.catch_warnings():
            # narrow layers cannot have 32 groups, some targets are out of reach: that is what the table says
            warnings.filterwarnings("ignore", category=UserWarning, module="__main__")
            chosen_on: list[Tensor] | None = list(self.others[: cell.photos].split(16)) if cell.photos else None
            plan = gnswap.plan(self.model, **dict(cell.options), calibration=chosen_on)
        seconds = time.perf_counter() - start
        softness = [decision.softness for decision in plan.swaps]
        rows = {}
        for levers, strip in {"order and signs": {"gain": None, "offset": None}, "all": {}, "refitted": {}}.items():
            if cell.photos == 0 and levers != "all":
                continue
            converted = gnswap.apply(self.model, plan.edit("*", **strip) if strip else plan)
            more = {}
            if levers == "refitted":
                assert chosen_on is not None
                start = time.perf_counter()
                more["refit"] = gnswap.refit(converted, self.model, chosen_on).to_dict()
                seconds = time.perf_counter() - start
            rows[levers] = {
                **more,
                "fidelity": self.fidelity(converted),
                "notes": list(plan.notes),
                "seconds": seconds,
                "softness": sum(softness) / len(softness),
                "one_group": sum(decision.num_groups == 1 for decision in plan.swaps),
            }
        return rows

    def fidelity(self, converted: nn.Module) -> dict[str, Any]:
        return gnswap.compare(self.answers, converted, self.judges, layers=False).to_dict()


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    cells = []
    for row in rows:
        fidelity = row["fidelity"]
        shares = [
            "–" if fidelity[key] is None else f"{fidelity[key]:.3f}" for key in ("agreement", "agreement_sure", "kl")
        ]
        spent = [f"{row['softness']:.2f}", f"{row['seconds']:.0f}"] if "seconds" in row else ["–", "–"]
        cells.append([row["model"], row["cell"], row["levers"], *shares, *spent, row["code"]])
    header = ["network", "conversion", "levers", "agreement", "where sure", "KL", "mean softness", "seconds", "gnswap"]
    return markdown_table(header, cells)


def by_depth(rows: list[dict[str, Any]]) -> str:
    """What limits a conversion: the squared error of a layer's output by depth, and what a refit can do about it.

    The error of the layers between the norms, relative to the variance of the original's output and without what the
    norm behind takes away, layer by layer on what the refitted layers in front give; and the share of it that a fit on
    half of the photos takes away on the others.
    """
    cells = []
    for row in rows:
        if "refit" in row:
            layers = row["refit"]["layers"]
            parts = [layers[len(layers) * i // 3 : len(layers) * (i + 1) // 3] for i in range(3)]
            means = [
                " / ".join(f"{sum(layer[key] for layer in part) / len(part):.2f}" for key in ("error", "gain"))
                for part in parts
            ]
            cells.append([row["model"], row["cell"], *means])
    header = ["error of a layer / share a refit takes away", "conversion", "first third", "second", "last"]
    return markdown_table(header, cells) if cells else ""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Agreement against the number of photos: a column for each network, a row for each softness, lines for groups."""
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["levers"] == "all":
            said, _, count = row["cell"].rpartition("; ")
            groups, _, rest = said.partition(", ")
            panel, line = (rest, groups) if "fidelity" not in rest else ("a stated target", rest.split(",")[0])
            points = lines.setdefault((row["model"], panel), {}).setdefault(line, {})
            points[int(count.split()[0])] = row["fidelity"]["agreement"]
    panels = sorted({panel for _, panel in lines}, key=lambda panel: (not panel.startswith("softness"), panel))
    ticks = (0, *PHOTOS)
    figure = Figure(figsize=(14, 2.6 * len(panels) + 1), layout="constrained")
    grid = figure.subplots(len(panels), len(NETWORKS), sharex=True, sharey="col", squeeze=False)
    names = sorted({line for found in lines.values() for line in found}, key=lambda line: (line[0] == "f", line))
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    drawn: dict[str, Any] = {}
    for panel, some in zip(panels, grid, strict=True):
        for model, axes in zip(NETWORKS, some, strict=True):
            for line, points in sorted(lines.get((model, panel), {}).items()):
                places = [ticks.index(count) if count in ticks else len(ticks) for count in sorted(points)]
                agreements = [points[count] for count in sorted(points)]
                (drawn[line],) = axes.plot(places, agreements, marker="o", markersize=4, color=colours[line])
            axes.set(xticks=range(len(ticks)), xticklabels=ticks)
            axes.set_title(f"{model}, {panel}", fontsize="medium")
            axes.grid(alpha=0.3)
        some[0].set_ylabel("agreement")
    for axes in grid[-1]:
        axes.set_xlabel("photos that the plan saw")
    figure.legend([drawn[name] for name in names], names, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=100)


def draw_ways(rows: list[dict[str, Any]], path: Path) -> None:
    """Agreement of the swaps that everybody tries first, and of groups that gnswap chose, as bars for each network."""
    from matplotlib.figure import Figure

    found = {(row["model"], row["cell"], row["levers"]): row["fidelity"]["agreement"] for row in rows}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    share = 0.8 / len(WAYS)
    for place, (title, (cell, levers, colour)) in enumerate(WAYS.items()):
        heights = [found.get((model, cell, levers), math.nan) for model in NETWORKS]
        at = [network + (place - (len(WAYS) - 1) / 2) * share for network in range(len(NETWORKS))]
        bars = axes.bar(at, heights, share, label=title, color=colour)
        axes.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=6)
    axes.set_xticks(range(len(NETWORKS)), NETWORKS)
    axes.set_ylabel("same top-1 answer as the original")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def report(rows: Rows) -> None:
    """Write the table and the figures of what is there."""
    places = {str(cell): place for place, cell in enumerate(cells())}
    measured = sorted(rows.rows.values(), key=lambda row: (places[row["cell"]], row["model"]))
    data = {**environment(version_of(measured), "opacus"), "rows": measured}
    count = len(NETWORKS) * len(cells())
    done = len({(row["model"], row["cell"]) for row in measured})
    judges = f"{JUDGES} photos that no choice saw, {CLOTHES_JUDGES} for {_clothes.NAME}"
    title = f"What each lever keeps ({judges}; {done} of {count} cells measured)"
    write("fidelity", title, "\n".join([as_table(measured), by_depth(measured)]), data, quiet=True)
    draw(measured, RESULTS / "fidelity.png")
    draw_ways(measured, RESULTS / "fidelity_ways.png")


def main() -> None:
    """Measure what is missing; after each cell the table says all that is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the photos are kept (%(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cells to measure, as in 'lite0.*; 183 photos'")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the table of what is there")
    arguments = parser.parse_args()
    if importlib.util.find_spec("opacus") is None:
        sys.exit("Opacus is compared with here: pip install --no-deps opacus==1.6.0")
    code = code_version()
    rows = Rows(RESULTS / "fidelity.rows.jsonl", code, fresh=arguments.fresh, any_code=True)
    if arguments.report:
        report(rows)
        return
    benches: dict[str, Bench] = {}
    for cell in cells():
        for name in NETWORKS:
            if any(key.startswith(f"{name}: {cell}: ") for key in rows.rows):
                continue
            if not re.search(arguments.only, f"{name}: {cell}"):
                continue
            if name not in benches:
                benches[name] = Bench(name, arguments.cache)
            print(f"{name}: {cell}", file=sys.stderr)
            for levers, row in benches[name].rows(cell).items():
                rows.add(f"{name}: {cell}: {levers}", {"model": name, "cell": str(cell), "levers": levers, **row})
            report(rows)


if __name__ == "__main__":
    main()
