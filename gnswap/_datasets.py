"""Labelled pictures to fine-tune on: image folders and CSV lists, prepared by timm's transforms.

Why not timm's own `ImageDataset`: where a picture cannot be read it silently gives the next one, and it knows no CSV.
Size, crop and normalisation are timm's all the same (`timm.data.create_transform`).

Why every sample has a seed of its own, made of the job's, the epoch and its number: what a sample looks like then
depends neither on the number of loader processes nor on where a run was interrupted.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnswap._errors import ArgumentError, CalibrationError, FinetuneError
from gnswap._photos import check_header, color_mode, picture, pictures_in

Unreadable = Literal["refuse", "skip"]
_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}
_LIGHT: dict[str, Any] = {"scale": (0.5, 1.0), "color_jitter": 0.2}


class Sample(NamedTuple):
    """One picture: its file, the number of its class, and what messages call it."""

    path: Path
    label: int
    name: str


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What there is to learn from and to be judged by.

    Attributes:
        classes: names, sorted; a label is a place in this list.
        train, val: the samples, in an order that depends on nothing but their names.
        skipped: pictures that cannot be read, with the reason.
        notes: what the user should know.
    """

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        """A checksum of names, labels and file sizes: whether it is the same data."""
        lines = [f"{s.name} {s.label} {s.path.stat().st_size}" for s in (*self.train, *self.val)]
        return f"{zlib.crc32(repr((self.classes, len(self.train), lines)).encode()):08x}"


def find_pictures(
    data: str | Path, val: str | Path | float, config: dict[str, Any], *, seed: int, unreadable: Unreadable
) -> Pictures:
    """Look through folders or lists, without keeping any picture.

    Args:
        data: a folder with one subfolder for each class, or with `train` and `val` subfolders of this kind; or a CSV
            file with the columns path (relative to the file) and label.
        val: the same for validation, or the share of every class that is split off.
        config: timm's data configuration.
        seed: of the split.
        unreadable: "refuse" looks at the head of every file, "skip" reads every file once and leaves out what cannot
            be read.

    Raises:
        FinetuneError: no data, an empty class, fewer than two classes, a label that is wrong or not in the training
            data, a picture that cannot be read.
        ArgumentError: a share that is none.
    """
    root = Path(data)
    if isinstance(val, float | int) and root.is_dir() and (inside := _subfolder(root, "val")) is not None:
        train_root = _subfolder(root, "train")
        if train_root is not None:
            root, val = train_root, inside
    found = _labelled(root)
    judges: list[tuple[Path, str, str]] | None = None
    if isinstance(val, str | Path):
        judges = _labelled(Path(val))
    elif not 0 < val < 1:
        raise ArgumentError("val is no share", where="finetune", expected="above 0 and below 1", found=str(val))
    readable, skipped = _readable(found, color_mode(config), unreadable)
    classes = _classes(found, readable, root)
    places = {name: place for place, name in enumerate(classes)}
    samples = [Sample(path, places[label], name) for path, label, name in readable]
    if judges is None:
        train, held = _split(samples, float(val), seed)  # type: ignore[arg-type]
    else:
        if wrong := sorted({label for _, label, _ in judges} - set(classes)):
            raise FinetuneError(
                "a label of the validation data is not in the training data",
                where=next(name for _, label, name in judges if label == wrong[0]),
                expected=f"one of {_some(classes)}",
                found=_some(wrong),
                fix="Correct the label, or add pictures of this class to the training data.",
            )
        readable, more = _readable(judges, color_mode(config), unreadable)
        skipped += more
        train, held = samples, [Sample(path, places[label], name) for path, label, name in readable]
    if not held:
        raise FinetuneError(
            "there are no pictures to judge by", where=str(data), fix="Give more pictures, or a list of them as val."
        )
    missing = [classes[label] for label in sorted(set(range(len(classes))) - {sample.label for sample in held})]
    notes = (f"no picture judges {_some(missing)}",) if missing else ()
    return Pictures(classes, tuple(train), tuple(held), tuple(skipped), notes)


