"""An explanation as a picture: a network's layers side by side, or one layer's channels and groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gnswap._explanation import Explanation, LayerSquash
from gnswap._matplotlib import require_figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of Okabe & Ito's palette, which stays readable in every kind of colour blindness
_NAIVE, _PLANNED, _QUIET = "#d55e00", "#0072b2", "#999999"
_LEAST = 1e-3  # share of BatchNorm's scale below which a channel is drawn at the bottom


def draw(explanation: Explanation, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StoreError: the file cannot be written.
    """
    figure = require_figure()(figsize=(10, 6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    what = f"{explanation.model.rpartition('.')[2]}: gamma and beta copied into GroupNorm"
    if len(explanation.layers) == 1:
        layer = explanation.layers[0]
        figure.suptitle(f"{what}({layer.num_groups}), layer {layer.name}", fontsize="medium")
        _sizes(layer, upper)
        _factors(layer, lower)
    else:
        basis = f"on {explanation.samples} photos" if explanation.samples else "by the running statistics"
        figure.suptitle(f"{what}({explanation.groups}), {basis}", fontsize="medium")
        _spread(explanation, upper)
        _errors(explanation, lower)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    write_png(figure, path)


def _sizes(layer: LayerSquash, axes: Axes) -> None:
    """What each channel is like, and what its group divides it by."""
    channels = range(layer.num_channels)
    away = [abs(layer.mean[channel] - group.mean) for group in layer.groups for channel in group.channels]
    axes.plot(channels, layer.deviation, ".", color="black", markersize=4, label="standard deviation of the channel")
    axes.plot(channels, away, "x", color=_QUIET, markersize=4, label="distance of its mean from the group's")
    for number, group in enumerate(layer.groups):
        edges = [group.channels[0] - 0.5, group.channels[-1] + 0.5]
        label = "what the naive group divides by" if number == 0 else None
        axes.plot(edges, [group.deviation] * 2, color=_NAIVE, linewidth=2, label=label)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 * min(layer.deviation))  # distances of nearly nothing say nothing
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("units of the layer's input")
    _legend(axes)


def _factors(layer: LayerSquash, axes: Axes) -> None:
    """What each channel keeps of the scale that BatchNorm gives it."""
    dead = set(layer.dead)
    for kind, values, colour in (("naive", layer.factor, _NAIVE), ("gnswap", layer.factor_after, _PLANNED)):
        x = [channel for channel in range(layer.num_channels) if channel not in dead]
        y = [max(values[channel], _LEAST) for channel in x]
        axes.plot(x, y, ".", color=colour, markersize=5, label=f"{kind}, live channels")
    if dead:
        y = [max(layer.factor[channel], _LEAST) for channel in sorted(dead)]
        axes.plot(sorted(dead), y, ".", color=_QUIET, markersize=4, label="naive, dead in BatchNorm too")
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    _shares(axes)
    axes.set_xlabel("channel; an orange bar above spans a group")
    _legend(axes)


def _spread(explanation: Explanation, axes: Axes) -> None:
    """What the live channels of each layer keep: all of them, the middle half, the median."""
    for kind, colour in (("naive", _NAIVE), ("gnswap", _PLANNED)):
        rows = []
        for place, layer in enumerate(explanation.layers):
            values = layer.factor if kind == "naive" else layer.factor_after
            if kept := sorted(max(values[channel], _LEAST) for channel in layer.live):
                rows.append((place, *(kept[round(q * (len(kept) - 1))] for q in (0, 0.25, 0.5, 0.75, 1))))
        places, least, low, middle, high, most = ([row[column] for row in rows] for column in range(6))
        axes.fill_between(places, least, most, color=colour, alpha=0.15, linewidth=0, label=f"{kind}, all channels")
        axes.fill_between(places, low, high, color=colour, alpha=0.35, linewidth=0, label=f"{kind}, half of them")
        axes.plot(places, middle, ".-", color=colour, linewidth=1.2, markersize=4, label=f"{kind}, median")
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    _shares(axes)
    _legend(axes)


def _errors(explanation: Explanation, axes: Axes) -> None:
    places = range(len(explanation.layers))
    axes.plot(places, [layer.error for layer in explanation.layers], ".-", color=_NAIVE, label="naive")
    after = [layer.error_after for layer in explanation.layers]
    axes.plot(places, after, ".-", color=_PLANNED, label="gnswap")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("error of the layer's output,\nrelative to BatchNorm's")
    axes.set_xlabel("layer, in the order of the network")
    _legend(axes)


def _shares(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("kept of BatchNorm's scale\n(1 is all of it)")


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides no channel."""
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2)
