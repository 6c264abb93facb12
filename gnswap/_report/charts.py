"""The charts of the report as SVG, each in any width, so that a phone gets its own and not a shrunken one.

The levers' colours are the classes s0, s1, ... of the page's style sheet. An element with data-layer is a layer's
column: a click on it selects the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gnswap._report.levers import PLACES
from gnswap._report.records import FidelityReport
from gnswap._report.svg import Axis, Picture, path, short

_LEFT, _RIGHT, _BOTTOM = 46, 10, 34


def stages_chart(report: FidelityReport, width: int) -> str:
    """The final answers at every stage: agreement with its confidence interval, or the error of the outputs."""
    row, left, top = 46, 12, 22
    picture = Picture(width, top + row * len(report.stages) + 24, "The answers at every stage")
    classes = report.agreement_interval is not None
    errors = [stage.fidelity.logit_error for stage in report.stages]
    if classes:
        x = Axis(0, 1, left, width - 62)
    else:
        x = Axis(0, max((error for error in errors if math.isfinite(error)), default=1.0) or 1.0, left, width - 62)
    bottom = top + row * len(report.stages) + 2
    for tick in x.ticks():
        picture.add("line", x1=x(tick), x2=x(tick), y1=top - 8, y2=bottom, class_="grid")
        label = f"{tick:.0%}" if classes else short(tick)
        picture.add("text", label, x=x(tick), y=bottom + 14, class_="tick middle")
    for index, stage in enumerate(report.stages):
        y = top + row * index
        value = (stage.fidelity.agreement or 0.0) if classes else errors[index]
        picture.add("text", stage.name, x=left, y=y + 8, class_="name")
        picture.add(
            "rect", title=f"{stage.name}: {stage.what}", x=left, y=y + 14, width=max(x(value) - left, 1), height=16,
            class_=f"bar s{PLACES[stage.name]}",
        )  # fmt: skip
        edge = x(value)
        if stage.interval is not None:
            low, edge = (x(end) for end in stage.interval)
            picture.add("path", d=f"M{low:.1f} {y + 22}H{edge:.1f}M{low:.1f} {y + 18}v8M{edge:.1f} {y + 18}v8",
                        class_="whisker")  # fmt: skip
        text = f"{value:.1%}" if classes else short(value)
        picture.add("text", text, x=edge + 6, y=y + 27, class_="value")
    return str(picture)


def errors_chart(report: FidelityReport, width: int) -> str:
    """The relative error of every layer's output, a line for each stage."""
    series = {
        stage.name: {layer.name: layer.relative_error for layer in stage.fidelity.layers} for stage in report.stages
    }
    return _lines(report, width, 300, "The relative error of every layer's output at every stage", series)


def shift_chart(report: FidelityReport, width: int) -> str:
    """How far the mean that every layer subtracts is from BatchNorm's, a line for each stage."""
    series: dict[str, dict[str, float]] = {stage: {} for stage in spread_stages(report)}
    for layer in report.layers:
        for spread in layer.spreads:
            series[spread.stage][layer.name] = spread.shift
    return _lines(report, width, 230, "How far the mean that every layer subtracts is from BatchNorm's", series)


def _lines(report: FidelityReport, width: int, height: int, label: str, series: dict[str, dict[str, float]]) -> str:
    """Positive values of every layer, logarithmic, a line for each stage."""
    top, bottom = 12, height - _BOTTOM
    names = [layer.name for layer in report.layers]
    picture = Picture(width, height, label)
    values = [value for found in series.values() for value in found.values() if value > 0]
    y = Axis.decades(values, bottom, top, least=1e-3, most=100)
    x = _layers_axis(names, width)
    _frame(picture, y, width, top, bottom)
    _layer_ticks(picture, x, len(names), bottom, "layer, in the order of the network")
    for stage, found in series.items():
        kind = f"s{PLACES[stage]}"
        points = [
            (x(place), y(found[name])) if found.get(name, math.nan) > 0 else None for place, name in enumerate(names)
        ]
        picture.add("path", d=path(points), class_=f"line {kind}")
        for point in points:
            if point is not None:
                picture.add("circle", cx=point[0], cy=point[1], r=2.2, class_=f"dot {kind}")
    for place, name in enumerate(names):
        lines = [f"{stage}: {short(found[name])}" for stage, found in series.items() if name in found]
        _column(picture, x, place, "\n".join([name, *lines]), top, bottom)
    return str(picture)


def spread_stages(report: FidelityReport) -> list[str]:
    """The stages that change what a layer divides by and subtracts."""
    return list(dict.fromkeys(spread.stage for layer in report.layers for spread in layer.spreads))


