"""A folder of pictures as batches of input tensors, through timm's own data pipeline.

Why timm's: size, crop, interpolation, mean and std belong to the weights. A network that gets its photos prepared
in another way looks sane and is measured wrong, so nothing here is guessed: the numbers come from the model's
`pretrained_cfg`, or the caller says them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from gnswap._errors import ArgumentError, CalibrationError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


class PhotoBatches:
    """Batches of photos, as often as they are asked for: `calibration=` and `compare` take it.

    Every photo is turned upright (EXIF), laid on white where it is transparent, brought to the model's number of
    channels, and then goes through `timm.data.create_transform(..., is_training=False)`. The order is fixed: sorted
    by path.

    Args:
        photos: a folder, searched with all its subfolders (files whose names start with a dot are passed over),
            or a list of files or `PIL.Image.Image`.
        model: the network that the photos are for, whose `pretrained_cfg` is used; or timm's data configuration as
            a mapping, with at least ``input_size``.
        batch_size: photos in a batch; the last batch may be smaller.
        limit: take no more than this many, evenly spread over the sorted list, so that folders named after
            classes all have their share.
        skip_unreadable: pass over pictures that cannot be read and list them in `skipped`, in place of an error.

    Attributes:
        config: timm's data configuration in use.
        skipped: the unreadable pictures, each with the reason; empty unless `skip_unreadable` is set.

    Yields:
        float32 `[batch, channels, height, width]`.

    Raises:
        CalibrationError: the folder is missing or holds no picture; a picture cannot be read (here, or while
            iterating where only its end is damaged); the model says nothing about its photos.
        ArgumentError: `batch_size` or `limit` below 1.

    Example:
        >>> from PIL import Image
        >>> batches = PhotoBatches([Image.new("RGB", (300, 200))] * 5, {"input_size": (3, 32, 32)}, batch_size=2)
        >>> len(batches), [tuple(batch.shape) for batch in batches]
        (3, [(2, 3, 32, 32), (2, 3, 32, 32), (1, 3, 32, 32)])
    """

    def __init__(
        self,
        photos: str | Path | Sequence[str | Path | Image.Image],
        model: nn.Module | Mapping[str, Any],
        *,
        batch_size: int = 16,
        limit: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ArgumentError(
                    f"{name} is too small", where="PhotoBatches", expected="1 or more", found=str(value)
                )
        self.batch_size = batch_size
        self.config = data_config(model)
        self._mode = color_mode(self.config)
        sources = pictures_in(Path(photos)) if isinstance(photos, str | Path) else list(photos)
        if not sources:
            raise CalibrationError("the list of photos is empty", where="PhotoBatches", expected="one or more")
        count = len(sources) if limit is None else min(limit, len(sources))
        spread = [index * len(sources) // count for index in range(count)]
        self.skipped: tuple[str, ...] = ()
        if skip_unreadable:
            self._sources = self._readable(sources, spread)
        else:
            self._sources = [sources[index] for index in spread]
            for source in self._sources:  # only the headers: an early error is worth reading them twice
                check_header(source)

    @property
    def photos(self) -> int:
        """How many photos there are in all batches together."""
        return len(self._sources)

    @property
    def names(self) -> tuple[str, ...]:
        """What the photos are called, in the order in which they come: file names; empty for pictures in memory."""
        return tuple("" if isinstance(source, Image.Image) else Path(source).name for source in self._sources)

    def __len__(self) -> int:
        return -(-len(self._sources) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._sources), self.batch_size):
            yield torch.stack([self._tensor(source) for source in self._sources[start : start + self.batch_size]])

    @functools.cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        from timm.data.transforms_factory import create_transform  # late: it imports torchvision

        transform: Callable[[Image.Image], Tensor] = create_transform(**self.config, is_training=False)
        return transform

    def _tensor(self, source: str | Path | Image.Image) -> Tensor:
        return self._transform(picture(source, self._mode)).to(torch.float32)

    def _readable(self, sources: list[str | Path | Image.Image], spread: list[int]) -> list[str | Path | Image.Image]:
        """Those of `spread`, and others in place of what cannot be read among them."""
        readable: list[int] = []
        skipped: list[str] = []
        for index in (*spread, *sorted(set(range(len(sources))) - set(spread))):
            if len(readable) == len(spread):
                break
            try:
                picture(sources[index], self._mode)
            except CalibrationError as error:
                skipped.append(f"{error.where}: {error.found}")
            else:
                readable.append(index)
        if not readable:
            raise CalibrationError(
                "none of the photos can be read",
                found=f"{len(skipped)} that cannot, first {skipped[0]}",
                fix="Give pictures that open in an image viewer.",
            )
        self.skipped = tuple(skipped)
        return [sources[index] for index in sorted(readable)]


def pictures_in(folder: Path) -> list[str | Path | Image.Image]:
    """Every picture in a folder, at any depth, sorted; files that begin with a dot are none.

    Raises:
        CalibrationError: the folder is missing or holds no picture.
    """
    if not folder.is_dir():
        raise CalibrationError(
            "there is no such folder", where=str(folder), fix="Give a folder with pictures in it, at any depth."
        )
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise CalibrationError(
            "the folder holds no pictures", where=str(folder), expected=f"files named {', '.join(sorted(SUFFIXES))}"
        )
    return list(files)


def check_header(source: str | Path | Image.Image) -> None:
    """Raise `CalibrationError` where a file is no picture; damage further inside is not seen."""
    if isinstance(source, Image.Image):
        return
    try:
        with Image.open(source):
            pass
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _unreadable(source, error) from error


def picture(source: str | Path | Image.Image, mode: str) -> Image.Image:
    """One picture, upright, opaque, in 8 bits, of mode "RGB" or "L".

    Raises:
        CalibrationError: it cannot be read.
    """
    try:
        if isinstance(source, Image.Image):
            return _in_mode(source, mode)
        with Image.open(source) as image:
            return _in_mode(image, mode)
    # Pillow's decoders raise these for broken content, among them SyntaxError for a broken PNG
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise _unreadable(source, error) from error


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip at 255 instead of scaling
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert(mode)


def _unreadable(source: str | Path | Image.Image, error: Exception) -> CalibrationError:
    return CalibrationError(
        "the picture cannot be read",
        where=str(source),
        found=str(error),
        fix="Remove or replace the file, or pass skip_unreadable=True.",
    )


def data_config(model: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """timm's data configuration of a model, or of a mapping that holds at least ``input_size``.

    Raises:
        CalibrationError: the model does not say how its photos have to be prepared.
    """
    from timm.data.config import resolve_data_config

    if isinstance(model, Mapping):
        given: Any = dict(model)
    else:
        given = getattr(model, "pretrained_cfg", None)
    if not given or not given.get("input_size"):
        raise CalibrationError(
            "it is not known how photos have to be prepared",
            where=type(model).__name__,
            expected="a timm model, or a mapping with input_size",
            fix="Pass timm's data configuration in place of the model, a mapping with "
            f"{', '.join(_KEYS)}; or set it as the network's attribute pretrained_cfg where it is built.",
        )
    resolve: Callable[..., dict[str, Any]] = resolve_data_config  # timm's function has no type hints
    return resolve(pretrained_cfg=dict(given))


def color_mode(config: dict[str, Any]) -> str:
    """Pillow's mode for a data configuration: "RGB" or "L".

    Raises:
        CalibrationError: neither 1 nor 3 channels, or not as many means and deviations.
    """
    channels = config["input_size"][0]
    if channels not in (1, 3) or len(config["mean"]) != channels or len(config["std"]) != channels:
        raise CalibrationError(
            "photos cannot be brought to this form",
            where="input_size, mean, std",
            expected="1 or 3 channels, with as many means and standard deviations",
            found=f"input_size {config['input_size']}, mean {config['mean']}, std {config['std']}",
        )
    return "RGB" if channels == 3 else "L"
