"""Every check of the zoo fails on a network in which what it looks for is broken, and passes where nothing is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gnswap
from tests.test_zoo import _zoo_cases, _zoo_checks, photos

Case = _zoo_cases.Case
CHECKS = _zoo_checks.CHECKS


class Through(nn.Module):
    """A layer that does anything."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Changed(nn.Module):
    """A layer that fuses, copies and unpickles into another layer than itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def fuse(self) -> nn.Module:
        return nn.Flatten(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return nn.Tanh()

    def __reduce__(self) -> Any:
        return nn.Tanh, ()


class Fusable(nn.Module):
    """A layer that `timm.utils.reparameterize_model` replaces by one that was given."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        return x

    def fuse(self) -> nn.Module:
        return self.fused


@pytest.fixture(scope="module")
def whole() -> Any:
    return _zoo_cases.make_case("test_resnet", photos(), (64,))


def broken(case: Any, change: Callable[[nn.Module], object], both: bool = False) -> Any:
    """The case with another converted network, and another original where `both`."""
    model, original = copy.deepcopy(case.converted), copy.deepcopy(case.original)
    change(model)
    if both:
        change(original)
    return Case(case.name, original, dataclasses.replace(case.conversion, model=model), case.x)


def behind(layer: nn.Module) -> Callable[[nn.Module], object]:
    """A change: this layer behind the classifier."""
    return lambda model: setattr(model, "fc", nn.Sequential(model.fc, layer))


def instead(name: str, function: Callable[..., Any]) -> Callable[[nn.Module], object]:
    """A change: another method."""
    return lambda model: vars(model).update({name: lambda *arguments: function(model, *arguments)})


def first_norm(model: nn.Module) -> gnswap.FusedGroupNorm:
    return next(module for module in model.modules() if isinstance(module, gnswap.FusedGroupNorm))


def louder_in_batches(model: nn.Module) -> None:
    norm = first_norm(model)
    norm.forward = lambda x: type(norm).forward(norm, x) * len(x)  # type: ignore[method-assign]


def frozen(model: nn.Module, norms: bool) -> None:
    for module in model.modules():
        if isinstance(module, gnswap.FusedGroupNorm) is norms:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def last_layout(x: Tensor) -> Tensor:
    return x * 2 if x.is_contiguous(memory_format=torch.channels_last) else x


BROKEN: tuple[tuple[str, Callable[[nn.Module], object], str], ...] = (
    ("no norm left", behind(nn.BatchNorm1d(1000)), r"left without a reason: \['fc.1'\]"),
    ("no norm left", behind(gnswap.FusedGroupNorm(1, 1000)), "16 GroupNorms for 15 swaps"),
    ("output", behind(Through(lambda x: x / 0)), "the output is not finite"),
    ("output", behind(nn.Flatten(0)), "shapes "),
    ("closer than naive", behind(Through(lambda x: x * 100)), "of the naive swap"),
    ("batch independence", behind(Through(lambda x: x - x.mean(0))), "depends on the other samples"),
    ("batch independence", louder_in_batches, r"other bits for a row alone: \['conv1.1'\]"),
    ("revert", lambda model: setattr(model, "act1", nn.Tanh()), "other modules after revert"),
    ("revert", behind(nn.Tanh()), "the network has changed since its conversion"),
    ("deepcopy", behind(Changed()), "another output of the copy"),
    ("pickle", behind(Changed()), "another output after pickle"),
    ("pickle", behind(Through(lambda x: x)), "pickle"),
    ("channels_last", lambda model: setattr(model, "act1", Through(last_layout)), "ten times the original's"),
    ("train step", lambda model: frozen(model, True), "no gamma changed"),
    ("train step", lambda model: frozen(model, False), "no weight changed"),
    ("train step", behind(Through(lambda x: x * 0)), "all gradients are 0"),
    ("train step", behind(Through(lambda x: (x - x.detach()).sqrt())), "gradients that are not finite"),
    ("train step", behind(Through(lambda x: x if torch.is_grad_enabled() else x / 0)), "the output after a step"),
    ("reset_classifier", instead("reset_classifier", lambda model, _: setattr(model, "fc", nn.Identity())), "shapes "),
    ("forward_features", instead("forward", lambda model, x: type(model).forward(model, x) * 2), "in one step"),
    ("forward_features", instead("forward_head", lambda _, x: x.mean((2, 3))), "shapes "),
)


