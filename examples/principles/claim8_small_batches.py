r"""Claim 8. Fine-tuned at batch size m, BatchNorm's test error rises as m shrinks, and GroupNorm's does not.

Every run sees as many photos, in the same order (so a larger batch takes fewer steps, whichever the norm), and the rise
is paired, photo by photo and seed by seed:

    rise = mean of [wrong at m = 1] - [wrong at m = 16],   +- 1.96 standard errors over photos and seeds

The runs take hours and are those of the small-batch benchmark. Where its rows are not there, make them:

    python examples/benchmarks/small_batch.py --evening   # an hour and a half on two cores

    python examples/principles/claim8_small_batches.py
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import _common
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (6.8, 4.4)
ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "small_batch.rows.jsonl"
COMMAND = "python examples/benchmarks/small_batch.py --evening"
BATCHNORM, GROUPNORM = "BatchNorm", "gnswap, pure"
SMALL, LARGE = 1, 16  # the ends of the claim; fewer batch sizes would be another one
FLAT = 0.02  # a rise that is surely below two points of error counts as none
LEAST_PHOTOS = 100  # judged in a run; the benchmark's own --smoke has 24, which say nothing
COLOURS = {
    BATCHNORM: _common.BATCHNORM,
    GROUPNORM: _common.GNSWAP,
    "gnswap": _common.OTHER,
    "naive GroupNorm": _common.NAIVE,
    "BatchNorm, frozen": _common.YELLOW,
}
STYLES = {BATCHNORM: "o-", GROUPNORM: "o-", "gnswap": "s--", "naive GroupNorm": "^:", "BatchNorm, frozen": "v--"}

Wrong = dict[int, dict[int, np.ndarray]]  # batch size, seed: 1 where a test photo was told wrongly


class Rise(NamedTuple):
    """Of the error, from the largest batch size to the smallest."""

    mean: float
    low: float
    high: float


class Found(NamedTuple):
    setting: str
    seeds: int
    error: dict[str, dict[int, float]]  # by method and batch size
    rises: dict[str, Rise]  # of the two that the claim is about, and of the first less the second


def measure(smoke: bool) -> Found:  # noqa: ARG001 - reading is fast
    runs = _runs()
    error = {
        method: {batch: float(np.mean(list(seeds.values()))) for batch, seeds in sorted(wrong.items())}
        for method, wrong in runs.methods.items()
    }
    both = [runs.methods.get(method, {}) for method in (BATCHNORM, GROUPNORM)]
    seeds = sorted(set.intersection(*(set(wrong.get(batch, {})) for wrong in both for batch in (SMALL, LARGE))))
    if not seeds:
        raise SystemExit(
            f"{ROWS} has no seed yet with {BATCHNORM} and {GROUPNORM} at batch {SMALL} and {LARGE}. Go on: {COMMAND}"
        )
    bn, gn = (np.stack([wrong[SMALL][seed] - wrong[LARGE][seed] for seed in seeds]) for wrong in both)
    names = (f"{BATCHNORM}, {LARGE} to {SMALL}", f"{GROUPNORM}, {LARGE} to {SMALL}", "the first less the second")
    rises = {name: _rise(values) for name, values in zip(names, (bn, gn, bn - gn), strict=True)}
    return Found(runs.setting, len(seeds), error, rises)


class _Runs(NamedTuple):
    setting: str
    methods: dict[str, Wrong]


def _runs() -> _Runs:
    """The finished runs of the setting with the most photos judged."""
    rows: list[dict[str, Any]] = []
    for line in ROWS.read_text().splitlines() if ROWS.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the benchmark is writing it
    settings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "run" and row["photos"] >= LEAST_PHOTOS:
            settings[row["key"].split(": ")[0]].append(row)
    if not settings:
        raise SystemExit(f"There are no runs in {ROWS}. Make them (an hour or two): {COMMAND}")
    setting = max(settings, key=lambda name: sum(row["photos"] for row in settings[name]))
    methods: dict[str, Wrong] = defaultdict(lambda: defaultdict(dict))
    for row in settings[setting]:
        right = np.unpackbits(np.frombuffer(bytes.fromhex(row["hits"]), np.uint8), count=row["photos"])
        methods[row["method"]][row["batch"]][row["seed"]] = 1.0 - right
    return _Runs(setting, methods)


def _rise(values: np.ndarray) -> Rise:
    """Mean and 95 % interval of values `[seeds, photos]`; seeds add their own part where there are several."""
    seeds, photos = values.shape
    variance = float(values.mean(0).var(ddof=1)) / photos
    if seeds > 1:
        variance += float(values.mean(1).var(ddof=1)) / seeds
    middle, reach = float(values.mean()), 1.96 * math.sqrt(variance)
    return Rise(middle, middle - reach, middle + reach)


def table(found: Found) -> _common.Table:
    batches = sorted({batch for errors in found.error.values() for batch in errors})
    body = [
        (method, *(f"{100 * errors[batch]:.1f}" if batch in errors else "-" for batch in batches), "")
        for method, errors in found.error.items()
    ]
    body += [
        (
            f"rise, {name}",
            *("" for _ in batches),
            f"{100 * rise.mean:+.1f} ({100 * rise.low:+.1f} to {100 * rise.high:+.1f})",
        )
        for name, rise in found.rises.items()
    ]
    title = f"test error, % ({found.setting}, {found.seeds} seeds in the rises)"
    return _common.Table(title, (*(f"batch {batch}" for batch in batches), "points (95 %)"), body)


def draw(found: Found, figure: Figure) -> None:
    axes = figure.subplots()
    for method, style in STYLES.items():
        if errors := found.error.get(method):
            main = method in (BATCHNORM, GROUPNORM)
            axes.plot(list(errors), [100 * error for error in errors.values()], style, color=COLOURS[method],
                      linewidth=2 if main else 1, markersize=6 if main else 4, label=method)  # fmt: skip
    _common.powers_of_two(axes, sorted({b for errors in found.error.values() for b in errors}), "batch size, m")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("test error, %")
    axes.set_title(f"fine-tuning EfficientNet-Lite0 on ELPV\n{found.setting}", fontsize="small")
    _common.legend(figure, axes, 3)


def check(found: Found) -> None:
    """Each part of the claim against its interval; what the rows do not show is not claimed."""
    batchnorm, groupnorm, less = found.rises.values()
    says = [
        (batchnorm.low > 0, f"BatchNorm's error rises: {_points(batchnorm)}"),
        (groupnorm.high < FLAT, f"GroupNorm's does not, or by under {100 * FLAT:g} points: {_points(groupnorm)}"),
        (less.low > 0, f"BatchNorm's rises more: {_points(less)}"),
    ]
    for holds, what in says:
        print("shown:    " if holds else "NOT SHOWN:", what)
    missing = "; ".join(what for holds, what in says if not holds)
    assert not missing, f"the rows do not support the claim ({found.setting}): not shown is: {missing}"


def _points(rise: Rise) -> str:
    return f"{100 * rise.mean:+.1f} points (95 %: {100 * rise.low:+.1f} to {100 * rise.high:+.1f})"


if __name__ == "__main__":
    _common.run(__name__)
