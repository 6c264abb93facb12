"""Running a network on photos: reading batches, placing them, eval mode and back.

Why apart: calibrating, comparing and choosing all run networks on a user's batches, and must all leave every flag
as they found it.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._errors import ArgumentError, CalibrationError, GnswapError

ROWS = 16
"""Samples in one forward pass, whatever the user's batches are."""

MOST_BYTES = 4 << 30
"""The most that `photos_in` keeps in memory."""


def chunks(batches: Iterable[Any], rows: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs and labels out of a user's batches.

    Args:
        batches: tensors with the batch in their first dimension, or tuples whose first item is one and whose second
            may be integer labels `[N]`.
        rows: no more than this many samples at a time.

    Yields:
        the inputs, and the labels or None.

    Raises:
        ArgumentError: `batches` is a single tensor or a string.
        CalibrationError: a batch is no tensor.
    """
    if isinstance(batches, Tensor | str):
        raise ArgumentError(
            "not an iterable of batches",
            where="batches",
            expected="batches, such as a list of tensors or a DataLoader",
            found=type(batches).__qualname__,
            fix="A single batch goes in a list: [batch].",
        )
    for batch in batches:
        x, *rest = batch if isinstance(batch, tuple | list) and batch else (batch,)
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise CalibrationError(
                "a batch is no tensor",
                where="batches",
                expected="a tensor, or a tuple whose first item is one",
                found=type(x).__name__,
            )
        labels = rest[0] if rest and isinstance(rest[0], Tensor) else None
        if labels is not None and (labels.shape != x.shape[:1] or labels.is_floating_point()):
            labels = None
        step = rows or max(len(x), 1)
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            yield x[part], None if labels is None else labels[part]


def no_photos(purpose: str) -> CalibrationError:
    """The error for an iterable of batches that held nothing."""
    return CalibrationError(
        f"there are no photos to {purpose}",
        where="batches",
        expected="one batch or more",
        fix="An iterator can be read only once: pass a list or a PhotoBatches.",
    )


def keys(x: Tensor) -> list[int]:
    """A checksum of each sample's bytes, by which samples are put in an order that no loader can change."""
    return [zlib.crc32(sample.contiguous().view(-1).view(torch.uint8).numpy().data) for sample in x.detach().cpu()]


def kept_batches(batches: Iterable[Any], most_bytes: int = MOST_BYTES) -> list[tuple[Tensor, ...]]:
    """All batches, held in memory: the input of each, and labels where there are any.

    Why all at once: choosing takes several looks at the same photos, and a loader that shuffles, augments, or can be
    read only once would give others each time. A few hundred photos are all that choosing can use.

    Raises:
        CalibrationError: there are none, one is not finite, or they need more memory than `most_bytes`.
    """
    kept: list[tuple[Tensor, ...]] = []
    size = photos = 0
    for x, labels in chunks(batches):
        size, photos = size + x.nbytes, photos + len(x)
        if size > most_bytes:
            raise CalibrationError(
                "too many photos to choose on",
                where="calibration",
                expected=f"at most {most_bytes >> 30} GiB of inputs",
                found=f"more, after {photos} photos",
                fix="64 to 256 photos are enough: take a part of them.",
            )
        require_finite(x)
        kept.append((x.detach(),) if labels is None else (x.detach(), labels))
    if not photos:
        raise no_photos("choose on")
    return kept


def photos_in(batches: Iterable[Any]) -> list[Tensor]:
    """All inputs one by one, `[1, ...]` each, in an order that depends on nothing but what they hold.

    Raises:
        CalibrationError: see `kept_batches`.
    """
    found = [(key, x[i : i + 1]) for x, *_ in kept_batches(batches) for i, key in enumerate(keys(x))]
    # by shape first, since only photos of one shape share a batch
    return [photo for _, photo in sorted(found, key=lambda pair: (pair[1].shape, pair[0]))]


def require_finite(x: Tensor) -> None:
    """Raises `CalibrationError` where an input holds NaN or infinity."""
    if x.is_floating_point() and not x.isfinite().all():
        raise CalibrationError(
            "an input is not finite",
            where="batches",
            expected="numbers",
            found="NaN or infinity",
            fix="Check how the photos are normalised.",
        )


def batched(photos: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """Single samples `[1, ...]` put together to batches of up to `rows` of one shape."""
    waiting: list[Tensor] = []
    for photo in photos:
        if waiting and (len(waiting) == rows or waiting[0].shape != photo.shape):
            yield torch.cat(waiting)
            waiting = []
        waiting.append(photo)
    if waiting:
        yield torch.cat(waiting)


def placed(x: Tensor, model: nn.Module) -> Tensor:
    """An input on the model's device and in its floating dtype."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return x.to(tensor.device, tensor.dtype if x.is_floating_point() else None)
    return x


def answered(model: nn.Module, x: Tensor) -> Any:
    """What the model makes of a user's batch.

    Raises:
        CalibrationError: its forward does not take the batch.
    """
    x = placed(x, model)
    try:
        return model(x)
    except (GnswapError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # forward is anybody's code
        raise CalibrationError(
            "the network does not take a batch",
            where="batches",
            found=f"{x.dtype} of shape {tuple(x.shape)}, and forward said {type(error).__name__}: {error}",
            fix="Of a tuple only the first item goes in. A network of several inputs, or of a dict, needs a module "
            "around it that makes them of one tensor.",
        ) from error


def flat(output: Any) -> list[Tensor]:
    """Every floating tensor in an output of tensors, tuples, lists and mappings, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in flat(item)]
    return []


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode for all of them; afterwards every module has its own flag again."""
    flags = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags.items():
            module.training = training