def spread_chart(report: FidelityReport, width: int) -> str:
    """What every layer divides by at every stage, relative to BatchNorm's variance: a panel for each stage."""
    names = [layer.name for layer in report.layers]
    stages = spread_stages(report)
    found = {(layer.name, spread.stage): spread.variance for layer in report.layers for spread in layer.spreads}
    panel, gap, top = 110, 30, 24
    height = top + len(stages) * (panel + gap) + _BOTTOM - gap
    picture = Picture(width, height, "What every layer divides its channels by, relative to BatchNorm")
    values = [1.0, *(value for quantiles in found.values() for value in quantiles)]
    x = _layers_axis(names, width)
    for index, stage in enumerate(stages):
        start = top + index * (panel + gap)
        y = Axis.decades(values, start + panel, start, least=1e-4, most=1e6)
        _frame(picture, y, width, start, start + panel, ticks=4)
        picture.add("text", stage, x=_LEFT, y=start - 7, class_="name")
        picture.add("line", x1=_LEFT, x2=width - _RIGHT, y1=y(1), y2=y(1), class_="one")
        quantiles = [found.get((name, stage)) for name in names]
        for low, high, kind in ((0, 4, "outer"), (1, 3, "inner")):
            for run in _runs(quantiles):
                upper = [(x(place), y(values[high])) for place, values in run]
                lower = [(x(place), y(values[low])) for place, values in reversed(run)]
                if len(run) == 1:  # a band needs two layers: a lone one gets a bar
                    upper = [(upper[0][0] - 3, upper[0][1]), (upper[0][0] + 3, upper[0][1])]
                    lower = [(lower[0][0] + 3, lower[0][1]), (lower[0][0] - 3, lower[0][1])]
                picture.add("path", d=path(upper + lower) + "Z", class_=f"band {kind} s{PLACES[stage]}")
        middle = [None if values is None else (x(place), y(values[2])) for place, values in enumerate(quantiles)]
        picture.add("path", d=path(middle), class_=f"line s{PLACES[stage]}")
        for place, values_here in enumerate(quantiles):
            if values_here is not None:
                title = f"{names[place]}, {stage}: 5 to 95 % from {short(values_here[0])} to {short(values_here[4])}"
                _column(picture, x, place, title, start, start + panel)
    _layer_ticks(picture, x, len(names), height - _BOTTOM, "layer, in the order of the network")
    return str(picture)


def loudness_chart(report: FidelityReport, width: int) -> str:
    """How much louder the loudest channel is than the quietest in every layer's groups of neighbours."""
    height, top = 190, 12
    names = [layer.name for layer in report.layers]
    values = [layer.loud_to_quiet or 1.0 for layer in report.layers]
    picture = Picture(width, height, "The loudest over the quietest channel of a group, layer by layer")
    y = Axis.decades([1.0, *values], height - _BOTTOM, top, least=1, most=1e6)
    y = Axis(1.0, y.high, y.start, y.end, log=True)
    x = _layers_axis(names, width)
    _frame(picture, y, width, top, height - _BOTTOM)
    _layer_ticks(picture, x, len(names), height - _BOTTOM, "layer, in the order of the network")
    thick = min(12.0, 0.7 * (x(1) - x(0)))
    for place, layer in enumerate(report.layers):
        if layer.loud_to_quiet is not None:
            edge = y(layer.loud_to_quiet)
            picture.add(
                "rect", x=x(place) - thick / 2, y=edge, width=thick, height=max(y.start - edge, 1), class_="bar s0"
            )
            title = f"{layer.name}: the loudest channel of a group is {short(layer.loud_to_quiet)} times the quietest"
            _column(picture, x, place, title, top, height - _BOTTOM)
    return str(picture)


def photos_chart(report: FidelityReport, width: int) -> str:
    """Every photo: the probability of the original's class before and after, or the error of its output."""
    answers = report.answers
    if answers.same:
        return _probabilities(report, min(width, 420))
    height, top = 220, 12
    picture = Picture(width, height, "The error of every photo's output")
    ranked = sorted(answers.distance)
    y = Axis.decades(ranked, height - _BOTTOM, top, least=1e-4, most=1e4)
    x = Axis(0, max(len(ranked) - 1, 1), _LEFT + 6, width - _RIGHT - 6)
    _frame(picture, y, width, top, height - _BOTTOM)
    for place, value in enumerate(ranked):
        picture.add("circle", title=short(value), cx=x(place), cy=y(value), r=3, class_="photo same")
    picture.add("text", "photos, best first", x=(x.start + x.end) / 2, y=height - 6, class_="tick middle")
    return str(picture)


