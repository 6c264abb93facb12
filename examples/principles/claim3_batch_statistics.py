r"""Claim 3. The error of BatchNorm's batch statistics grows as 1/m as the batch m shrinks; GroupNorm's depends on no m.

With deviations d_n of each sample's mean from the population's, a batch of m samples drawn at random has

    E (mu_batch - mu)^2 = Var_n(d_n) / m

and the gradient suffers too: averaged over all batches, GroupNorm's is that of the whole set at any m, with a noise
that falls as 1/m; BatchNorm's is the gradient of another function, the less like it the smaller m is.

    python examples/principles/claim3_batch_statistics.py
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, NamedTuple

import _common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gnswap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (10, 3.8)
DRAWS = 4096  # batches at every m, for the statistics
SAMPLES = 512  # in the batches at every m, for the outputs
BATCHES = (1, 2, 4, 8, 16, 32)


class Row(NamedTuple):
    """At one batch size, against the whole set; a pair is BatchNorm's, then GroupNorm's."""

    batch: int
    mean: float  # mean squared error of the batch's means, in units of the channels' variance
    formula: float  # what it should be: the variance of the samples' means, over m
    variance: float  # mean squared error of the batch's variances, relative
    output: tuple[float, float]  # mean squared error of the output, relative to BatchNorm's with the set's statistics
    spread: float  # the most that GroupNorm's output differs from that of the same samples in the whole set
    bias: tuple[float, float]  # of the mean gradient: distance from the whole set's, relative
    noise: tuple[float, float]  # of one batch's gradient: m times its variance, relative to the whole set's squared


def measure(smoke: bool) -> list[Row]:
    crops, labels, stem = _real_task(4 if smoke else 8)
    with torch.no_grad():
        x = stem(crops)
    batchnorm = nn.BatchNorm2d(x.shape[1], eps=1e-3).eval()
    with torch.no_grad():
        batchnorm.running_mean.copy_(x.mean((0, 2, 3)))  # type: ignore[union-attr]
        batchnorm.running_var.copy_(x.var((0, 2, 3), correction=0))  # type: ignore[union-attr]
    groupnorm = gnswap.convert(nn.Sequential(batchnorm), groups=8, softness=0).model
    head = nn.Linear(x.shape[1], int(labels.max()) + 1)
    networks = [nn.Sequential(copy.deepcopy(stem), norm, nn.ReLU()) for norm in (batchnorm.train(), groupnorm)]
    whole = [_gradient(network, head, crops, labels) for network in networks]
    sizes = (1, 4, 16) if smoke else BATCHES
    gradients = [[_gradients(network, head, crops, labels, m, 2) for network in networks] for m in sizes]
    return [
        Row(
            m,
            *_statistics(x, batchnorm.eps, m),
            *_outputs(x, batchnorm, groupnorm, m),
            *_bias_and_noise(found, whole, m),
        )
        for m, found in zip(sizes, gradients, strict=True)
    ]


def _real_task(crops_of_each: int) -> tuple[Tensor, Tensor, nn.Conv2d]:
    """Crops of 48 x 48 pixels, which photo each is of, and Lite0's first convolution with its ImageNet weights."""
    network, photos = _common.photos(28)
    places = torch.randint(0, photos.shape[-1] - 48, (crops_of_each, len(photos), 2)).tolist()
    crops = [photos[n, :, top : top + 48, left : left + 48] for row in places for n, (top, left) in enumerate(row)]
    stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
    stem.load_state_dict(network.get_submodule("conv_stem").state_dict())
    return torch.stack(crops), torch.arange(len(photos)).repeat(crops_of_each), stem


def _statistics(x: Tensor, eps: float, m: int) -> tuple[float, float, float]:
    """Errors of means and variances of batches of m, from the samples' own; channels dead in the set are left out."""
    first, second = x.double().mean((2, 3)), x.double().square().mean((2, 3))
    mean, var = first.mean(0), second.mean(0) - first.mean(0).square()
    live = var > eps
    draws = torch.randint(0, len(x), (DRAWS, m))
    batch_mean = first[draws].mean(1)
    batch_var = second[draws].mean(1) - batch_mean.square()
    off_mean, formula = (batch_mean - mean).square().mean(0) / var, first.var(0, correction=0) / var / m
    off_var = (batch_var / var - 1).square().mean(0)
    return tuple(float(errors[live].mean()) for errors in (off_mean, formula, off_var))  # type: ignore[return-value]


