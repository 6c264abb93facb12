"""The tables and figures of `small_batch.py`.

Intervals: 95 %, from a bootstrap over seeds and test photos at once (2000 times). Seeds alone would leave out that the
test photos are few; photos alone, that training is a matter of luck. With two or three seeds the part of the seeds
comes out too small, whatever one does. Differences are paired: the same seed, and so the same photos in the same order,
and the same test photos.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import _elpv
import numpy as np
from _elpv import NEUTRAL, SHIFTS
from _report import RESULTS, Row, Rows, environment, markdown_table, write
from _small_batch_nets import LIGHT_BATCHES, METHODS, REFERENCE_BATCH, Setting, learning_rate
from _small_batch_speed import as_table as speed_table
from numpy.typing import NDArray

RESAMPLES = 2000
OURS = tuple(method for method in METHODS if method.startswith("gnswap"))
TINY = (1, 2)

Hits = dict[int, NDArray[np.float64]]  # for each seed, 1 or 0 for each test photo
Runs = Mapping[tuple[str, int], list[Row]]


def hits(runs: list[Row]) -> Hits:
    """Which test photos each run had right."""
    bits = {row["seed"]: (np.frombuffer(bytes.fromhex(row["hits"]), np.uint8), row["photos"]) for row in runs}
    return {seed: np.unpackbits(packed, count=photos).astype(np.float64) for seed, (packed, photos) in bits.items()}


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean and 95 % interval of values `[seeds, photos]`, both resampled with replacement."""
    draw = np.random.default_rng(0)
    seeds, photos = values.shape
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    of_photos = draw.multinomial(photos, np.full(photos, 1 / photos), RESAMPLES) / photos
    means = ((of_photos @ values.T) * of_seeds).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def difference(one: Hits, other: Hits) -> tuple[float, float, float]:
    """Mean and interval of the accuracy of `one` less that of `other`, over the seeds that both have."""
    return interval(np.stack([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]))


def grouped(rows: Rows, setting: Setting) -> dict[tuple[str, int], list[Row]]:
    """The finished runs of a setting by method and batch size."""
    runs: dict[tuple[str, int], list[Row]] = {}
    for key, row in rows.rows.items():
        if key.startswith(f"{setting}: ") and row["kind"] == "run":
            runs.setdefault((row["method"], row["batch"]), []).append(row)
    return runs


def _said(found: tuple[float, float, float], sign: str = "") -> str:
    middle, low, high = (f"{100 * value:{sign}.1f}" for value in found)
    return f"{middle} ({low} to {high})"


def _table(header: list[str], cells: list[list[str]]) -> str:
    """The rows in which anything was measured; nothing where there are none."""
    found = [row for row in cells if any(cell != "–" for cell in row[1:])]
    return markdown_table(header, found) if found else ""


def accuracies(runs: Runs, batches: list[int]) -> str:
    """Accuracy of every method at every batch size, and how far it varies over the batch sizes."""
    cells = []
    for method in METHODS:
        cell, means = [method], []
        for batch in batches:
            if (method, batch) not in runs:
                cell.append("–")
                continue
            found = interval(np.stack(list(hits(runs[method, batch]).values())))
            cell.append(_said(found))
            means.append(found[0])
        spread = f"{100 * (max(means) - min(means)):.1f}" if len(means) == len(batches) else "–"
        cells.append([*cell, spread])
    return _table(["accuracy [%]", *(f"batch {batch}" for batch in batches), "varies by"], cells)


def means(runs: Runs, batches: list[int], key: str, name: str) -> str:
    """Another figure of every method at every batch size: the mean over the seeds."""
    cells = [
        [
            method,
            *(
                f"{np.mean([row[key] for row in runs[method, batch]]):.3f}" if (method, batch) in runs else "–"
                for batch in batches
            ),
        ]
        for method in METHODS
    ]
    return _table([name, *(f"batch {batch}" for batch in batches)], cells)


def differences(runs: Runs) -> str:
    """Points of accuracy that each gnswap method is above each other method at the tiny batch sizes."""
    others = [method for method in METHODS if method not in OURS]
    cells = []
    for batch in TINY:
        for ours in OURS:
            cell = [f"{ours}, batch {batch}"]
            for other in others:
                pair = [hits(runs.get((method, batch), [])) for method in (ours, other)]
                cell.append(_said(difference(*pair), "+") if pair[0].keys() & pair[1].keys() else "–")
            cells.append(cell)
    return _table(["points above", *others], cells)


def search_table(rows: Rows, setting: Setting) -> str:
    """Area under the ROC curve on the validation photos by learning rate, which was chosen by it."""
    found: dict[str, dict[float, float]] = {}
    for key, row in rows.rows.items():
        if key.startswith(f"{setting}: ") and row["kind"] == "search":
            found.setdefault(row["method"], {})[row["lr"]] = row["auc"]
    rates = sorted({rate for one in found.values() for rate in one})
    cells = [[method, *(f"{one[rate]:.3f}" if rate in one else "–" for rate in rates)] for method, one in found.items()]
    header = f"search at batch {REFERENCE_BATCH}: area under the curve, validation"
    return _table([header, *(f"rate {rate:g}" for rate in rates)], cells)


