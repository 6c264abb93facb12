"""A network the whole way: norms as a trained one has them, inspect, convert, compare, revert, save, load."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gnswap
from gnswap._baselines import naive_group_norm
from gnswap._sites import find_norms, get

Run = Callable[[nn.Module], Any]


def settle(model: nn.Module, run: Run, seed: int = 0) -> nn.Module:
    """Give every norm gamma and beta of all kinds, and the statistics of what it gets, in place.

    Unlike `randomise_norms`, whose statistics are those of no data, this leaves a network in which BatchNorm does
    what it does in a trained one; only then does it mean anything which conversion is nearer to it. Gamma is of both
    signs, in sizes from 0.1 to 2, beta ~ N(0, 1/4). A norm that `run` does not reach keeps its statistics.

    Returns:
        the model itself.
    """
    generator = torch.Generator().manual_seed(seed)
    handles = []

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        x = x.transpose(0, 1).reshape(x.shape[1], -1).double()
        norm.running_mean.copy_(x.mean(1))
        norm.running_var.copy_(x.var(1, correction=0) + 1e-3)

    with torch.no_grad():
        for _, norm in find_norms(model):
            if norm.weight is not None:
                size = torch.exp(torch.rand(norm.weight.shape, generator=generator) * 3 - 2.3)
                norm.weight.copy_(size * (torch.rand(size.shape, generator=generator) - 0.2).sign())
            if norm.bias is not None:
                norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) / 2)
            if norm.running_mean is not None:
                handles.append(norm.register_forward_pre_hook(measure))
        run(model)
    for handle in handles:
        handle.remove()
    return model


def leaves(output: Any) -> list[Tensor]:
    """All tensors of an output; the dataclasses of transformers and diffusers are mappings."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def distance(found: Any, expected: Any) -> float:
    """Relative error of all outputs together: ‖found − expected‖ / ‖expected − its mean‖."""
    pairs = [
        (one.double(), other.double())
        for one, other in zip(leaves(found), leaves(expected), strict=True)
        if other.is_floating_point() and other.numel()
    ]
    error = sum(float((one - other).square().sum()) for one, other in pairs)
    size = sum(float((other - other.mean()).square().sum()) for _, other in pairs)
    return (error / size) ** 0.5


def same_bits(one: Any, other: Any) -> bool:
    """Whether all tensors of two outputs are equal."""
    return all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def layer_error(model: nn.Module, converted: nn.Module, run: Run) -> float:
    """Median over the norms of the error of each, all fed what the original's norm is fed.

    What a whole random network makes of these errors is another matter: many amplify any difference.
    """
    errors: list[float] = []

    def compare(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: errors.append(distance(get(converted, path)(inputs[0].clone()), output))

    handles = [norm.register_forward_hook(compare(paths[0])) for paths, norm in find_norms(model)]
    run(model)
    for handle in handles:
        handle.remove()
    return statistics.median(errors)


@dataclasses.dataclass(frozen=True)
class Way:
    """What came of it: the conversion, and its errors beside those of the naive swap."""

    inventory: gnswap.Inventory
    conversion: gnswap.Conversion
    error: float
    naive_error: float
    layer_error: float
    naive_layer_error: float
    reverted: bool
    loaded: bool


@torch.no_grad()
def whole_way(model: nn.Module, run: Run) -> Way:
    """Convert a network in eval mode as it comes, and try everything on it.

    Args:
        model: left untouched.
        run: what of it is compared.
    """
    expected = run(model)
    conversion = gnswap.convert(model)
    found = run(conversion.model)
    naive = naive_group_norm(model)
    with tempfile.TemporaryDirectory() as folder:
        gnswap.save(conversion, folder)
        loaded = gnswap.load(folder, model)
    return Way(
        inventory=gnswap.inspect(model),
        conversion=conversion,
        error=distance(found, expected),
        naive_error=distance(run(naive), expected),
        layer_error=layer_error(model, conversion.model, run),
        naive_layer_error=layer_error(model, naive, run),
        reverted=same_bits(run(gnswap.revert(conversion.model)), expected),
        loaded=same_bits(run(loaded), found),
    )
