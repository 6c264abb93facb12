"""calibrate: the right moments, whatever the network; the same for any batches and shards; nothing left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _models import ZOO, build, same_state, small_cnn
from torch import nn

from gnswap._calibrate import calibrate
from gnswap._errors import ArgumentError, CalibrationError, WrappedModelError
from gnswap._moments import ChannelStatistics


def close(one: ChannelStatistics, other: ChannelStatistics) -> None:
    assert (one.fingerprint, one.keys, list(one.layers)) == (other.fingerprint, other.keys, list(other.layers))
    for name, layer in one.layers.items():
        for field, value in vars(layer).items():
            torch.testing.assert_close(value, getattr(other.layers[name], field), msg=f"{name}.{field}")


@pytest.mark.parametrize("name", ZOO)
def test_every_network_of_the_zoo(name: str) -> None:
    model, x = build(name)
    model.train()
    before = copy.deepcopy(model)
    statistics = calibrate(model, [(x, torch.zeros(4))])
    assert statistics.samples == 4
    assert bool(statistics.layers) != (name == "no running statistics")
    assert same_state(model, before)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_moments_are_those_of_the_standardised_input() -> None:
    model, _ = build("root")
    x = torch.randn(5, 12, 6, 5)
    assert isinstance(model, nn.BatchNorm2d)
    xhat = nn.functional.batch_norm(x, model.running_mean, model.running_var, eps=model.eps)
    statistics = calibrate(model, [x])
    layer = statistics.layers[""]
    by_key = torch.tensor([list(statistics.keys).index(key) for key in calibrate(model, x.split(1)).keys])
    assert sorted(by_key.tolist()) == list(range(5))
    expected = sorted(xhat.mean((2, 3)).tolist())
    torch.testing.assert_close(torch.tensor(sorted(layer.mean.tolist())), torch.tensor(expected))
    torch.testing.assert_close(layer.square.sum(0), xhat.square().mean((2, 3)).sum(0))
    assert layer.patch_mean.shape == (5, 4, 12)
    torch.testing.assert_close(layer.patch_square[:, 0].sum(0), xhat[:, :, :3, :3].square().mean((2, 3)).sum(0))


@pytest.mark.parametrize(("name", "patches"), [("1-D, no length", 0), ("1-D", 2), ("3-D", 4), ("plain", 4)])
def test_patches(name: str, patches: int) -> None:
    model, x = build(name)
    first = next(iter(calibrate(model, [x]).layers.values()))
    assert first.patch_mean.shape[1] == patches


def test_a_large_mean_costs_no_precision() -> None:
    norm = nn.BatchNorm2d(4).eval()
    assert norm.running_mean is not None
    norm.running_mean.fill_(1000)
    x = torch.randn(3, 4, 8, 8) + 1000
    square = calibrate(norm, [x]).layers[""].square.sum(0)
    torch.testing.assert_close(square.double(), (x.double() - 1000).square().mean((2, 3)).sum(0), rtol=1e-4, atol=1e-5)


def test_batches_order_and_shards_make_no_difference() -> None:
    model, _ = build("aliased")
    x = torch.randn(10, 3, 8, 8)
    whole = calibrate(model, [x])
    close(calibrate(model, x.flip(0).split(3)), whole)
    shards = [calibrate(model, [part]) for part in x[torch.randperm(10)].split(4)]
    close(shards[0].merge(*shards[1:]), whole)


def test_calls_of_one_norm_are_pooled() -> None:
    model, x = build("called twice")
    layer = calibrate(model, [x]).layers["bn"]
    assert layer.sample.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_calls_on_maps_too_small_for_patches() -> None:
    """As those of a detector's head, which runs on every level of its pyramid."""
    model = small_cnn()
    large, small = torch.randn(3, 3, 12, 12), torch.randn(2, 3, 3, 3)
    together = calibrate(model, [large, small])
    assert together.merge(calibrate(model, [torch.randn(1, 3, 12, 12)])).samples == 6
    alone = calibrate(model, [large])
    for name, layer in together.layers.items():
        assert (len(layer.mean), layer.patch_mean.shape[1]) == (5, 0)
        assert alone.layers[name].patch_mean.shape[1] == 4


def test_half_precision() -> None:
    model, x = build("plain")
    statistics = calibrate(model.bfloat16(), [x])
    assert all(layer.mean.dtype == torch.float32 for layer in statistics.layers.values())


@pytest.mark.parametrize(
    ("batches", "kind", "match"),
    [
        ([], CalibrationError, "no photos to calibrate on"),
        (iter(()), CalibrationError, "read only once"),
        (["photo.jpg"], CalibrationError, "a batch is no tensor.*found str"),
        (torch.randn(2, 3, 8, 8), ArgumentError, "in a list"),
        ([torch.full((2, 3, 8, 8), torch.nan)], CalibrationError, "an input is not finite"),
        ([torch.randn(2, 5, 8, 8)], CalibrationError, r"does not take a batch.*torch.float32 of shape \(2, 5, 8, 8\)"),
        ([torch.ones(2, 3, 8, 8, dtype=torch.uint8)], CalibrationError, "does not take a batch.*torch.uint8"),
        ([torch.full((2, 3, 8, 8), 1e38)], CalibrationError, "the input of a norm is not finite"),
    ],
)
def test_photos_that_cannot_be_used(batches: Any, kind: type[Exception], match: str) -> None:
    model = small_cnn()
    with pytest.raises(kind, match=match):
        calibrate(model, batches)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_shards_of_another_network() -> None:
    one = calibrate(build("plain")[0], [torch.randn(2, 3, 8, 8)])
    with pytest.raises(ArgumentError, match="a shard is of another network"):
        one.merge(calibrate(build("root")[0], [torch.randn(2, 12, 5, 5)]))


def test_wrapped_models_are_refused() -> None:
    with pytest.raises(WrappedModelError, match="DataParallel"):
        calibrate(nn.DataParallel(small_cnn()), [torch.randn(2, 3, 8, 8)])
