"""The charts of the report as PNG, for papers and slides."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from gnswap._matplotlib import require_figure
from gnswap._report.charts import spread_stages
from gnswap._report.levers import PLACES
from gnswap._report.records import FidelityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("report-stages.png", "report-layers.png", "report-spread.png", "report-photos.png")
"""All files that `figures` may make; those that nothing was measured for are left out."""

_COLOURS = ("#c63d2f", "#c07a00", "#7a52c7", "#1f6fb8", "#1d8a55", "#8a6d1f", "#b02a75")  # those of the page in light
_DPI = 160


def figures(report: FidelityReport) -> dict[str, bytes]:
    """The figures as PNG files, by name.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure_class = require_figure()
    made = {}
    wanted = {
        NAMES[0]: (_stages, bool(report.stages), 6.4, 0.8 + 0.4 * len(report.stages), 1.3),
        NAMES[1]: (_layers, bool(report.stages), 8.0, 3.6, 0.8),
        NAMES[2]: (_spread, any(layer.spreads for layer in report.layers), 8.0, 3.6, 0.8),
        NAMES[3]: (_photos, bool(report.answers.distance), 4.2, 4.0, 0.8),
    }
    for name, (draw, there, width, height, left) in wanted.items():
        if there:
            figure = figure_class(figsize=(width, height), dpi=_DPI)
            # margins in inches; matplotlib's own layouts draw everything twice
            figure.subplots_adjust(left / width, 0.6 / height, 1 - 0.15 / width, 1 - 0.15 / height)
            draw(report, figure.subplots())
            made[name] = _png(figure)
    return made


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _stages(report: FidelityReport, axes: Axes) -> None:
    names = [stage.name for stage in report.stages]
    if report.agreement_interval is None:
        values, whiskers = [_plottable(stage.fidelity.logit_error) for stage in report.stages], None
        axes.set_xlabel("relative error of the outputs")
    else:
        values = [stage.fidelity.agreement or 0.0 for stage in report.stages]
        edges = [stage.interval or (0.0, 0.0) for stage in report.stages]
        pairs = list(zip(values, edges, strict=True))
        whiskers = [[value - low for value, (low, _) in pairs], [high - value for value, (_, high) in pairs]]
        axes.set_xlabel(f"share of {report.photos} photos with the original's class, 95 % interval")
        axes.set_xlim(0, 1)
    axes.barh(names, values, xerr=whiskers, color=[_colour(name) for name in names], capsize=3, height=0.6)
    axes.invert_yaxis()


def _layers(report: FidelityReport, axes: Axes) -> None:
    places = {layer.name: place for place, layer in enumerate(report.layers)}
    for stage in report.stages:
        errors = [(places[error.name], _plottable(error.relative_error)) for error in stage.fidelity.layers]
        axes.plot(
            *zip(*errors, strict=True), ".-", color=_colour(stage.name), linewidth=1, markersize=4, label=stage.name
        )
    _logarithmic(axes)
    axes.set_xlabel("layer, in the order of the network")
    axes.set_ylabel("relative error of the output")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", ncols=3)


def _spread(report: FidelityReport, axes: Axes) -> None:
    for stage in spread_stages(report):
        rows = [
            (place, spread.variance)
            for place, layer in enumerate(report.layers)
            for spread in layer.spreads
            if spread.stage == stage
        ]
        x = [place for place, _ in rows]
        low, middle, high = ([values[at] for _, values in rows] for at in (0, 2, 4))
        axes.fill_between(x, low, high, color=_colour(stage), alpha=0.22, linewidth=0)
        axes.plot(x, middle, color=_colour(stage), linewidth=1.2, label=stage)
    _logarithmic(axes)
    axes.axhline(1, color="black", linewidth=0.7, linestyle="--")
    axes.set_xlabel("layer, in the order of the network")
    axes.set_ylabel("variance divided by, over BatchNorm's")
    axes.legend(fontsize="small", ncols=3)


def _photos(report: FidelityReport, axes: Axes) -> None:
    answers = report.answers
    if not answers.same:
        axes.plot(sorted(map(_plottable, answers.distance)), ".", color=_COLOURS[3])
        _logarithmic(axes)
        axes.set_xlabel("photos, best first")
        axes.set_ylabel("relative error of the output")
        return
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle="--")
    for wanted, colour, label in ((True, _COLOURS[3], "same class"), (False, _COLOURS[0], "another class")):
        rows = zip(answers.probability_original, answers.probability_converted, answers.same, strict=True)
        points = [(before, after) for before, after, same in rows if same is wanted]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=14, alpha=0.75, color=colour, linewidths=0, label=label)
    axes.set_xlabel("probability of the original's class, original")
    axes.set_ylabel("converted")
    axes.set_aspect("equal")
    axes.legend(fontsize="small")


def _logarithmic(axes: Axes) -> None:
    """Round numbers at 1, 2 and 5 in place of powers, which are unreadable within one decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _colour(stage: str) -> str:
    return _COLOURS[PLACES[stage]]


def _plottable(value: float) -> float:
    return value if math.isfinite(value) and value > 0 else math.nan
