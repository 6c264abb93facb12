"""Refitting: right for every kind of layer, helps on photos it has not seen, and gives back what it does not help."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

import gnswap
from gnswap import ArgumentError, CalibrationError, _least_squares, _refit
from gnswap._least_squares import Sums, best_fit, can_fit
from gnswap._lockstep import Walk
from tests._models import ZOO, build, randomise_norms, same_state
from tests.test_heal import networks, photos

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1x1": (nn.Conv2d(6, 8, 1, bias=False), (6, 5, 7)),
    "bias": (nn.Conv2d(6, 8, 1), (6, 5, 7)),
    "3x3, padded, strided": (nn.Conv2d(3, 5, 3, 2, 1), (3, 9, 8)),
    "dilated, two paddings": (nn.Conv2d(3, 5, (3, 2), 1, (2, 1), (2, 3)), (3, 9, 8)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (3, 6, 6)),
    "same": (nn.Conv2d(3, 5, 3, padding="same"), (3, 6, 6)),
    "timm's same": (Conv2dSame(3, 5, 3, 2, bias=False), (3, 7, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (6, 6, 6)),
    "depthwise, two outputs": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (6, 6, 6)),
    "grouped": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (6, 6, 6)),
    "1-D": (nn.Conv1d(4, 6, 5, 2, 2), (4, 20)),
    "3-D": (nn.Conv3d(3, 4, 3, padding=1), (3, 4, 5, 4)),
    "linear": (nn.Linear(6, 4), (6,)),
    "linear of tokens": (nn.Linear(6, 4, bias=False), (9, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_kind_of_layer(name: str) -> None:
    """The sums are those of the layer's own error, and from exact data the fit finds the weight behind it."""
    torch.manual_seed(0)
    wanted, shape = LAYERS[name]
    layer = copy.deepcopy(wanted)
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(64, *shape)
    y = wanted(x)
    sums = [Sums.of(layer, x[first::2], y[first::2]) for first in (0, 1)]
    whole = sums[0] + sums[1]
    mistake = float((layer(x) - y).square().sum())
    assert float(whole.error.sum()) == pytest.approx(mistake, rel=1e-4)
    fit = best_fit(*sums)
    assert fit.strength == min(_least_squares._STRENGTHS)
    assert 0.98 < fit.gain <= 1
    promised = float((whole.error - whole.gain(fit.change)).sum())
    _least_squares.add(layer, fit.change)
    left = float((layer(x) - y).square().sum())
    assert left == pytest.approx(promised, rel=1e-2, abs=1e-5 * mistake)
    assert left < 1e-3 * mistake


def test_many_positions_are_thinned_out() -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1, stride=2)
    x = torch.randn(2, 2, 120, 120)
    design, _ = _least_squares._tables(layer, x, layer(x).detach())
    assert design.shape == (1, 2 * 20 * 20, 2 * 9 + 1)  # every third of 60


def test_noise_is_not_learned() -> None:
    """What says nothing about the other half is refused, dead inputs do no harm, and rounding is no error."""
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 4), torch.randn(48, 40)
    x[:, 7] = 0
    noise = [torch.randn(24, 4) for _ in range(2)]
    fit = best_fit(
        *(Sums.of(layer, part, layer(part).detach() + other) for part, other in zip(x.split(24), noise, strict=True))
    )
    assert fit.gain < _refit._LEAST_GAIN
    assert fit.change.isfinite().all()
    assert torch.equal(fit.change[:, 7], torch.zeros_like(fit.change[:, 7]))
    exact = best_fit(*(Sums.of(layer, part, layer(part).detach()) for part in x.split(24)))
    assert exact.gain == 0


def test_what_can_be_fitted() -> None:
    class Standardised(nn.Conv2d):
        pass

    assert not can_fit(Standardised(3, 4, 3))
    assert not can_fit(nn.ConvTranspose2d(3, 4, 3))
    assert not can_fit(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))


def test_it_comes_closer_on_photos_that_nobody_has_seen() -> None:
    original, converted = networks()
    fresh = [photos(64, seed=9)]
    before = gnswap.compare(original, converted, fresh)
    start = copy.deepcopy(converted.state_dict())
    report = gnswap.refit(converted, original, [photos(64)])
    after = gnswap.compare(original, converted, fresh)
    assert before.kl is not None
    assert after.kl is not None
    assert after.kl < 0.8 * before.kl
    assert report.refitted
    assert report.verdict.startswith("refitted ")
    assert (report.photos, report.held_out) == (64, 16)
    assert report.distance[1] < report.distance[0]
    assert "0" in {layer.name for layer in report.layers if layer.strength is None}, "the first sees no norm"
    changed = {name for name, tensor in converted.state_dict().items() if not torch.equal(tensor, start[name])}
    fitted = {layer.name for layer in report.layers if layer.strength is not None}
    assert {name.rpartition(".")[0] for name in changed} == fitted, "the norms stay"


