"""The two swaps that everybody tries first, to show beside gnswap's own.

Why they are here: the demo and the benchmarks compare with the same code, and nobody has to take our word for what
"naive" means. Neither is a verb: they take no options and are not public.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from gnswap import _norms, _sites
from gnswap._grouping import largest_groups
from gnswap._layer import FusedGroupNorm


def naive_group_norm(model: nn.Module, num_groups: int = 32) -> nn.Module:
    """A copy of the model with gamma and beta of every BatchNorm copied into a plain GroupNorm.

    What most scripts do: the running statistics are thrown away, so channels whose sizes differ by orders of
    magnitude share one variance, and the network's answers are gone.

    Args:
        model: a network with BatchNorm; left untouched.
        num_groups: G, or the largest divisor of C below it.

    Returns:
        The copy, in the model's own training mode.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8))
        >>> naive_group_norm(net, 2)[1]
        FusedGroupNorm(2, 8, eps=1e-05, backend=...)
    """
    return _replaced(model, num_groups, copy_affine=True)


def fresh_group_norm(model: nn.Module, num_groups: int = 32) -> nn.Module:
    """A copy of the model with a newly initialised GroupNorm (gamma 1, beta 0) for every BatchNorm.

    What `opacus.ModuleValidator.fix` and `torch.nn.GroupNorm(32, C)` in its place give: a network to train again.

    Args:
        model: a network with BatchNorm; left untouched.
        num_groups: G, or the largest divisor of C below it.

    Returns:
        The copy, in the model's own training mode.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8))
        >>> fresh_group_norm(net, 3)[1]
        FusedGroupNorm(2, 8, eps=1e-05, backend=...)
    """
    return _replaced(model, num_groups, copy_affine=False)


def _replaced(model: nn.Module, num_groups: int, *, copy_affine: bool) -> nn.Module:
    model = copy.deepcopy(model)
    for paths, norm in _sites.find_norms(model):
        state = _norms.read_norm(norm)
        groups = largest_groups(state.num_channels, num_groups)
        layer = FusedGroupNorm(groups, state.num_channels, state.eps, affine=state.weight is not None, act=state.act)
        layer.drop = state.drop
        if copy_affine and state.weight is not None and layer.weight is not None:
            with torch.no_grad():
                layer.weight.copy_(state.weight)
                if state.bias is not None and layer.bias is not None:
                    layer.bias.copy_(state.bias)
        model = _sites.replace(model, paths, layer.train(norm.training))
    return model