def _probabilities(report: FidelityReport, width: int) -> str:
    answers, top = report.answers, 10
    height = width - _LEFT + _BOTTOM + top + 4
    picture = Picture(width, height, "The probability of the original's class, before and after")
    x, y = Axis(0, 1, _LEFT, width - _RIGHT - 8), Axis(0, 1, height - _BOTTOM - 6, top)
    _frame(picture, y, width, top, height - _BOTTOM - 6, percent=True)
    picture.add("line", x1=x(0), y1=y(0), x2=x(1), y2=y(1), class_="one")
    for tick in x.ticks():
        picture.add("text", f"{tick:.0%}", x=x(tick), y=height - _BOTTOM + 10, class_="tick middle")
    picture.add("text", "original", x=(x.start + x.end) / 2, y=height - 6, class_="tick middle")
    turned = f"rotate(-90 12 {(y.start + y.end) / 2:.0f})"
    picture.add("text", "converted", x=12, y=(y.start + y.end) / 2, transform=turned, class_="tick middle")
    rows = zip(answers.probability_original, answers.probability_converted, answers.same, strict=True)
    for index, (before, after, same) in enumerate(rows):
        title = f"photo {index}: {before:.0%} → {after:.0%}, {'same class' if same else 'another class'}"
        kind = "photo same" if same else "photo other"
        picture.add("circle", title=title, cx=x(before), cy=y(after), r=4, class_=kind)
    return str(picture)


def confidence_chart(report: FidelityReport, width: int) -> str:
    """How many photos keep their class, by how sure the original is of them."""
    width, top, bins = min(width, 460), 24, 5
    height = 410 if width > 400 else 300
    answers = report.answers
    picture = Picture(width, height, "Photos with the same class, by how sure the original is")
    counts = [[0, 0] for _ in range(bins)]
    for probability, same in zip(answers.probability_original, answers.same, strict=True):
        counts[min(int(probability * bins), bins - 1)][int(same)] += 1
    x = Axis(0, bins, 8, width - 8)
    y = Axis(0, max(map(sum, counts)) or 1, height - _BOTTOM - 6, top)
    for place, (others, kept) in enumerate(counts):
        left, wide = x(place) + 8, x(1) - x(0) - 16
        for kind, low, high in (("same", 0, kept), ("other", kept, kept + others)):
            if high > low:
                picture.add("rect", x=left, y=y(high), width=wide, height=y(low) - y(high), class_=f"bar {kind}")
        middle = left + wide / 2
        if kept + others:
            picture.add("text", f"{kept} of {kept + others}", x=middle, y=y(kept + others) - 6, class_="middle")
        label = f"{place * 100 // bins}–{(place + 1) * 100 // bins}%"
        picture.add("text", label, x=middle, y=height - _BOTTOM + 10, class_="tick middle")
    picture.add("line", x1=x(0), x2=x(bins), y1=y(0), y2=y(0), class_="axis")
    picture.add("text", "probability that the original gives its class", x=width / 2, y=height - 6,
                class_="tick middle")  # fmt: skip
    return str(picture)


def _layers_axis(names: list[str], width: int) -> Axis:
    return Axis(-0.5, max(len(names), 1) - 0.5, _LEFT, width - _RIGHT)


def _frame(
    picture: Picture, y: Axis, width: int, top: float, bottom: float, *, ticks: int = 8, percent: bool = False
) -> None:
    for tick in y.ticks(ticks):
        picture.add("line", x1=_LEFT, x2=width - _RIGHT, y1=y(tick), y2=y(tick), class_="grid")
        label = f"{tick:.0%}" if percent else short(tick)
        picture.add("text", label, x=_LEFT - 6, y=y(tick) + 4, class_="tick end")
    picture.add("line", x1=_LEFT, x2=_LEFT, y1=top, y2=bottom, class_="axis")
    picture.add("line", x1=_LEFT, x2=width - _RIGHT, y1=bottom, y2=bottom, class_="axis")


def _layer_ticks(picture: Picture, x: Axis, layers: int, bottom: float, label: str) -> None:
    most = max(2, int((x.end - x.start) / 44))
    stride = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, layers) if layers / step <= most)
    for place in range(0, layers, stride):
        picture.add("text", str(place), x=x(place), y=bottom + 14, class_="tick middle")
    picture.add("text", label, x=(x.start + x.end) / 2, y=bottom + 29, class_="tick middle")


def _column(picture: Picture, x: Axis, place: int, title: str, top: float, bottom: float) -> None:
    """The part of a chart that belongs to one layer, for the pointer."""
    width = min(x(1) - x(0), 60.0)
    picture.add(
        "rect", title=title, x=x(place) - width / 2, y=top, width=width, height=bottom - top, class_="column",
        data_layer=str(place),
    )  # fmt: skip


def _runs(
    values: Iterable[tuple[float, ...] | None],
) -> list[list[tuple[int, tuple[float, ...]]]]:
    """Neighbouring layers that have values, with their places."""
    runs: list[list[tuple[int, tuple[float, ...]]]] = [[]]
    for place, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((place, value))
    return [run for run in runs if run]
