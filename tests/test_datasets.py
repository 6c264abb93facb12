"""Labelled pictures: folders and lists are read alike, and what is wrong with them is said with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gnswap import ArgumentError, FinetuneError
from gnswap._datasets import Pictures, Views, find_pictures

CONFIG: dict[str, Any] = {
    "input_size": [3, 8, 8],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}


def look(data: Path, val: str | Path | float = 0.25, *, seed: int = 0, unreadable: Any = "refuse") -> Pictures:
    return find_pictures(data, val, CONFIG, seed=seed, unreadable=unreadable)


def folders(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 10), (20 * index, 99, 10)).save(root / name / f"{index}.png")
    return root


def listed(file: Path, *lines: str) -> Path:
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_share_of_every_class_is_held_out(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", cat=8, dog=4, eel=1)
    found = look(data)
    assert found.classes == ("cat", "dog", "eel")
    assert sorted(sample.label for sample in found.val) == [0, 0, 1]
    assert len(found.train) == 10
    assert found.notes == ("no picture judges eel",)
    assert look(data) == found
    assert look(data, seed=1).val != found.val
    assert look(data).key == found.key != look(data, seed=1).key


@pytest.mark.parametrize("name", ["val", "validation"])
def test_folders_for_training_and_validation(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    folders(data / "train", cat=3, dog=3)
    folders(data / name, cat=1, dog=2)
    found = look(data)
    assert (len(found.train), len(found.val)) == (6, 3)
    other = folders(tmp_path / "other", cat=1)
    assert len(look(data / "train", other).val) == 1


def test_a_list_is_like_folders(tmp_path: Path) -> None:
    data = folders(tmp_path / "data", cat=4, dog=4)
    lines = [f"{name}/{index}.png,{name}" for name in ("dog", "cat") for index in range(4)]
    found = look(listed(data / "list.csv", "path,label", *lines))
    assert found == look(data)
    assert len(look(listed(data / "a.csv", "label,path,x", "a,cat/0.png,", "b,dog/1.png,"), data / "a.csv").val) == 2


def test_a_view_depends_on_nothing_but_seed_epoch_and_name(tmp_path: Path) -> None:
    samples = look(folders(tmp_path / "data", cat=4, dog=4)).train
    views = Views(samples, CONFIG, "rand-m9-mstd0.5", 0)
    first = views[(0, 1)][0]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(views[(0, 1)][0], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (3, 8, 8)
    epochs = [views[(epoch, 1)][0] for epoch in range(8)]
    assert len({view.numpy().tobytes() for view in epochs}) > 1
    plain = Views(samples, CONFIG, "none", 0)
    assert torch.equal(plain[(0, 1)][0], plain[(5, 1)][0])


class TestRefuses:
    def test_classes(self, tmp_path: Path) -> None:
        data = folders(tmp_path / "data", cat=2, dog=2)
        (data / "eel").mkdir()
        with pytest.raises(FinetuneError, match=r"a class is empty \(at .*eel\)"):
            look(data)
        with pytest.raises(FinetuneError, match=r"there is nothing to tell apart .*two classes or more, found cat"):
            look(folders(tmp_path / "one", cat=2))
        with pytest.raises(FinetuneError, match=r"there are no classes in this folder .*found 2 files"):
            look(data / "cat")
        with pytest.raises(FinetuneError, match="there is no such data"):
            look(tmp_path / "nowhere")
        with pytest.raises(FinetuneError, match="there are no pictures to judge by"):
            look(folders(tmp_path / "single", cat=1, dog=1))
        with pytest.raises(ArgumentError, match="val is no share"):
            look(folders(tmp_path / "fine", cat=2, dog=2), 1.0)

    def test_a_label_that_only_the_validation_knows(self, tmp_path: Path) -> None:
        data, val = folders(tmp_path / "data", cat=2, dog=2), folders(tmp_path / "val", cat=1, dogg=1)
        expected = r"a label of the validation data is not in the training data \(at dogg/0.png\).*cat, dog, found dogg"
        with pytest.raises(FinetuneError, match=expected):
            look(data, val)

    @pytest.mark.parametrize(
        ("lines", "problem"),
        [
            (
                ["path,label", "cat/0.png,cat", "cat/0.png,dog"],
                r"a wrong label .*line 3\): found cat/0.png is cat and dog",
            ),
            (["path,label", "cat/0.png,"], r"a wrong label .*line 2\): found no label"),
            (["path,label", ",cat"], r"a wrong label .*found no path"),
            (["path,label"], "the list is empty"),
            (["file,class", "cat/0.png,cat"], "the list has no such columns .*path,label.*found file,class"),
            (["path,label", "cat/0.png,cat", "cat/9.png,dog"], r"a picture cannot be read \(at cat/9.png\)"),
        ],
    )
    def test_lists(self, tmp_path: Path, lines: list[str], problem: str) -> None:
        with pytest.raises(FinetuneError, match=problem):
            look(listed(folders(tmp_path / "data", cat=2, dog=2) / "list.csv", *lines))

    def test_a_list_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(FinetuneError, match="the list cannot be read"):
            look(tmp_path / "list.csv")


class TestUnreadable:
    def test_refused_or_skipped_and_counted(self, tmp_path: Path) -> None:
        data = folders(tmp_path / "data", cat=4, dog=4)
        (data / "cat" / "bad.png").write_text("no picture")
        with pytest.raises(FinetuneError, match=r"a picture cannot be read \(at cat/bad.png\).*--unreadable skip"):
            look(data)
        found = look(data, unreadable="skip")
        assert len(found.train) + len(found.val) == 8
        assert [reason.split(":")[0] for reason in found.skipped] == ["cat/bad.png"]

    def test_damage_further_inside(self, tmp_path: Path) -> None:
        data = folders(tmp_path / "data", cat=4, dog=4)
        whole = data / "dog" / "big.bmp"
        Image.effect_noise((60, 60), 40).save(whole)
        whole.write_bytes(whole.read_bytes()[:2000])
        found = look(data, folders(tmp_path / "val", cat=1, dog=1))
        place = next(i for i, sample in enumerate(found.train) if sample.name == "dog/big.bmp")
        with pytest.raises(FinetuneError, match=r"a picture cannot be read \(at dog/big.bmp\)"):
            Views(found.train, CONFIG, "light", 0)[(0, place)]
        assert len(look(data, unreadable="skip").skipped) == 1

    def test_a_class_of_nothing_else(self, tmp_path: Path) -> None:
        data = folders(tmp_path / "data", cat=4, dog=1)
        (data / "dog" / "0.png").write_text("no picture")
        with pytest.raises(
            FinetuneError, match=r"a class is empty \(at dog\): found only pictures that cannot be read"
        ):
            look(data, unreadable="skip")
