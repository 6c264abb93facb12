"""inspect: what there is to swap in a model."""

from __future__ import annotations

from torch import nn

from gnswap._records import Inventory
from gnswap._survey import survey


def inspect(model: nn.Module) -> Inventory:
    """List every normalisation layer of a model, and say which can be swapped and why the others cannot.

    The model is not run and not changed; models on the meta device are fine.

    Args:
        model: any `torch.nn.Module` that is not wrapped; it may itself be a norm.

    Returns:
        the `Inventory`: one `Site` for each BatchNorm-like layer, with all its paths; other norms under
        `left_alone`; in `notes` what no swap of modules can reach.

    Raises:
        ArgumentError: `model` is no module.
        WrappedModelError: it is wrapped by DDP, DataParallel, FSDP, torch.compile or TorchScript, or holds such a
            wrapper.
        ModelError: a submodule's name holds a dot.

    Example:
        >>> import torch, gnswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
        >>> [(site.name, site.num_channels, site.refusal) for site in gnswap.inspect(model).sites]
        [('1', 16, None)]
    """
    return survey(model)