def light_of(runs: Runs, method: str, batch: int) -> dict[str, dict[float, float]] | None:
    """Mean accuracy by change and strength, the unchanged photos among them; None where nothing is measured."""
    if (method, batch) not in runs:
        return None
    found = [row["light"] for row in runs[method, batch]]
    plain = float(np.mean([one["none"]["0"] for one in found]))
    return {
        shift: {NEUTRAL[shift]: plain} | {s: float(np.mean([one[shift][f"{s:g}"] for one in found])) for s in strengths}
        for shift, strengths in SHIFTS.items()
    }


def light_table(runs: Runs) -> str:
    """Accuracy under other light, mean over the seeds."""
    cells = []
    for batch in LIGHT_BATCHES:
        for method in METHODS:
            light = light_of(runs, method, batch)
            if light is not None:
                plain = light["contrast"][NEUTRAL["contrast"]]
                changed = [light[shift][strength] for shift, strengths in SHIFTS.items() for strength in strengths]
                shown = [plain, *changed, sum(changed) / len(changed)]
                cells.append([f"{method}, batch {batch}", *(f"{100 * value:.1f}" for value in shown)])
    header = [f"{shift} {strength:g}" for shift, strengths in SHIFTS.items() for strength in strengths]
    return _table(["accuracy [%], photos changed", "as they are", *header, "mean of the changed"], cells)


def draw_error(runs: Runs, batches: list[int], path: Path) -> None:
    """Error against batch size, as Wu & He, *Group Normalization* (2018), figure 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(METHODS):
        points = [batch for batch in batches if (method, batch) in runs]
        if not points:
            continue
        found = [interval(np.stack(list(hits(runs[method, batch]).values()))) for batch in points]
        middle = [100 * (1 - mean) for mean, _, _ in found]
        reach = [[100 * (high - mean) for mean, _, high in found], [100 * (mean - low) for mean, low, _ in found]]
        moved = [batch * 2 ** (0.03 * (number - len(METHODS) / 2)) for batch in points]  # whiskers side by side
        style = "-" if method in OURS else "--"
        axes.errorbar(moved, middle, yerr=reach, fmt=f"o{style}", markersize=4, capsize=2, lw=1.2, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="batch size (the same number of photos seen)", ylabel="test error [%]")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def draw_light(runs: Runs, path: Path) -> None:
    """Accuracy against the strength of each change, a row of panels for each batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    units = {"contrast": "contrast, times", "brightness": "brightness, added", "exposure": "exposure, stops"}
    panels = figure.subplots(len(LIGHT_BATCHES), len(SHIFTS), sharey=True, squeeze=False)
    for line, batch in zip(panels, LIGHT_BATCHES, strict=True):
        for axes, shift in zip(line, SHIFTS, strict=True):
            for method in METHODS:
                light = light_of(runs, method, batch)
                if light is not None:
                    style = "-" if method in OURS else "--"
                    axes.plot(*zip(*sorted(light[shift].items()), strict=True), f"o{style}", markersize=3, label=method)
            axes.set(xlabel=units[shift], title=f"trained at batch {batch}")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("test accuracy")
    drawn = next((axes for axes in panels.flat if axes.lines), None)
    if drawn is not None:
        figure.legend(*drawn.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)


def write_all(rows: Rows, setting: Setting, arguments: argparse.Namespace) -> None:
    """Write the tables, the figures and the data of one setting."""
    runs = grouped(rows, setting)
    batches = sorted(arguments.batches)
    rates = {method: found[0]["lr"] / learning_rate(1.0, batch) for (method, batch), found in runs.items()}
    counts = [len(found) for found in runs.values()]
    seeds = " to ".join(str(count) for count in sorted({min(counts, default=0), max(counts, default=0)}))
    labels = _elpv.split(_elpv.load(setting.pixels, arguments.cache))[2].labels[: setting.judges]
    majority = 100 * max(float((labels == label).double().mean()) for label in (0, 1))
    said = (
        f"{setting.pixels} px, {setting.samples} photos seen in every run, seeds in a cell: {seeds}, {len(runs)} of "
        f"{len(METHODS) * len(batches)} cells measured. Intervals are 95 %, over seeds and the {setting.judges} test "
        f"photos. Always the same answer has {majority:.1f} %. Learning rates at batch {REFERENCE_BATCH}: "
        + "; ".join(f"{method}: {rates[method]:g}" for method in METHODS if method in rates)
        + ".\n"
    )
    tables = [
        said,
        accuracies(runs, batches),
        differences(runs),
        means(runs, batches, "auc", "area under the ROC curve"),
        means(runs, batches, "balanced_accuracy", "balanced accuracy"),
        light_table(runs),
        search_table(rows, setting),
        speed_table(rows, setting),
    ]
    data = {
        **environment(rows.code, "elpv-dataset"),
        "rows": [row for key, row in rows.rows.items() if key.startswith(f"{setting}: ")],
    }
    title = "Fine-tuning EfficientNet-Lite0 on ELPV with tiny batches"
    write("small_batch", title, "\n".join(table for table in tables if table), data, quiet=arguments.what == "train")
    if not runs:
        return
    draw_error(runs, batches, RESULTS / "small_batch.png")
    draw_light(runs, RESULTS / "small_batch_light.png")