@pytest.mark.parametrize("name", ["pre-activation", "1-D", "1-D, no length", "3-D", "eps 1e-3", "aliased"])
def test_any_network(name: str) -> None:
    original, _ = build(name)
    converted = gnswap.convert(original, softness=0).model
    report = gnswap.refit(converted, original, [torch.randn(32, *ZOO[name][1])])
    if report.refitted and "squared error of the logits" not in report.verdict:
        assert report.distance[1] < report.distance[0]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in original.modules())


def test_the_same_bits_again_in_any_order() -> None:
    original, converted = networks()
    again = copy.deepcopy(converted)
    x = photos()
    gnswap.refit(converted, original, [x])
    gnswap.refit(again, original, list(x.flip(0).split(7)))
    assert same_state(converted, again)


def test_what_does_not_help_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original, converted = networks()
    start = copy.deepcopy(converted)
    monkeypatch.setattr(_least_squares, "add", lambda layer, _change: layer.weight.mul_(-3))
    report = gnswap.refit(converted, original, [photos()])
    assert not report.refitted
    assert report.verdict.startswith("not refitted: it would take distance")
    assert same_state(converted, start)
    gnswap.revert(converted)  # nothing was trained


def test_an_interruption_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    original, converted = networks()
    start, threads = copy.deepcopy(converted), threading.active_count()
    fit = _refit._fit

    def interrupted(name: str, *rest: Any) -> Any:
        if name == "3":
            raise KeyboardInterrupt
        return fit(name, *rest)

    monkeypatch.setattr(_refit, "_fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gnswap.refit(converted, original, [photos()])
    assert same_state(converted, start)
    assert threading.active_count() == threads
    for model in (original, converted):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Branches(nn.Module):
    """A layer called twice, two that share a weight, a frozen one; and a way that depends on who asks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.first, self.twice, self.frozen = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.one, self.two, self.free = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight
        self.frozen.requires_grad_(False)
        self.order: list[nn.Module] = [self.one, self.two, self.free]

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.twice(self.twice(self.norm(self.first(x)))))
        for layer in self.order:
            x = layer(x)
        return x


def test_which_layers_keep_their_weights() -> None:
    torch.manual_seed(0)
    original = randomise_norms(Branches()).eval()
    converted = gnswap.convert(original, groups=2, softness=0).model
    report = gnswap.refit(converted, original, [photos(32)])
    assert [layer.name for layer in report.layers] == ["first", "free"]
    assert not converted.frozen.weight.requires_grad


def test_networks_that_go_different_ways() -> None:
    original = randomise_norms(Branches()).eval()
    original.two = nn.Conv2d(8, 8, 1)
    original.order = [original.one, original.two, original.free]
    converted = gnswap.convert(original, groups=2, softness=0).model
    start = copy.deepcopy(converted)
    original.order = original.order[::-1]
    with pytest.raises(ArgumentError, match="different ways through their layers") as caught:
        gnswap.refit(converted, original, [photos(32)])
    assert "refit, one" in str(caught.value)
    assert same_state(converted, start)


def test_saved_loaded_and_no_longer_reverted(tmp_path: Path) -> None:
    original, converted = networks()
    gnswap.refit(converted, original, [photos(64)])
    gnswap.save(converted, tmp_path / "refitted")
    assert torch.equal(gnswap.load(tmp_path / "refitted", original)(photos()), converted(photos()))
    with pytest.raises(gnswap.RevertError, match="the network has changed since its conversion"):
        gnswap.revert(converted)


def test_what_it_refuses() -> None:
    original, converted = networks()
    with pytest.raises(CalibrationError, match="too few photos to refit with"):
        gnswap.refit(converted, original, [photos(5)])
    with pytest.raises(ArgumentError, match="was not converted by gnswap") as caught:
        gnswap.refit(original, original, [photos()])
    assert "refit.converted" in str(caught.value)


def test_a_walk_stops_goes_on_fails_and_is_given_up() -> None:
    threads = threading.active_count()
    walk = Walk(lambda stop: [stop(number) for number in (1, 2)])
    assert [walk.go_on() for _ in range(4)] == [1, 2, None, None]

    def fails(stop: Any) -> None:
        stop(torch.is_grad_enabled())
        raise ValueError("on the way")

    walk = Walk(fails)
    assert walk.go_on() is False
    with pytest.raises(ValueError, match="on the way"):
        walk.go_on()
    ended = []

    def waits(stop: Any) -> None:
        try:
            stop(1)
        except Exception:  # somebody's forward may catch everything that is an error
            stop(2)
        finally:
            ended.append(True)

    walk = Walk(waits)
    walk.go_on()
    walk.give_up()
    assert ended
    Walk(waits).give_up()  # before it began
    assert threading.active_count() == threads
