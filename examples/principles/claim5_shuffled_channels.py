r"""Claim 5. Shuffling channels changes GroupNorm's output unless the shuffle keeps the groups; BatchNorm's never.

With a permutation P of the channels that takes the parameters along, undone behind the norm,

    P^-1 BN(P x) = BN(x) always,   P^-1 GN(P x) = GN(x) if and only if P maps groups onto groups, for x in general

and standardised channels are so alike that even a shuffle across groups changes little.

    python examples/principles/claim5_shuffled_channels.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import _common
import torch
from torch import Tensor, nn

import gnswap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (6.8, 4.2)
LAYER, GROUPS = "blocks.2.0.bn2", 8
NAMES = ("BatchNorm, eval()", "BatchNorm, train()", "GroupNorm, gamma and beta copied", "GroupNorm, standardised")


class Row(NamedTuple):
    """How much the output of each of NAMES changes, relative (rms)."""

    shuffle: str
    exchanged: int | None  # pairs of channels exchanged between groups; None: the groups are kept
    change: tuple[float, ...]


def measure(smoke: bool) -> list[Row]:
    network, photos = _common.photos(2 if smoke else 8)
    x = _common.input_of(network, LAYER, photos)
    norm = _common.plain_norm(network.get_submodule(LAYER))
    channels = norm.num_features
    size = channels // GROUPS
    natural = torch.arange(channels)
    within = torch.cat([group[torch.randperm(size)] for group in natural.view(GROUPS, size)])
    rows = [
        _row("within groups", None, within, x, norm),
        _row("whole groups", None, natural.view(GROUPS, size)[torch.randperm(GROUPS)].flatten(), x, norm),
    ]
    for pairs in (1, 72) if smoke else (1, 2, 4, 8, 16, 36, 72):
        order = natural.clone()
        # channel i of an even group with channel i of the odd group behind it
        even = natural.view(GROUPS // 2, 2, size)[:, 0].flatten()[torch.randperm(channels // 2)[:pairs]]
        order[even], order[even + size] = even + size, even
        if pairs == channels // 2:
            order = torch.randperm(channels)
        rows.append(_row("at random" if pairs == channels // 2 else "across groups", pairs, order, x, norm))
    return rows


def _row(shuffle: str, exchanged: int | None, order: Tensor, x: Tensor, norm: nn.BatchNorm2d) -> Row:
    back = order.argsort()
    shuffled = _common.plain_norm(norm)
    shuffled.load_state_dict({name: value[order] if value.ndim else value for name, value in norm.state_dict().items()})
    changes = []
    with torch.no_grad():
        for ours, other in zip(_ways(norm), _ways(shuffled), strict=True):
            y = ours(x)
            changes.append(_common.relative(other(x[:, order])[:, back] - y, y))
    return Row(shuffle, exchanged, tuple(changes))


def _ways(norm: nn.BatchNorm2d) -> list[nn.Module]:
    """The same layer as each of NAMES."""
    plan = gnswap.plan(norm, groups=GROUPS, softness=0)
    copied = plan.edit("(root)", standardise=False)
    return [norm, _common.plain_norm(norm).train(), gnswap.apply(norm, copied), gnswap.apply(norm, plan)]


def table(rows: list[Row]) -> _common.Table:
    body = [
        (
            row.shuffle
            if row.exchanged is None or row.shuffle == "at random"
            else f"{row.exchanged} pairs {row.shuffle}",
            *("the same bits" if change == 0 else f"{change:.1e}" for change in row.change),
        )
        for row in rows
    ]
    return _common.Table("shuffle; change of the output", NAMES, body)


def draw(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    floor = 1e-9
    places = range(len(rows))
    looks = ((_common.BATCHNORM, "s-"), (_common.BATCHNORM, "x:"), (_common.NAIVE, "o-"), (_common.GNSWAP, "o-"))
    for column, (name, (colour, style)) in enumerate(zip(NAMES, looks, strict=True)):
        axes.plot(places, [max(row.change[column], floor) for row in rows], style, color=colour, label=name, mfc="none")
    axes.axvline(1.5, color=_common.BLACK, linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    ticks = [10.0**power for power in range(-9, 1, 3)]
    axes.set_yticks(ticks, ["the same\nbits", "$10^{-6}$", "$10^{-3}$", "1"])
    axes.set_ylim(floor / 3, 3)
    axes.text(0.5, 2e-5, "groups\nkept", ha="center")
    axes.text((len(rows) + 1) / 2, 2e-5, "groups mixed", ha="center")
    labels = {None: "", 1: "1 pair"}
    axes.set_xticks(
        places,
        [
            row.shuffle.replace(" ", "\n") if row.exchanged is None or row.shuffle == "at random"
            else labels.get(row.exchanged, str(row.exchanged))
            for row in rows
        ],
    )  # fmt: skip
    axes.set_xlabel("shuffle: within or of whole groups; pairs of channels exchanged; all at random")
    axes.set_ylabel("change of the output, relative (rms)")
    _common.legend(figure, axes, 2)


def check(rows: list[Row]) -> None:
    for row in rows:
        evaluated, trained, copied, standardised = row.change
        assert evaluated == 0, f"{row.shuffle}: BatchNorm in eval() is off by {evaluated:.1e}"
        assert trained < 1e-6, f"{row.shuffle}: BatchNorm in train() is off by {trained:.1e}"
        for change in (copied, standardised):
            if row.exchanged is None:
                assert change < 1e-6, f"{row.shuffle}: GroupNorm is off by {change:.1e} though the groups are kept"
            else:
                assert change > 1e-3, f"{row.shuffle}: mixing groups changed GroupNorm by {change:.1e} only"
        if row.exchanged is not None:
            assert standardised < copied, f"{row.shuffle}: standardised channels are no more alike"


if __name__ == "__main__":
    _common.run(__name__)
