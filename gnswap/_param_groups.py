"""What is trained, and how fast: freezing, and timm's groups of parameters for the optimizer.

Why no weight decay on gamma, beta and biases: pulling gamma to 0 changes the network's function instead of keeping it
simple (He et al., *Bag of Tricks for Image Classification*, 2019). A converted layer's gamma and beta are the very
parameters of the norm before it, of one dimension, so timm's rule finds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gnswap import _sites
from gnswap._errors import ArgumentError
from gnswap._layer import FusedGroupNorm
from gnswap._norms import is_norm_like

_WARMUP = 0.1  # share of the steps in which the learning rate rises


def freeze(model: nn.Module, what: str, head: str) -> int:
    """Switch gradients off, in place.

    Args:
        model: a network.
        what: "none"; "norms", gamma and beta of every norm; "backbone", everything but the head; or the path of a
            module: it and everything that was registered before it.
        head: path of the head.

    Returns:
        How many parameters (numbers, not tensors) are left to train.

    Raises:
        ArgumentError: no module has this path, or nothing is left to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
        >>> freeze(model, "1", head="2"), [p.requires_grad for p in model[1].parameters()]
        (25, [False, False])
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if what == "none":
        frozen = set()
    elif what == "norms":
        norms = [path for path, module in _sites.walk(model) if _is_norm(module)]
        frozen = {name for name in names if name.rpartition(".")[0] in norms}
    elif what == "backbone":
        frozen = {name for name in names if not name.startswith(f"{head}.")}
    else:
        inside = [place for place, name in enumerate(names) if name.startswith(f"{what}.")]
        if not inside:
            raise ArgumentError(
                "there is nothing of this name to freeze",
                where="finetune.freeze",
                expected="none, norms, backbone, or the path of a module such as "
                + ", ".join(dict.fromkeys(name.partition(".")[0] for name in names)),
                found=repr(what),
            )
        frozen = set(names[: inside[-1] + 1])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)
    left = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not left:
        raise ArgumentError("there is nothing to train", where="finetune", found=f"freeze={what!r}")
    return left


def param_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: no weight decay in one dimension, and lower rates for layers further from the head.

    Args:
        model: a network; what does not require gradients is left out.
        lr: learning rate at the head; timm's schedulers multiply it with each group's `lr_scale`.
        weight_decay: of matrices and convolutions.
        layer_decay: factor from a layer to the one before it, in timm's grouping of layers (BEiT, Bao et al., 2021);
            1 is the same rate everywhere.

    Raises:
        ArgumentError: `layer_decay` is not 1, and the network's layers cannot be told apart.

    Example:
        >>> import timm
        >>> groups = param_groups(timm.create_model("resnet10t", num_classes=3), 0.1, 0.05, 0.5)
        >>> sorted({(group["lr_scale"], group["weight_decay"]) for group in groups})[-2:]
        [(1.0, 0.0), (1.0, 0.05)]
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # type: ignore[attr-defined]

    keep: Any = getattr(model, "no_weight_decay", tuple)()
    if layer_decay == 1.0:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=keep)
    elif hasattr(model, "group_matcher"):
        groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=keep, layer_decay=layer_decay)
    else:
        raise ArgumentError(
            "the layers of this network cannot be told apart",
            where="finetune.layer_decay",
            expected="1, or a network with timm's group_matcher",
            found=f"{layer_decay} and {type(model).__qualname__}",
        )
    return [{**group, "lr": lr} for group in groups]


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """timm's schedule: up in a straight line over the first tenth of the steps, then down as a cosine.

    Args:
        optimizer: its groups' rates are the highest ones.
        steps: of the optimizer; before each, `step_update(number)` is called, with numbers from 1.
    """
    from timm.scheduler.cosine_lr import CosineLRScheduler

    return CosineLRScheduler(optimizer, t_initial=steps + 1, warmup_t=round(_WARMUP * steps), t_in_epochs=False)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, FusedGroupNorm) or is_norm_like(module)
