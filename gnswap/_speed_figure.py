"""A benchmark as a picture: latencies side by side, and what the time goes to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gnswap._matplotlib import require_figure, write_png
from gnswap._speed import PARTS, Benchmark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#1f6fb8", "#c63d2f", "#1d8a55", "#c07a00", "#8a8a8a")  # one for each of PARTS


def draw(benchmark: Benchmark, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG: on the left median and 95th percentile, on the right the profile's parts.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StoreError: the file cannot be written.
    """
    figure = require_figure()(figsize=(10, 1.6 + 0.55 * len(benchmark.files)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _latency(benchmark, left)
    _parts(benchmark, right)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False)
    shapes = ", ".join(benchmark.input_shapes)
    figure.suptitle(f"onnxruntime {benchmark.versions['onnxruntime']}, {benchmark.provider}, input {shapes}")
    write_png(figure, path)


def _labels(benchmark: Benchmark) -> list[str]:
    return [f"{file.name}\n{file.p50_ms:.3g} ms" for file in benchmark.files]


def _latency(benchmark: Benchmark, axes: Axes) -> None:
    names = _labels(benchmark)
    medians = [file.p50_ms for file in benchmark.files]
    above = [file.p95_ms - file.p50_ms for file in benchmark.files]
    axes.barh(names, medians, xerr=[[0.0] * len(names), above], color="#7a52c7", capsize=3, height=0.6)
    axes.invert_yaxis()
    axes.set_xlabel("ms a run: median, whisker to the 95th percentile")


def _parts(benchmark: Benchmark, axes: Axes) -> None:
    names = _labels(benchmark)
    starts = [0.0] * len(names)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        widths = [file.parts.get(part, 0.0) for file in benchmark.files]
        axes.barh(names, widths, left=starts, color=colour, label=part, height=0.6)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_xlabel("ms a run by kind of work (onnxruntime's profile)")