@pytest.mark.parametrize(("title", "change", "fault"), BROKEN, ids=[f"{t}-{i}" for i, (t, *_) in enumerate(BROKEN)])
def test_checks_find(whole: Any, title: str, change: Callable[[nn.Module], object], fault: str) -> None:
    with pytest.raises(Exception, match=fault) as found:
        CHECKS[title](broken(whole, change))
    assert not isinstance(found.value, _zoo_checks.DoesNotApply)


def test_nothing_is_found_where_nothing_is_broken() -> None:
    row = _zoo_checks.examine("test_resnet", photos(), (64,))
    assert row["passed"] == list(CHECKS)[:-2]
    assert row["does_not_apply"] == dict.fromkeys(list(CHECKS)[-2:], "nothing to fuse")
    assert row["layers"] == {"BatchNorm2d": 15}
    assert 0 < row["distance"] < 1


def test_revert_with_other_values_is_found(whole: Any) -> None:
    original = copy.deepcopy(whole.original)
    with torch.no_grad():
        original.fc.weight[0, 0] += 1
    with pytest.raises(_zoo_checks.Fault, match=r"other values after revert: \['fc.weight'\]"):
        CHECKS["revert"](Case(whole.name, original, whole.conversion, whole.x))


def test_loading_something_else_is_found(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gnswap, "load", lambda _: whole.original)
    with pytest.raises(_zoo_checks.Fault, match="another output after loading"):
        CHECKS["save and load"](whole)


def test_other_feature_maps_are_found(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = gnswap.convert
    wrong = Through(lambda x: x)
    monkeypatch.setattr(gnswap, "convert", lambda model: dataclasses.replace(convert(model), model=wrong))
    with pytest.raises(_zoo_checks.Fault, match="shapes "):
        CHECKS["features_only"](whole)


def test_a_check_that_the_original_fails_does_not_apply(whole: Any) -> None:
    case = broken(whole, instead("forward_head", lambda *_: 1 / 0), both=True)
    with pytest.raises(_zoo_checks.DoesNotApply, match="ZeroDivisionError"):
        CHECKS["forward_features"](case)
    with pytest.raises(_zoo_checks.DoesNotApply, match="pickle"):
        CHECKS["pickle"](broken(whole, behind(Through(lambda x: x)), both=True))
    with pytest.raises(_zoo_checks.DoesNotApply, match="nothing to fuse"):
        CHECKS["convert, then fuse"](whole)


def test_a_fused_network_that_lost_its_answers_is_found(whole: Any) -> None:
    case = broken(whole, behind(Fusable(nn.Identity())), both=True)
    assert CHECKS["fuse, then convert"](case) == {"norms_after_fusing": 15}
    CHECKS["convert, then fuse"](case)
    lost = broken(whole, behind(Fusable(nn.Tanh())), both=True)
    with pytest.raises(_zoo_checks.Fault, match="fused without an error, but the output is another one"):
        CHECKS["convert, then fuse"](lost)


def test_an_unclear_error_of_fusing_is_found(whole: Any) -> None:
    case = broken(whole, behind(Fusable(nn.Identity())), both=True)
    case.converted.fc[1] = Fusable(nn.Identity())
    case.converted.fc[1].fuse = lambda: 1 / 0
    with pytest.raises(_zoo_checks.Fault, match="unclear: ZeroDivisionError"):
        CHECKS["convert, then fuse"](case)


def test_a_fused_network_that_converts_into_nonsense_is_found(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = broken(whole, behind(Fusable(nn.Identity())), both=True)
    nonsense = broken(whole, behind(Through(lambda x: x / 0))).conversion
    monkeypatch.setattr(gnswap, "convert", lambda _: nonsense)
    with pytest.raises(_zoo_checks.Fault, match="the output of the fused network is not finite"):
        CHECKS["fuse, then convert"](case)
    monkeypatch.setattr(_zoo_checks, "find_norms", lambda _: [])
    with pytest.raises(_zoo_checks.Fault, match="there was nothing to convert"):
        CHECKS["fuse, then convert"](case)
