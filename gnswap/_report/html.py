"""The report as one page: it fetches nothing, follows the reader's light or dark, and reads on a phone."""

from __future__ import annotations

import importlib.resources
import json
import math
from typing import Any

from gnswap._report import charts
from gnswap._report.levers import PLACES
from gnswap._report.records import FidelityReport, Stage
from gnswap._report.svg import short

_WIDE, _NARROW = 960, 350  # pixels of the two forms of every chart


def page(report: FidelityReport) -> str:
    """The whole page. Equal reports give equal text."""
    import jinja2  # late, as everything that only a report needs
    import markupsafe

    def text(name: str) -> str:
        return importlib.resources.files("gnswap._report").joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short
    plain = markupsafe.Markup
    classes = report.agreement_interval is not None
    return environment.from_string(text("page.html.j2")).render(
        report=report,
        places=PLACES,
        spread_stages=charts.spread_stages(report),
        css=plain(text("page.css")),
        script=plain(text("page.js")),
        data=plain(_json(report)),
        charts={name: [plain(form) for form in forms] for name, forms in _charts(report).items()},
        classes=classes,
        cards=_cards(report),
        said=_said(report),
        caution=_caution(report),
        options=[(name, _option(value)) for name, value in report.options.items() if value not in (None, {}, [], ())],
        errors={layer.name: layer.relative_error for layer in report.fidelity.layers} if report.fidelity else {},
        stage_heads=["same class", "where sure", "KL", "output error"] if classes else ["output error"],
        stage_rows=[_row(stage, classes) for stage in report.stages],
    )


def _charts(report: FidelityReport) -> dict[str, list[str]]:
    makers = {
        "stages": (charts.stages_chart, bool(report.stages)),
        "errors": (charts.errors_chart, bool(report.stages)),
        "spread": (charts.spread_chart, bool(report.layers)),
        "shift": (charts.shift_chart, bool(report.stages) and any(layer.spreads for layer in report.layers)),
        "loudness": (charts.loudness_chart, bool(report.layers)),
        "photos": (charts.photos_chart, bool(report.answers.distance)),
        "confidence": (charts.confidence_chart, bool(report.answers.same)),
    }
    return {
        name: [make(report, width) for width in (_WIDE, _NARROW)] if wanted else []
        for name, (make, wanted) in makers.items()
    }


def _cards(report: FidelityReport) -> list[tuple[str, str]]:
    fidelity = report.fidelity
    if fidelity is None:
        spoken = [layer.loud_to_quiet for layer in report.layers if layer.loud_to_quiet is not None]
        found = [(str(report.swapped), "norm layers swapped"), ("none", "photos, so nothing was measured")]
        if spoken:
            found.append(
                (f"{short(max(spoken))} ×", "loudest over quietest channel of a group in the naive copy's worst layer")
            )
        return found
    found = []
    if fidelity.agreement is not None:
        found.append((f"{fidelity.agreement:.1%}", f"keep their class ({_range(report.agreement_interval)})"))
    if fidelity.agreement_sure is not None:
        text = f"where the original is sure: {fidelity.sure} photos ({_range(report.agreement_sure_interval)})"
        found.append((f"{fidelity.agreement_sure:.1%}", text))
    if fidelity.kl is not None:
        found.append((f"{fidelity.kl:.3f}", "KL(original ‖ converted), nats"))
    found.append((short(fidelity.logit_error), "relative error of the outputs"))
    found.append((str(fidelity.photos), "photos"))
    if fidelity.accuracy_original is not None and fidelity.accuracy_converted is not None:
        text = f"accuracy; the original: {fidelity.accuracy_original:.1%} ({fidelity.labelled} labelled)"
        found.append((f"{fidelity.accuracy_converted:.1%}", text))
    return found


def _range(interval: tuple[float, ...] | None) -> str:
    assert interval is not None
    return f"95\u00a0%: {interval[0]:.0%} to {interval[1]:.0%}"


def _said(report: FidelityReport) -> list[str]:
    fidelity = report.fidelity
    if fidelity is None:
        return [
            "There were no photos, so nothing is known about this network's answers. Below is what the weights alone "
            "say: how different the channels are that a group puts together."
        ]
    first = report.stages[0].fidelity
    if fidelity.agreement is None:
        return [
            f"The outputs differ from the original's by {short(fidelity.logit_error)} (relative error). For the naive "
            f"copy of gamma and beta it is {short(first.logit_error)}."
        ]
    kept, naive = (round((found.agreement or 0) * found.photos) for found in (fidelity, first))
    return [
        f"Of {fidelity.photos} photos, {kept} keep the class that the original finds most probable. The naive copy of "
        f"gamma and beta keeps {naive}."
    ]


def _caution(report: FidelityReport) -> str | None:
    calibrated = bool(report.options.get("calibrated"))
    if not report.photos or report.held_out or (report.held_out is None and not calibrated):
        return None
    if report.held_out is None:
        return "The plan was chosen on photos. If these are among them, the figures are a little too good."
    return (
        "These photos also chose the plan, so the figures are a little too good. The notes say what was judged on "
        "photos held out; for an unbiased figure, measure on photos that took no part."
    )


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _row(stage: Stage, classes: bool) -> list[str]:
    fidelity = stage.fidelity
    if not classes:
        return [stage.name, stage.what, short(fidelity.logit_error)]
    sure = "–" if fidelity.agreement_sure is None else f"{fidelity.agreement_sure:.1%}"
    kl = "–" if fidelity.kl is None else f"{fidelity.kl:.3f}"
    return [stage.name, stage.what, f"{fidelity.agreement or 0:.1%}", sure, kl, short(fidelity.logit_error)]


def _json(report: FidelityReport) -> str:
    """What the page's script draws from."""
    stages = [(stage.name, {e.name: e.relative_error for e in stage.fidelity.layers}) for stage in report.stages]
    layers: list[dict[str, Any]] = []
    for layer in report.layers:
        spreads = {spread.stage: spread for spread in layer.spreads}
        names = [name for name, _ in stages] or list(spreads)
        errors = {name: found.get(layer.name) for name, found in stages}
        layers.append(
            {
                "name": layer.name,
                "channels": layer.num_channels,
                "groups": layer.num_groups,
                "softness": layer.softness,
                "reason": layer.reason,
                "deviation": layer.deviation,
                "order": layer.channel_order,
                "signs": layer.signs,
                "stages": [
                    {
                        "name": name,
                        "error": _finite(errors.get(name)),
                        "variance": [_finite(value) for value in spreads[name].variance] if name in spreads else None,
                        "shift": _finite(spreads[name].shift) if name in spreads else None,
                    }
                    for name in names
                ],
            }
        )
    text = json.dumps({"layers": layers, "start": _most_to_see(report)}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")  # so that no name can end the script element


def _most_to_see(report: FidelityReport) -> int:
    """The layer that is shown first: channels moved, several groups, loud and quiet ones among them."""

    def worth(place: int) -> tuple[bool, bool, float]:
        layer = report.layers[place]
        return layer.channel_order is not None, layer.num_groups > 1, layer.loud_to_quiet or 1.0

    return max(range(len(report.layers)), key=worth, default=0)


def _finite(value: float | None) -> float | None:
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
