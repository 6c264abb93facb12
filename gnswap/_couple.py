"""A converted network and its original, and photos for both: what healing and refitting ask of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._errors import ArgumentError, CalibrationError
from gnswap._layer import FusedGroupNorm
from gnswap._running import photos_in
from gnswap._sites import Applied, applied, require_plain

LEAST_PHOTOS = 8


def require_couple(converted: nn.Module, original: nn.Module, verb: str) -> Applied:
    """The record of the conversion.

    Args:
        converted, original: the networks.
        verb: what is to be done to them, for the errors.

    Raises:
        ArgumentError: `converted` was not converted by gnswap, shares tensors with `original`, has nothing to train or
            half precision; the networks are not of one architecture.
        WrappedModelError: one is wrapped.
    """
    for model in (converted, original):
        require_plain(model)
    record = applied(converted)
    if record is None:
        raise ArgumentError(
            "this model was not converted by gnswap",
            where=f"{verb}.converted",
            expected="what gnswap.apply, convert or load returned, as a whole",
            found=type(converted).__qualname__,
        )
    trained = {name: p for name, p in converted.named_parameters() if p.requires_grad}
    theirs = {tensor.data_ptr() for tensor in original.parameters() if tensor.numel()}
    half = [name for name, p in trained.items() if p.dtype not in (torch.float32, torch.float64)]
    shared = [name for name, p in trained.items() if p.data_ptr() in theirs]
    layers = {path for path, _ in original.named_modules(remove_duplicate=False)}
    missing = [decision.name for decision in record.plan.swaps if decision.paths[0] not in layers]
    converted_too = [path for path, module in original.named_modules() if isinstance(module, FusedGroupNorm)]
    for problem, names, fix in (
        ("the original is converted too", converted_too, "Pass the network with its BatchNorms, or a copy of it."),
        ("the two networks are not the same architecture", missing, "Pass the network that was converted."),
        ("the two networks share tensors", shared, "Convert a copy, or pass a copy of the original."),
        ("half precision is too coarse to train in", half, "Call converted.float() first, and .half() afterwards."),
    ):
        if names:
            raise ArgumentError(problem, where=f"{verb}, {names[0]}", fix=fix)
    if not trained:
        raise ArgumentError(
            "there is nothing to train", where=f"{verb}.converted", expected="parameters that require gradients"
        )
    return record


def singles_of_one_shape(photos: Iterable[Any], verb: str) -> list[Tensor]:
    """The photos one by one, `[1, ...]` each, in an order that depends on nothing but what they hold.

    Raises:
        CalibrationError: fewer than `LEAST_PHOTOS`, of different shapes, or with numbers that are not finite.
    """
    singles = photos_in(photos)
    shapes = {tuple(photo.shape[1:]) for photo in singles}
    if len(singles) < LEAST_PHOTOS or len(shapes) > 1:
        raise CalibrationError(
            f"too few photos to {verb} with" if len(singles) < LEAST_PHOTOS else "photos of different shapes",
            where=f"{verb}.photos",
            expected=f"{LEAST_PHOTOS} or more, all of one shape",
            found=f"{len(singles)} of {', '.join(map(str, sorted(shapes)[:3]))}",
        )
    return singles
