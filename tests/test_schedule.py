"""The softness schedule: exact ends, no jump at the nominal input, exact resume, also in half precision."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import gnswap
from gnswap import ArgumentError, FusedGroupNorm, SoftnessSchedule
from tests._models import build, same_state


def soft_network(softness: float = 1.0) -> nn.Module:
    model, _ = build("plain")
    return gnswap.convert(model, groups=4, softness=softness).model


def layers(model: nn.Module) -> list[FusedGroupNorm]:
    return [layer for layer in model.modules() if isinstance(layer, FusedGroupNorm)]


def nominal_input(layer: FusedGroupNorm, nominal: float) -> torch.Tensor:
    """An input whose groups have mean 0 and variance `nominal` after standardising, `[1, C, 2]`."""
    assert layer.channel_scale is not None
    assert layer.channel_shift is not None
    z = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(1, layer.num_channels, 1) * nominal**0.5
    return (z - layer.channel_shift[:, None]) / layer.channel_scale[:, None]


def standardised(softness: float, nominal: float) -> FusedGroupNorm:
    layer = FusedGroupNorm(2, 6, softness=softness, dtype=torch.float64)
    layer.channel_scale = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    layer.channel_shift = torch.linspace(-1, 1, 6, dtype=torch.float64)
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1], dtype=torch.float64)
    layer.channel_gain = signs * (nominal + layer.eps + softness) ** 0.5
    return layer


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_it_goes_from_the_present_softness_to_the_end_exactly(shape: str) -> None:
    model = soft_network(1.0)
    layers(model)[0].softness = 0.3  # layers may begin at different values
    schedule = SoftnessSchedule(model, end=0.1, steps=7, shape=shape)
    seen = []
    for _ in range(9):
        schedule.step()
        seen.append([layer.softness for layer in layers(model)])
    for number, start in enumerate((0.3, 1.0)):
        path = [start, *(softness[number] for softness in seen)]
        assert all(b < a for a, b in itertools.pairwise(path[:8])), "it falls with every step"
        assert path[7:] == [0.1] * 3
    first = seen[0][1]
    assert first == pytest.approx(1 - 0.9 / 7 if shape == "linear" else 0.1 + 0.45 * (1 + math.cos(math.pi / 7)))


def test_it_can_also_go_up() -> None:
    model = soft_network(0.0)
    schedule = SoftnessSchedule(model, end=2.0, steps=2, shape="linear")
    schedule.step()
    assert {layer.softness for layer in layers(model)} == {1.0}


def test_the_output_at_the_nominal_input_stays_and_elsewhere_moves_in_small_steps() -> None:
    layer = standardised(softness=1.0, nominal=0.9)
    x = nominal_input(layer, 0.9)
    other = x * 1.7
    before, last = layer(x), layer(other)
    schedule = SoftnessSchedule(layer, steps=20)
    whole = standardised(softness=0.0, nominal=0.9)(other) - last
    for _ in range(20):
        schedule.step()
        torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
        now = layer(other)
        assert (now - last).abs().max() < 0.15 * whole.abs().max()
        last = now
    torch.testing.assert_close(last, standardised(softness=0.0, nominal=0.9)(other), rtol=1e-12, atol=1e-12)


def test_many_small_steps_lose_nothing_in_half_precision() -> None:
    """The setter alone would: a 3000th of the way is below half of the last digit of bfloat16."""
    model, once = soft_network(1.0).bfloat16(), soft_network(1.0).bfloat16()
    schedule = SoftnessSchedule(model, steps=3000, shape="linear")
    for _ in range(3000):
        schedule.step()
    for layer in layers(once):
        layer.softness = 0.0
    assert same_state(model, once)
    assert layers(model)[0].channel_gain.dtype == torch.bfloat16


@pytest.mark.parametrize("load_model", [True, False])
def test_exact_resume(load_model: bool) -> None:
    model = soft_network()
    fresh = copy.deepcopy(model)
    schedule = SoftnessSchedule(model, steps=6)
    for _ in range(2):
        schedule.step()
    state, tensors = copy.deepcopy(schedule.state_dict()), copy.deepcopy(model.state_dict())
    if load_model:  # the gains come with it, the softness does not
        fresh.load_state_dict(tensors)
    resumed = SoftnessSchedule(fresh, end=5.0, steps=1)
    resumed.load_state_dict(state)
    assert same_state(model, fresh)
    for _ in range(3):
        schedule.step()
        resumed.step()
    assert same_state(model, fresh)
    assert [layer.softness for layer in layers(model)] == [layer.softness for layer in layers(fresh)]


def test_plain_layers_have_a_softness_too() -> None:
    layer = FusedGroupNorm(2, 4, softness=0.5)
    SoftnessSchedule(layer, steps=1).step()
    assert layer.softness == 0.0
    assert layer.channel_gain is None


def test_a_saved_network_in_the_middle_of_it_loads_as_it_is(tmp_path: Path) -> None:
    model, _ = build("plain")
    converted = gnswap.convert(model, groups=4, softness=1.0).model
    schedule = SoftnessSchedule(converted, steps=4)
    schedule.step()
    gnswap.save(converted, tmp_path / "half-way")
    loaded = gnswap.load(tmp_path / "half-way", model)
    assert [layer.softness for layer in layers(loaded)] == [layer.softness for layer in layers(converted)]
    assert same_state(loaded, converted)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"steps": 0}, "steps is out of range"),
        ({"steps": 3, "end": -1.0}, "end is out of range"),
        ({"steps": 3, "end": math.nan}, "end is out of range"),
        ({"steps": 3, "shape": "square"}, "shape is out of range"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ArgumentError, match=problem):
        SoftnessSchedule(soft_network(), **options)


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(ArgumentError, match="the model has no softness"):
        SoftnessSchedule(nn.Linear(2, 2), steps=3)


def test_the_state_of_another_network_is_refused() -> None:
    state = SoftnessSchedule(FusedGroupNorm(2, 4, softness=1.0), steps=2).state_dict()
    with pytest.raises(ArgumentError, match="the state is of another network"):
        SoftnessSchedule(soft_network(), steps=2).load_state_dict(state)
