"""heal: teach a converted network, for a few minutes and without labels, what its original answers.

What conversion cannot keep is what the original did with a photo's own contrast: GroupNorm divides it out. The weights
can make up for much of it, and the original says what is right on any photo.

Why everything stays in eval mode: what is left of dropout would only blur the comparison, and a GroupNorm is the same
in both modes. Why the batch may be small: so is no sample's result changed by the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from gnswap._couple import require_couple, singles_of_one_shape
from gnswap._errors import ArgumentError
from gnswap._healer import Healer, crc
from gnswap._healing import HealReport, Job
from gnswap._running import eval_mode, keys
from gnswap._sites import digest


def heal(
    converted: nn.Module,
    original: nn.Module,
    photos: Iterable[Any],
    *,
    steps: int = 1000,
    batch_size: int = 8,
    lr: float = 1e-3,
    accumulation: int = 1,
    softness_end: float | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
) -> HealReport:
    """Distil the original into the converted network, in place, from unlabelled photos.

    AdamW without weight decay, in steps that are shares of each layer's size (Shazeer and Stern, *Adafactor*, 2018), a
    learning rate that rises and then falls as a cosine, random views of the photos (crops, mirror images, colour,
    blends). Every fourth photo is held out and judges: the best weights are kept (of nearly equal ones the last), it
    stops where they get no better in the second half of the steps, and where healing did not help at all the network
    is given back bit for bit. Only parameters that require gradients are trained; the standardisation and all other
    buffers stay. `gnswap.save` and `load` work as before; `revert` refuses, as after any training.

    With several processes (`torchrun`, `accelerate launch`) every process is given the same networks and photos, each
    takes its share of every batch, and the result is the same up to rounding.

    Args:
        converted: what `gnswap.convert` or `apply` made of the original; trained in place, in fp32 or fp64.
        original: the network with its BatchNorms; only read.
        photos: input batches, as for `gnswap.calibrate`; all of one shape. 64 to 256 photos are good. Read once, kept
            in memory.
        steps: optimizer steps; on EfficientNet-Lite0 twice as many bring little more.
        batch_size: photos in a step, over all processes.
        lr: the highest learning rate, as a share of the size of each layer's weight.
        accumulation: parts that a process computes its share of a batch in, where memory is scarce.
        softness_end: a softness that every layer is taken to during the first half of the steps; 0 ends with pure
            GroupNorm. By default the softness stays.
        checkpoint: a directory for the state, written at every look at the photos held out. Called again with the same
            arguments after a kill, healing goes on there and ends with the same weights, bit for bit on one process.
        seed: of the order of the photos and of their views.

    Returns:
        What came of it.

    Raises:
        ArgumentError: `converted` was not converted by gnswap, shares tensors with `original`, has nothing to train or
            half precision; a number is out of range; the networks do not correspond.
        CalibrationError: fewer than 8 photos, of different shapes, or with numbers that are not finite.
        HealingError: the loss is no longer finite. The network has the best weights so far.
        StoreError: `checkpoint` holds something else, or the state of another healing.
        MissingDependencyError: there are several processes, and accelerate is not installed.
        WrappedModelError: a model is wrapped (DDP, FSDP, torch.compile): heal the module inside.

    Example:
        >>> import torch, gnswap
        >>> norm = torch.nn.BatchNorm2d(8)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.ReLU(), torch.nn.Flatten()).eval()
        >>> converted = gnswap.convert(net, groups=2, softness=0).model
        >>> report = gnswap.heal(converted, net, [torch.rand(16, 3, 6, 6)], steps=20, lr=1e-3)
        >>> report.healed, report.photos, report.held_out, report.after.distance < report.before.distance
        (True, 12, 4, True)
    """
    record = require_couple(converted, original, "heal")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("accumulation", accumulation)):
        if value < 1:
            raise ArgumentError(f"{name} is too small", where="heal", expected="1 or more", found=str(value))
    if not 0 < lr < math.inf:
        raise ArgumentError("lr is out of range", where="heal", expected="above 0, finite", found=str(lr))
    singles = singles_of_one_shape(photos, "heal")
    job = Job(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        softness_end=None if softness_end is None else float(softness_end),
        seed=seed,
        plan=crc(record.plan.to_json()),
        original=crc(str(digest(original))),
        photos=crc(str([key for photo in singles for key in keys(photo)])),
    )
    with eval_mode(converted, original):
        names = [decision.output_path for decision in record.plan.swaps]
        run = Healer(converted, original, names, singles, job, accumulation, checkpoint)
        try:
            run.start()
            run.go_on()
        finally:  # after an error or an interruption too: the best weights so far, or those of the start
            run.restore_best()
    return run.report()
