"""calibrate: one pass of unlabelled photos through a network, kept as small tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from gnswap._moments import ChannelStatistics, collect


def calibrate(model: nn.Module, batches: Iterable[Any]) -> ChannelStatistics:
    """Collect what `gnswap.plan` needs of photos, in one forward pass; the model is left as it is.

    `gnswap.plan(model, calibration=batches)` does this by itself. Call it yourself where the photos are spread over
    processes (collect on each, `merge` the statistics, hand them to `plan`), or to make several plans from one pass.
    From statistics alone a plan chooses order, signs, groups and levels; a target fidelity, corrections and the help of
    random views need the photos themselves.

    Memory: 40 bytes for each sample and channel of every norm, 70 MB for 64 photos through ResNet-50.

    Args:
        model: a network with BatchNorm. It runs in eval mode without gradients, and gets back each module's flag.
        batches: inputs with the batch in their first dimension, or tuples whose first item is one. Read once. They
            are moved to the model's device and floating dtype.

    Returns:
        The statistics, on the CPU.

    Raises:
        CalibrationError: there are no batches, one is no tensor, or something is not finite.
        ArgumentError: `batches` is a single tensor.
        WrappedModelError: the model is wrapped (DDP, FSDP, torch.compile, TorchScript): collect on the module inside.

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> statistics = gnswap.calibrate(net, [torch.randn(4, 3, 9, 9)])
        >>> statistics.samples, statistics.layers["1"].mean.shape
        (4, torch.Size([4, 8]))
    """
    return collect(model, batches)
