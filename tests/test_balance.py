"""Loudness and centres: what they estimate is what the layer does; they keep a group's variance still, and small."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import gnswap
from gnswap import _balance
from gnswap._balance import balanced
from gnswap._estimate import Arrangement, Grouped, Tables, relative_error
from gnswap._records import Decision
from gnswap._sites import get
from gnswap._tuned_layer import TunedLayer
from tests.test_order import tables

ORDER = (3, 0, 1, 2, 7, 6, 5, 4)
SIGNS = (1, -1, 1, 1, -1, -1, 1, 1)


def skewed(samples: int, seed: int) -> Tables:
    """Channels whose mean square goes with their mean, as that of sparse activations does."""
    made = tables(samples, 16, seed)
    slope = torch.linspace(-1, 1, 16)
    none = made.patch_mean[:, :0]
    square = (slope * made.mean - slope.square() / 4).exp() * 0.8 + made.mean.square()
    return Tables(made.mean, square, none, none, made.nominal, made.weight)


def test_the_estimate_is_what_the_layer_does() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        for values in (norm.running_mean, norm.weight, norm.bias):
            assert values is not None
            values.normal_()
    x = torch.randn(6, 8, 5, 5) * torch.rand(6, 8, 1, 1) * 2 + torch.randn(6, 8, 1, 1)
    loudness, centre, gain = (tuple(values) for values in (0.5 + torch.rand(3, 8).double()).tolist())
    plan = gnswap.plan(norm, groups=2, softness=0.1).edit(
        "*", channel_order=ORDER, signs=SIGNS, loudness=loudness, centre=centre, gain=gain
    )
    with torch.no_grad():
        wanted, found = norm(x), gnswap.apply(norm, plan)(x)
    error = (found - wanted).norm() / (wanted - norm.bias.detach().view(-1, 1, 1)).norm()
    made = gnswap.calibrate(norm, [x]).layers[""].tables(gnswap._norms.read_norm(norm))
    made = dataclasses.replace(made, nominal=torch.ones(8) / (1 + norm.eps))
    arrangement = Arrangement(ORDER, SIGNS, loudness, centre)
    assert relative_error(made, 2, arrangement, norm.eps, 0.1, gain) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("arrangement", [Arrangement(), Arrangement(tuple(range(15, -1, -1)), (1, -1) * 8)])
def test_the_error_falls_on_samples_that_were_not_seen(arrangement: Arrangement) -> None:
    made = skewed(256, 0)
    found = balanced(made.rows(torch.arange(64)), 4, arrangement, 1e-5, 0.0)
    assert (found.order, found.signs) == (arrangement.order, arrangement.signs)
    others = made.rows(torch.arange(64, 256))
    before, after = (relative_error(others, 4, one, 1e-5, 0.0) for one in (arrangement, found))
    assert after < 0.9 * before
    assert 0 < float(Grouped.of(others, 4, found).constant_share().mean()) < 0.2


@pytest.mark.parametrize("softness", [1.0, 4.0, 32.0])
def test_a_soft_layer_is_balanced_with_less_of_the_penalty(monkeypatch: pytest.MonkeyPatch, softness: float) -> None:
    made = skewed(256, 0)
    errors = []
    for less in (_balance._LESS_WHERE_SOFT, 0.0):
        monkeypatch.setattr(_balance, "_LESS_WHERE_SOFT", less)
        found = balanced(made.rows(torch.arange(64)), 4, Arrangement(), 1e-5, softness)
        assert float(Grouped.of(made, 4, found).constant_share().mean()) < 0.2
        errors.append(relative_error(made.rows(torch.arange(64, 256)), 4, found, 1e-5, softness))
    assert errors[0] < 0.98 * errors[1]


def test_another_softness_has_a_balance_of_its_own() -> None:
    """The dial of a target turns a layer that was balanced pure into one that is balanced soft."""
    made = skewed(64, 0)
    drafted = Decision(("",), "BatchNorm2d", 16, "swap", "a test", num_groups=4)
    pure = TunedLayer(drafted, free_softness=True, tables=made, owner=torch.arange(64), eps=1e-5).balanced()
    soft = pure.softened(4.0)
    wanted = balanced(pure.seen, 4, Arrangement(), 1e-5, 4.0)
    assert (soft.decision.loudness, soft.decision.centre) == (wanted.loudness, wanted.centre)
    assert soft.decision.evidence["constant_share"] != pure.decision.evidence["constant_share"]
    share = soft.decision.evidence["constant_share"]
    assert f"softness 4 for the target, balanced for it, {share:.2g} of the group" in soft.decision.reason
    assert soft.decision.gain is None
    assert soft.with_level().softened(1.0).decision.gain is not None
    assert pure.softened(0.0).decision.loudness == pure.decision.loudness


def test_the_same_tables_give_the_same_balance() -> None:
    assert balanced(skewed(32, 1), 2, Arrangement(), 1e-5, 0.0) == balanced(skewed(32, 1), 2, Arrangement(), 1e-5, 0.0)


def test_inference_mode_is_no_obstacle() -> None:
    with torch.inference_mode():
        made = skewed(32, 1)
        found = balanced(made, 2, Arrangement(), 1e-5, 0.0)
    assert found == balanced(skewed(32, 1), 2, Arrangement(), 1e-5, 0.0)


def test_dead_channels_stay_finite() -> None:
    made = skewed(16, 2)
    made.nominal[:4], made.square[:, :4], made.mean[:, :4] = 0, 0, 0
    found = balanced(dataclasses.replace(made, weight=made.weight * made.nominal), 4, Arrangement(), 1e-5, 0.0)
    assert torch.tensor([found.loudness, found.centre]).isfinite().all()
    silent = dataclasses.replace(made, weight=made.weight * 0)
    assert balanced(silent, 4, Arrangement(), 1e-5, 0.0).loudness == (1.0,) * 16


def test_numbers_that_are_not_finite_leave_the_arrangement_as_it_is() -> None:
    made = skewed(16, 2)
    made.square[0, 0] = torch.inf
    assert balanced(made, 4, Arrangement(), 1e-5, 0.0) == Arrangement()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)]
    parts += [nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 6)]
    made = nn.Sequential(*parts)
    made.train()
    with torch.no_grad():
        for _ in range(60):
            made(photos(0))
    return made.eval()


def photos(seed: int) -> torch.Tensor:
    """Pictures of few bright spots, each of its own brightness: mean and mean square go together."""
    generator = torch.Generator().manual_seed(seed)
    spots = torch.rand(64, 3, 12, 12, generator=generator).pow(6)
    return spots * (0.2 + 2 * torch.rand(64, 1, 1, 1, generator=generator))


def test_photos_choose_it_and_the_plan_says_so(net: nn.Module, tmp_path: Path) -> None:
    plan = gnswap.plan(net, groups=4, softness=0, calibration=[photos(0)])
    assert any(note.startswith("taken: balanced; distance of the answers with") for note in plan.notes)
    for decision in plan.swaps:
        assert decision.loudness is not None
        assert decision.centre is not None
        assert "balanced on photos" in decision.reason
        assert 0 < decision.evidence["constant_share"] < 1
    without = gnswap.plan(net, groups=4, softness=0, order="natural", calibration=[photos(0)])
    assert all(decision.centre is None for decision in without.swaps)
    kl = [gnswap.compare(net, gnswap.apply(net, one), [photos(1)]).kl for one in (plan, without)]
    assert kl[0] < kl[1]  # type: ignore[operator]
    assert gnswap.Plan.from_json(plan.to_json()) == plan

    converted = gnswap.apply(net, plan)
    gnswap.save(converted, tmp_path / "kept")
    again = gnswap.load(tmp_path / "kept", copy.deepcopy(net))
    assert torch.equal(again(photos(1)), converted(photos(1)))
    reverted = gnswap.revert(converted)
    assert torch.equal(reverted(photos(1)), net(photos(1)))


def test_a_change_of_softness_keeps_the_nominal_output(net: nn.Module) -> None:
    plan = gnswap.plan(net, groups=4, softness=1.0).edit("1", loudness=(0.5, 2.0) * 16, centre=(0.1, -0.3) * 16)
    layer = get(gnswap.apply(net, plan), "1")
    softer = get(gnswap.apply(net, plan.edit("1", softness=3.0)), "1")
    layer.softness = 3.0
    for name in ("channel_gain", "channel_correction", "channel_offset", "channel_scale", "channel_shift"):
        torch.testing.assert_close(getattr(layer, name), getattr(softer, name))
