r"""Claim 4. A group that mixes a loud channel and a quiet one squashes the quiet one; standardising repairs it.

Of what BatchNorm would give it, channel c keeps the factor k_c, with sigma_c^2 = var_c + eps and the group's variance

    k_c = sigma_c / sqrt(v_g + eps),   v_g = mean of var_c over the group + variance of the means mu_c over the group

Reordering puts like beside like: alone it repairs made-up groups, after standardising it lowers what error is left.

    python examples/principles/claim4_loud_and_quiet.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import _common
import torch
from torch import Tensor, nn

import gnswap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (10, 4.2)
EPS = 1e-5
NAIVE, SORTED = "gamma, beta copied", "copied, channels sorted by loudness"
STANDARDISED, ORDERED = "standardised", "standardised and ordered on other photos"
COLOURS = {
    NAIVE: _common.NAIVE,
    SORTED: _common.YELLOW,
    STANDARDISED: _common.GNSWAP,
    ORDERED: _common.OTHER,
}


class Made(NamedTuple):
    """Groups of a quiet and a loud channel: how much the quiet one keeps."""

    ratio: float  # standard deviation of the loud channel over that of the quiet one
    formula: float
    kept: dict[str, float]


class Real(NamedTuple):
    """One way to have GroupNorm in a real layer, on photos that had no part in it."""

    error: float  # of the output, relative
    predicted: float  # median factor by `gnswap.explain`, from the running statistics
    kept: tuple[float, ...]  # factor of every live channel, ascending


class Found(NamedTuple):
    layer: str
    groups: int
    made: list[Made]
    real: dict[str, Real]


def measure(smoke: bool) -> Found:
    made = [_made_up(10 ** (exponent / 4)) for exponent in range(0, 13, 4 if smoke else 1)]
    network, photos = _common.photos(20 if smoke else 28)
    worst = gnswap.explain(network).ranked[0]
    x = _common.input_of(network, worst.name, photos)
    norm = _common.plain_norm(network.get_submodule(worst.name))
    model, live = nn.Sequential(norm), torch.tensor(worst.live)
    choosing, judging = x[::2], x[1::2]
    plan = gnswap.plan(model, groups=worst.num_groups, softness=0, order="natural")
    photos_say = gnswap.calibrate(model, [choosing])
    ordered = gnswap.plan(model, groups=worst.num_groups, softness=0, calibration=photos_say).edit("0", gain=None)
    louder = tuple(torch.tensor(worst.deviation).argsort().tolist())
    plans = {
        NAIVE: plan.edit("0", standardise=False),
        SORTED: plan.edit("0", standardise=False, channel_order=louder),
        STANDARDISED: plan,
        ORDERED: ordered,
    }
    real = {}
    with torch.no_grad():
        nominal = norm(judging)
        for name, way in plans.items():
            y = gnswap.apply(model, way)(judging)
            predicted = torch.tensor(gnswap.explain(model, plan=way).layers[0].factor_after)[live].median()
            kept = _factor(nominal, y)[live].sort().values
            real[name] = Real(_common.relative(y - nominal, nominal - norm.bias[:, None, None]), float(predicted),
                              tuple(kept.tolist()))  # fmt: skip
    return Found(worst.name, worst.num_groups, made, real)


def _made_up(ratio: float) -> Made:
    """Channels quiet, loud, quiet, loud in two groups; the order 0, 2, 1, 3 puts equals together."""
    size = torch.tensor([1.0, ratio, 1.0, ratio])
    x = torch.randn(8, 4, 64, 64) * size[:, None, None]
    norm = nn.BatchNorm2d(4, EPS).eval()
    with torch.no_grad():
        norm.running_var.copy_(size.square())  # type: ignore[union-attr]
        plan = gnswap.plan(norm, overrides={"(root)": {"groups": 2, "softness": 0}})
        ways = {
            NAIVE: plan.edit("(root)", standardise=False),
            SORTED: plan.edit("(root)", standardise=False, channel_order=(0, 2, 1, 3)),
            STANDARDISED: plan,
        }
        kept = {name: float(_factor(norm(x), gnswap.apply(norm, way)(x))[0]) for name, way in ways.items()}
    return Made(ratio, math.sqrt((1 + EPS) / ((1 + ratio**2) / 2 + EPS)), kept)


def _factor(before: Tensor, after: Tensor) -> Tensor:
    """How much every channel keeps, by regression within each sample on what BatchNorm gives: `[C]`."""
    a, b = (y.double().flatten(2) for y in (before, after))
    a = a - a.mean(2, keepdim=True)
    return (a * b).sum((0, 2)) / a.square().sum((0, 2))


def table(found: Found) -> _common.Table:
    body = [
        (
            f"made up: a channel {row.ratio:.4g} times louder, {name}",
            "-",
            "-" if name != NAIVE else f"{row.formula:.4f}",
            f"{kept:.4f}",
            "-",
        )
        for row in found.made[:: max(1, len(found.made) // 3)]
        for name, kept in row.kept.items()
    ]
    body += [
        (
            f"{found.layer}, {found.groups} groups: {name}",
            f"{row.error:.3f}",
            f"{row.predicted:.3f}",
            f"{_at(row.kept, 0.5):.3f}",
            f"{_at(row.kept, 0.05):.3f} to {_at(row.kept, 0.95):.3f}",
        )
        for name, row in found.real.items()
    ]
    return _common.Table("what a channel keeps", ("error of output", "predicted", "median", "5 to 95 %"), body)


def _at(values: tuple[float, ...], share: float) -> float:
    return values[round(share * (len(values) - 1))]


def draw(found: Found, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    ratios = [row.ratio for row in found.made]
    left.plot(ratios, [row.formula for row in found.made], "--", color=_common.BLACK, linewidth=1)
    for name in (NAIVE, SORTED, STANDARDISED):
        marker = "s" if name == SORTED else "o"
        left.plot(
            ratios,
            [row.kept[name] for row in found.made],
            marker,
            color=COLOURS[name],
            markersize=8 - 3 * (name == STANDARDISED),
        )
    left.text(ratios[-1] / 30, found.made[-1].formula, "line: formula", ha="right", va="bottom")
    left.set_title("made up: a quiet channel beside a loud one", fontsize="medium")
    left.set_xlabel("standard deviation, loud over quiet")
    left.set_ylabel("what the quiet channel keeps\nof BatchNorm's scale (1 is all)")
    left.set_xscale("log")
    _common.round_numbers(left.xaxis)
    for name, row in found.real.items():
        shares = [100 * (place + 0.5) / len(row.kept) for place in range(len(row.kept))]
        right.plot(shares, row.kept, color=COLOURS[name], linewidth=2, label=f"{name} (error {row.error:.2f})")
    right.axhline(1, color=_common.BLACK, linewidth=0.8, linestyle="--")
    right.set_title(f"EfficientNet-Lite0, {found.layer}, real photos", fontsize="medium")
    right.set_xlabel("live channels, quietest first, %")
    right.set_ylabel("what each channel keeps")
    for axes in (left, right):
        axes.set_yscale("log")
        _common.round_numbers(axes.yaxis)
    _common.legend(figure, right, 2)


def check(found: Found) -> None:
    for row in found.made:
        assert abs(row.kept[NAIVE] / row.formula - 1) < 0.02, f"ratio {row.ratio:.3g}: not what the formula says"
        for name in (SORTED, STANDARDISED):
            assert abs(row.kept[name] - 1) < 0.02, f"ratio {row.ratio:.3g}: {name} leaves {row.kept[name]:.3f}"
    naive, standardised, ordered = (found.real[name] for name in (NAIVE, STANDARDISED, ORDERED))
    assert abs(_at(naive.kept, 0.5) / naive.predicted - 1) < 0.25, "explain's prediction is off on the real layer"
    assert _at(naive.kept, 0.5) < 0.7, "the copy squashes nothing in the real layer"
    assert 0.8 < _at(standardised.kept, 0.5) < 1.25, "standardising does not repair the median channel"
    assert naive.error > 2 * standardised.error, "standardising does not repair the real layer's output"
    assert ordered.error < standardised.error, "reordering on other photos lowers no error"


if __name__ == "__main__":
    _common.run(__name__)
