"""What moves from a norm to its layer and back, and that a failing swap leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from _models import small_cnn
from torch import nn

from gnswap import _carry
from gnswap._errors import ModelError, RevertError


class Stubborn(nn.Module):
    """A container that hands out another module than the one it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        class Modules(dict):  # type: ignore[type-arg]
            def __setitem__(self, key: str, value: nn.Module) -> None:
                super().__setitem__(key, nn.Identity() if key == "b" and type(value) is nn.ReLU else value)

        self.__dict__["_modules"] = Modules(self._modules)


def test_replace_all_takes_everything_back_when_a_container_resists() -> None:
    model = Stubborn()
    a, b = model.a, model.b
    with pytest.raises(ModelError, match=r"a layer is not where it was put \(at b\).*expected ReLU, found Identity"):
        _carry.replace_all(model, [("a",), ("b",)], [nn.ReLU(), nn.ReLU()])
    assert model.a is a
    assert model.b is b


def test_replace_all_takes_everything_back_on_any_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_cnn()
    before = list(model)
    calls = []

    def failing(root, paths, new, real=_carry.replace):  # type: ignore[no-untyped-def]
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(root, paths, new)

    monkeypatch.setattr(_carry, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        _carry.replace_all(model, [("1",), ("4",)], [nn.Identity(), nn.Identity()])
    assert all(one is other for one, other in zip(model, before, strict=True))


def test_uncopyable_models() -> None:
    model = small_cnn()
    model.handle = (number for number in range(3))
    with pytest.raises(ModelError, match=r"cannot be copied.*generator.*inplace=True"):
        _carry.copied(model)


def test_restore_needs_an_origin() -> None:
    with pytest.raises(RevertError, match=r"does not know the BatchNorm.*\(at|does not know"):
        _carry.restore(nn.Identity(), "head.norm")


def test_statistics_that_never_had_values() -> None:
    norm = nn.BatchNorm2d(4, device="meta")
    layer = nn.BatchNorm2d(4)  # stands for the layer that was filled later
    _carry.carry_over(norm, layer, weight=norm.weight, bias=norm.bias)
    with pytest.raises(RevertError, match=r"never had values \(at bn\.running_mean\)"):
        _carry.restore(layer, "bn")


def test_a_third_partys_names_come_back() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(4))
            self.register_buffer("beta", torch.zeros(4))

    norm, layer = Norm(), nn.BatchNorm2d(4)
    _carry.carry_over(norm, layer, weight=norm.gamma, bias=norm.beta)
    layer.weight = norm.gamma
    layer.bias = nn.Parameter(torch.full((4,), 3.0))
    restored = _carry.restore(layer, "bn")
    assert type(restored) is Norm
    assert restored.gamma is norm.gamma
    assert restored.beta.tolist() == [3.0] * 4
    assert "beta" in restored._buffers
