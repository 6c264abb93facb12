"""Folders of pictures become the batches that timm would make of them; what cannot be read is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from gnswap._errors import ArgumentError, CalibrationError
from gnswap._photos import PhotoBatches

# no resizing and no normalising, so that pixels can be compared
PLAIN = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0, "interpolation": "nearest"}
GREY = {**PLAIN, "input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert("RGB")


def flat(colour: Any, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def only(batches: PhotoBatches) -> torch.Tensor:
    (batch,) = batches
    return batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures in two class folders, and files that are none."""
    for index, name in enumerate(["cat/a.png", "cat/b.JPG", "cat/c.webp", "dog/a.png", "dog/b.bmp"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        noise(index).save(path)
    (tmp_path / "README.txt").write_text("no picture")
    (tmp_path / "cat" / "._a.png").write_bytes(b"what macOS leaves on foreign disks")
    return tmp_path


def test_folder_as_timm_would_read_it(folder: Path) -> None:
    model = timm.create_model("tf_efficientnet_lite0")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    paths = ["cat/a.png", "cat/b.JPG", "cat/c.webp", "dog/a.png", "dog/b.bmp"]
    expected = torch.stack([transform(Image.open(folder / path).convert("RGB")) for path in paths])
    batches = PhotoBatches(folder, model, batch_size=2)
    assert batches.config["mean"] == batches.config["std"] == (0.5, 0.5, 0.5)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(list(batches)), expected)
    assert torch.equal(torch.cat(list(batches)), expected), "a second reading gives the same"
    assert (len(batches), batches.photos) == (3, 5)


def test_limit_takes_from_every_class(folder: Path) -> None:
    """The first photos of a sorted class folder would all be of one class."""
    all_photos = torch.cat(list(PhotoBatches(folder, PLAIN)))
    limited = PhotoBatches(folder, PLAIN, limit=2)
    assert torch.equal(only(limited), all_photos[[0, 2]])
    assert PhotoBatches(folder, PLAIN, limit=99).photos == 5
    assert torch.equal(only(PhotoBatches(folder, PLAIN, limit=5)), all_photos)


def test_list_of_files_and_images(folder: Path) -> None:
    batch = only(PhotoBatches([noise(0), str(folder / "cat/a.png"), folder / "cat/a.png"], PLAIN))
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(batch[0], batch[2])


def test_exif_rotation_is_undone(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after turning clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    batch = only(PhotoBatches(tmp_path, PLAIN))
    assert batch[0, :, :, 4:].min() == 1
    assert batch[0, :, :, :4].max() == 0


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(flat(51, "L"), (0.2, 0.2, 0.2), id="grey"),
        pytest.param(flat((255, 0, 0, 0), "RGBA"), (1, 1, 1), id="transparent pixels show white, not hidden red"),
        pytest.param(flat((51, 0, 0, 255), "RGBA"), (0.2, 0, 0), id="opaque RGBA"),
        pytest.param(flat((0, 255), "LA"), (0, 0, 0), id="grey with alpha"),
        pytest.param(flat(1, "1"), (1, 1, 1), id="one bit"),
        pytest.param(flat((0, 255, 255, 0), "CMYK"), (1, 0, 0), id="CMYK"),
        pytest.param(flat(51 * 257, "I;16"), (0.2, 0.2, 0.2), id="16 bits are scaled, not clipped"),
    ],
)
def test_modes(image: Image.Image, expected: tuple[float, ...]) -> None:
    batch = only(PhotoBatches([image], PLAIN))
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch[0, :, 3, 3], torch.tensor(expected, dtype=torch.float32))


def test_palette_with_transparency(tmp_path: Path) -> None:
    """Pillow warns about this kind, and warnings are errors in this suite."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    assert only(PhotoBatches(tmp_path, PLAIN)).min() == 1


def test_grey_network() -> None:
    assert only(PhotoBatches([flat((51, 51, 51))], GREY)).shape == (1, 1, 8, 8)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no such folder \(at .*nowhere\)"):
        PhotoBatches(tmp_path / "nowhere", PLAIN)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"holds no pictures \(at .*\): expected files named \.bmp"):
        PhotoBatches(tmp_path, PLAIN)


def test_empty_list() -> None:
    with pytest.raises(CalibrationError, match="list of photos is empty"):
        PhotoBatches([], PLAIN)


def test_no_picture_under_a_picture_name_is_seen_at_once(folder: Path) -> None:
    (folder / "cat" / "d.jpg").write_text("<html>404</html>")
    with pytest.raises(CalibrationError, match=r"cannot be read \(at .*d\.jpg\).*skip_unreadable=True"):
        PhotoBatches(folder, PLAIN)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_truncated_picture_is_named(folder: Path, suffix: str) -> None:
    whole = folder / f"e.{suffix}"
    noise(9, size=(300, 300)).save(whole)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(CalibrationError, match=rf"cannot be read \(at .*e\.{suffix}\)"):
        list(PhotoBatches(folder, PLAIN))
    batches = PhotoBatches(folder, PLAIN, skip_unreadable=True)
    assert batches.photos == 5
    assert sum(len(batch) for batch in batches) == 5
    assert len(batches.skipped) == 1
    assert f"e.{suffix}" in batches.skipped[0]


def test_limit_counts_what_can_be_read(folder: Path) -> None:
    all_photos = torch.cat(list(PhotoBatches(folder, PLAIN)))
    (folder / "cat/c.webp").write_text("no picture")
    limited = PhotoBatches(folder, PLAIN, limit=2, skip_unreadable=True)
    assert torch.equal(only(limited), all_photos[[0, 1]])
    assert len(limited.skipped) == 1


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(
        CalibrationError,
        match=r"none of the photos can be read: found \d that cannot, first /.*\. Give pictures that open",
    ):
        PhotoBatches(tmp_path, PLAIN, skip_unreadable=True)


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no known range"):
        list(PhotoBatches([flat(0.5, "F")], PLAIN))


def test_unknown_preparation_is_not_guessed() -> None:
    with pytest.raises(CalibrationError, match=r"not known how photos .*at Linear.*input_size, mean, std"):
        PhotoBatches([noise(0)], nn.Linear(2, 2))


def test_preparation_that_contradicts_itself() -> None:
    """Three means on one grey channel would broadcast to three channels without a word."""
    with pytest.raises(CalibrationError, match="1 or 3 channels"):
        PhotoBatches([noise(0)], {**PLAIN, "input_size": (1, 8, 8)})


@pytest.mark.parametrize("argument", ["batch_size", "limit"])
def test_impossible_numbers(argument: str) -> None:
    options: dict[str, Any] = {argument: 0}
    with pytest.raises(ArgumentError, match=f"{argument} is too small"):
        PhotoBatches([noise(0)], PLAIN, **options)
