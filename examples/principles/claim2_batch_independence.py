r"""Claim 2. A sample's GroupNorm has the same bits in a batch of any size, in train() and in eval().

BatchNorm in train() computes a sample's output from its companions as well, so another batch gives another output.

    GroupNorm: m, v over D channels and S positions of one sample
    BatchNorm in train(): m, v over S positions of all N samples

    python examples/principles/claim2_batch_independence.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import _common
import torch
from torch import Tensor, nn

import gnswap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (6.4, 3.6)
LAYER = "blocks.1.0.bn2"


class Row(NamedTuple):
    """How far one sample's output is from what it is alone, over several draws of its companions."""

    batch: int
    batchnorm: tuple[float, ...]  # relative, in train()
    groupnorm: tuple[float, ...]
    other_bits: int  # values of GroupNorm's outputs that differ in any bit, in all draws, in train() and eval()


def measure(smoke: bool) -> list[Row]:
    network, photos = _common.photos(8 if smoke else 28)
    x = _common.input_of(network, LAYER, photos)
    batchnorm = _common.plain_norm(network.get_submodule(LAYER)).train()
    groupnorm = gnswap.convert(nn.Sequential(_common.plain_norm(batchnorm)), groups=8, softness=0).model
    with torch.no_grad():
        alone = [norm(x[:1]) for norm in (batchnorm, groupnorm)]
        rows = []
        for batch in (1, 2, 4, 8) if smoke else (1, 2, 4, 8, 16, 28):
            draws = [torch.cat([torch.zeros(1).long(), 1 + torch.randperm(len(x) - 1)[: batch - 1]]) for _ in range(8)]
            outputs = [(batchnorm(x[draw])[:1], groupnorm.train()(x[draw])[:1], groupnorm.eval()(x[draw])[:1])
                       for draw in draws]  # fmt: skip
            rows.append(
                Row(
                    batch,
                    tuple(_common.relative(other - alone[0], alone[0]) for other, _, _ in outputs),
                    tuple(_common.relative(other - alone[1], alone[1]) for _, other, _ in outputs),
                    sum(other_bits(alone[1], other) for _, *both in outputs for other in both),
                )
            )
    return rows


def other_bits(one: Tensor, other: Tensor) -> int:
    return int((one.view(torch.int32) != other.view(torch.int32)).sum())


def table(rows: list[Row]) -> _common.Table:
    columns = ("BatchNorm, train(): median", "most", "GroupNorm: most", "values with other bits")
    body = [
        (
            f"{row.batch}",
            f"{sorted(row.batchnorm)[len(row.batchnorm) // 2]:.4f}",
            f"{max(row.batchnorm):.4f}",
            f"{max(row.groupnorm):g}",
            str(row.other_bits),
        )
        for row in rows
    ]
    return _common.Table("batch size; change of one sample's output", columns, body)


def draw(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    batches = [row.batch for row in rows]
    for name, colour, values in (
        ("BatchNorm in train()", _common.BATCHNORM, [sorted(row.batchnorm) for row in rows]),
        ("GroupNorm, train() or eval(): the same bits", _common.GNSWAP, [sorted(row.groupnorm) for row in rows]),
    ):
        axes.fill_between(
            batches, [v[0] for v in values], [v[-1] for v in values], color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(batches, [v[len(v) // 2] for v in values], "o-", color=colour, label=name)
    _common.powers_of_two(axes, batches, "photos in the batch (8 draws of companions: median and range)")
    axes.set_ylabel("change of one photo's output,\nrelative to the photo alone (rms)")
    _common.legend(figure, axes, 2)


def check(rows: list[Row]) -> None:
    for row in rows:
        assert row.other_bits == 0, (
            f"{row.other_bits} values of GroupNorm's output have other bits in a batch of {row.batch}"
        )
        if row.batch > 1:
            assert min(row.batchnorm) > 1e-3, f"BatchNorm does not depend on its batch of {row.batch}"


if __name__ == "__main__":
    _common.run(__name__)