class Views(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Pictures as input tensors: random views of them for training, or the one that the network is judged by.

    Args:
        samples: the pictures.
        config: timm's data configuration.
        augment: "none", "light" (crops of half the picture or more, mirror images, a little colour), or a policy of
            timm's such as "rand-m9-mstd0.5".
        seed: of the views.

    Raises:
        ArgumentError: timm does not know the policy.
    """

    def __init__(self, samples: tuple[Sample, ...], config: dict[str, Any], augment: str, seed: int) -> None:
        self.samples, self.seed, self._mode = samples, seed, color_mode(config)
        self._transform = _transform(config, augment)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        """The view of a sample in an epoch: `item` is (epoch, place in the list). float32 `[C, H, W]` and its label.

        Raises:
            FinetuneError: the file is damaged further inside.
        """
        epoch, place = item
        sample = self.samples[place]
        with seeded(zlib.crc32(f"{self.seed} view {epoch} {sample.name}".encode())):
            return self._transform(_read(sample.path, sample.name, self._mode)).float(), sample.label

    def __len__(self) -> int:
        return len(self.samples)


@contextlib.contextmanager
def seeded(seed: int, devices: tuple[torch.device, ...] = ()) -> Iterator[None]:
    """Within the block all random numbers (python's, numpy's, torch's) come from a seed; then go on as before."""
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


def _transform(config: dict[str, Any], augment: str) -> Callable[[Any], Tensor]:
    from timm.data.transforms_factory import create_transform  # late: it imports torchvision

    known = {key: config[key] for key in ("input_size", "mean", "std", "interpolation")}
    if augment == "none":
        judged: Callable[[Any], Tensor] = create_transform(**known, crop_pct=config["crop_pct"])
        return judged
    options = _LIGHT if augment == "light" else {**_LIGHT, "auto_augment": augment}
    try:
        varied: Callable[[Any], Tensor] = create_transform(**known, is_training=True, **options)
    except (AssertionError, ValueError, KeyError) as error:
        raise ArgumentError(
            "timm does not know this augmentation",
            where="finetune.augment",
            expected="none, light, or a policy of timm's such as rand-m9-mstd0.5",
            found=repr(augment),
        ) from error
    return varied


def _labelled(root: Path) -> list[tuple[Path, str, str]]:
    """Path, label and name of every picture, sorted by name."""
    if root.is_dir():
        return _in_folders(root)
    if root.is_file():
        return _in_list(root)
    raise FinetuneError(
        "there is no such data", where=str(root), expected="a folder with a subfolder for each class, or a CSV file"
    )


def _in_folders(root: Path) -> list[tuple[Path, str, str]]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise FinetuneError(
            "there are no classes in this folder",
            where=str(root),
            expected="a subfolder for each class, or a CSV file",
            found=f"{sum(path.is_file() for path in root.iterdir())} files",
        )
    found = []
    for folder in folders:
        try:
            inside = pictures_in(folder)
        except CalibrationError as error:
            raise FinetuneError(
                "a class is empty",
                where=str(folder),
                expected=error.expected,
                fix="Put pictures in, or remove the folder.",
            ) from error
        found += [(Path(path), folder.name, str(Path(path).relative_to(root))) for path in map(str, inside)]
    return found


def _in_list(file: Path) -> list[tuple[Path, str, str]]:
    found: dict[str, tuple[Path, str, str]] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            if not {"path", "label"} <= set(rows.fieldnames or ()):
                raise FinetuneError(
                    "the list has no such columns",
                    where=str(file),
                    expected="path,label in its first line",
                    found=",".join(rows.fieldnames or ()) or "an empty file",
                )
            for row in rows:
                name, label = (row["path"] or "").strip(), (row["label"] or "").strip()
                problem = "no path" if not name else "no label" if not label else ""
                if not problem and name in found and found[name][1] != label:
                    problem = f"{name} is {found[name][1]} and {label}"
                if problem:
                    raise FinetuneError("a wrong label", where=f"{file}, line {rows.line_num}", found=problem)
                found[name] = (file.parent / name, label, name)
    except (UnicodeDecodeError, csv.Error) as error:
        raise FinetuneError("the list cannot be read", where=str(file), expected="CSV", found=str(error)) from error
    if not found:
        raise FinetuneError("the list is empty", where=str(file), expected="a line for each picture")
    return [found[name] for name in sorted(found)]


def _subfolder(root: Path, split: str) -> Path | None:
    return next((root / name for name in _SPLITS[split] if (root / name).is_dir()), None)


def _readable(
    found: list[tuple[Path, str, str]], mode: str, unreadable: Unreadable
) -> tuple[list[tuple[Path, str, str]], list[str]]:
    kept, skipped = [], []
    for entry in found:
        try:
            if unreadable == "skip":
                _read(entry[0], entry[2], mode)
            else:
                check_header(entry[0])
        except (CalibrationError, FinetuneError) as error:
            if unreadable == "refuse":
                raise _damaged(entry[2], error) from error
            skipped.append(f"{entry[2]}: {error.found}")
        else:
            kept.append(entry)
    return kept, skipped


def _read(path: Path, name: str, mode: str) -> Any:
    try:
        return picture(path, mode)
    except CalibrationError as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: CalibrationError | FinetuneError) -> FinetuneError:
    return FinetuneError(
        "a picture cannot be read",
        where=name,
        found=error.found,
        fix="Remove or replace it, or leave such pictures out: unreadable='skip' (--unreadable skip).",
    )


def _classes(found: list[tuple[Path, str, str]], kept: list[tuple[Path, str, str]], root: Path) -> tuple[str, ...]:
    classes = sorted({label for _, label, _ in found})
    if lost := sorted(set(classes) - {label for _, label, _ in kept}):
        raise FinetuneError("a class is empty", where=_some(lost), found="only pictures that cannot be read")
    if len(classes) < 2:
        raise FinetuneError(
            "there is nothing to tell apart", where=str(root), expected="two classes or more", found=_some(classes)
        )
    return tuple(classes)


def _split(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """The same share of every class held out, but never all of a class."""
    apart: set[str] = set()
    for label, count in sorted(Counter(sample.label for sample in samples).items()):
        own = sorted(
            (sample.name for sample in samples if sample.label == label),
            key=lambda name: zlib.crc32(f"{seed} split {name}".encode()),
        )
        apart.update(own[: min(max(round(share * count), 1), count - 1)])
    return [s for s in samples if s.name not in apart], [s for s in samples if s.name in apart]


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