def _outputs(x: Tensor, batchnorm: nn.BatchNorm2d, groupnorm: nn.Module, m: int) -> tuple[tuple[float, float], float]:
    nominal = F.batch_norm(x, batchnorm.running_mean, batchnorm.running_var, eps=batchnorm.eps)
    with torch.no_grad():
        together = groupnorm(x)
        rows = []
        for draw in torch.randint(0, len(x), (SAMPLES // m, m)):
            of_batch, of_each = F.batch_norm(x[draw], None, None, training=True, eps=batchnorm.eps), groupnorm(x[draw])
            errors = [(y - nominal[draw]).square().mean() / nominal.square().mean() for y in (of_batch, of_each)]
            rows.append([*errors, (of_each - together[draw]).abs().max()])
    bn, gn, spread = torch.tensor(rows).unbind(1)
    return (float(bn.mean()), float(gn.mean())), float(spread.max())


def _gradient(network: nn.Sequential, head: nn.Linear, crops: Tensor, labels: Tensor) -> Tensor:
    """Of the cross-entropy, with respect to the convolution in front of the norm."""
    loss = F.cross_entropy(head(network(crops).mean((2, 3))), labels)
    return torch.autograd.grad(loss, network[0].weight)[0].flatten()


def _gradients(network: nn.Sequential, head: nn.Linear, crops: Tensor, labels: Tensor, m: int, rounds: int) -> Tensor:
    """One for each batch of m, `[B, P]`; every round divides the whole set into batches."""
    draws = [draw for _ in range(rounds) for draw in torch.randperm(len(crops)).split(m) if len(draw) == m]
    return torch.stack([_gradient(network, head, crops[draw], labels[draw]) for draw in draws])


def _bias_and_noise(
    found: list[Tensor], whole: list[Tensor], m: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    bias = tuple(float((g.mean(0) - w).norm() / w.norm()) for g, w in zip(found, whole, strict=True))
    noise = tuple(m * float(g.var(0).sum() / w.square().sum()) for g, w in zip(found, whole, strict=True))
    return (bias[0], bias[1]), (noise[0], noise[1])


def table(rows: list[Row]) -> _common.Table:
    columns = (
        "BN mean",
        "formula",
        "BN variance",
        "BN output",
        "GN output",
        "BN gradient bias",
        "GN",
        "m x BN noise",
        "GN",
    )
    body = [
        (
            str(row.batch),
            *(f"{value:.4f}" for value in (row.mean, row.formula, row.variance, *row.output)),
            *(f"{value:.1e}" for value in row.bias),
            *(f"{value:.1f}" for value in row.noise),
        )
        for row in rows
    ]
    return _common.Table("batch m; mean squared errors", columns, body)


def draw(rows: list[Row], figure: Figure) -> None:
    batches = [row.batch for row in rows]
    panels = figure.subplots(1, 3)
    both = (("BatchNorm, statistics of the batch", _common.BATCHNORM), ("GroupNorm, 8 groups", _common.GNSWAP))
    for axes, field, label in zip(
        panels,
        ("output", "bias", "noise"),
        (
            "mean squared error of the output,\nrelative to the whole set's BatchNorm",
            "bias of the gradient, relative\nto the whole set's gradient",
            "noise of the gradient: m x variance,\nrelative to the gradient squared",
        ),
        strict=True,
    ):
        for place, (name, colour) in enumerate(both):
            axes.plot(batches, [getattr(row, field)[place] for row in rows], "o-", color=colour, label=name)
        axes.set_yscale("log")
        if field == "noise":
            axes.set_ylim(10, 1000)
        _common.round_numbers(axes.yaxis)
        axes.set_ylabel(label)
        _common.powers_of_two(axes, batches, "samples in the batch, m")
    for axes, field in zip(panels, ("output", "bias"), strict=False):
        scale = math.prod(getattr(row, field)[0] * row.batch for row in rows) ** (1 / len(rows))
        axes.plot(batches, [scale / m for m in batches], "--", color=_common.BLACK, linewidth=1, label="1/m")
    _common.legend(figure, panels[0], 3)


def check(rows: list[Row]) -> None:
    for row in rows:
        assert abs(row.mean / row.formula - 1) < 0.15, f"m = {row.batch}: the mean's error is not Var/m"
        assert row.spread == 0, f"m = {row.batch}: GroupNorm's output differs from that in the whole set"
        assert row.bias[1] < 1e-3, f"m = {row.batch}: GroupNorm's mean gradient is not the whole set's"
        assert abs(row.noise[1] / rows[0].noise[1] - 1) < 0.35, "GroupNorm's noise is not that of m samples averaged"
    bias = [row.bias[0] for row in rows]
    assert bias[0] > max(2 * bias[-1], 0.1), (
        "BatchNorm's mean gradient is no less like the whole set's at the smallest m"
    )
    for name, values in (
        ("output", [row.output[0] for row in rows]),
        ("variance", [row.variance for row in rows]),
    ):
        # from two samples on: with one there is no between them, and the errors are as large as they can be
        power = _common.slope([row.batch for row in rows[1:]], values[1:])
        assert -1.25 < power < -0.75, f"the error of BatchNorm's {name} goes as m^{power:.2f}, not as 1/m"


if __name__ == "__main__":
    _common.run(__name__)
