"""Absorbed activations: only where the graph proves it, the same outputs, and everything undone bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from _models import randomise_norms
from torch import Tensor, nn

import gnswap
from gnswap import FusedGroupNorm, Plan
from gnswap._errors import PlanMismatchError, RevertError


class Block(nn.Module):
    """A convolution, a norm and an activation, and a way to get forward wrong."""

    def __init__(self, act: nn.Module, then: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), act
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.act(y) if self.then is None else self.then(self, y)


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def block(act: nn.Module | None = None, then: Callable[[nn.Module, Tensor], Tensor] | None = None) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(Block(act or nn.ReLU(inplace=True), then)).eval()


def pair(model: nn.Module, **options: object) -> tuple[nn.Module, nn.Module, Plan]:
    """The model converted with and without absorbing, and the plan that absorbs."""
    plan = gnswap.plan(model, absorb=True, groups=4, **options)
    return gnswap.apply(model, plan), gnswap.apply(model, gnswap.plan(model, groups=4, **options)), plan


def same_network(a: nn.Module, b: nn.Module) -> bool:
    kinds = [[(name, type(module)) for name, module in m.named_modules(remove_duplicate=False)] for m in (a, b)]
    states = [m.state_dict() for m in (a, b)]
    return kinds[0] == kinds[1] and all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.ReLU6(), nn.Hardswish(), nn.GELU()])
def test_it_is_computed_by_the_norm_and_nowhere_else(act: nn.Module) -> None:
    model = block(act)
    absorbed, plain, plan = pair(model)
    assert plan.decisions[0].absorbs == ("act",)
    assert "computes act as well" in plan.decisions[0].reason
    assert type(absorbed.act) is nn.Identity
    assert absorbed.bn.fused_act is not None
    assert type(plain.act) is type(act)
    torch.testing.assert_close(absorbed(X), plain(X), rtol=1e-6, atol=1e-6)
    assert absorbed.state_dict().keys() == plain.state_dict().keys()


def test_not_unless_asked_for() -> None:
    plan = gnswap.plan(block(), groups=4)
    assert plan.decisions[0].absorbs is None
    assert plan.options["absorb"] is False


def test_the_conversion_takes_the_option() -> None:
    assert type(gnswap.convert(block(), groups=4, absorb=True).model.act) is nn.Identity


def test_revert_bit_for_bit_with_flags_and_hooks() -> None:
    model = block()
    absorbed, _, _ = pair(model)
    seen: list[str] = []
    absorbed.act.register_forward_hook(lambda *_: seen.append("act"))
    absorbed.train()
    back = gnswap.revert(absorbed)
    assert same_network(back, model)
    assert back.act.inplace
    assert back.act.training
    before = len(seen)
    torch.testing.assert_close(back.eval()(X), model(X), rtol=0, atol=0)
    assert len(seen) == before + 1


def test_in_place_and_twice() -> None:
    model = block()
    again = copy.deepcopy(model)
    converted = gnswap.apply(model, gnswap.plan(model, absorb=True, groups=4), inplace=True)
    gnswap.revert(converted, inplace=True)
    assert same_network(converted, again)
    assert torch.equal(converted(X), again(X))


def test_save_and_load(tmp_path: Path) -> None:
    model = block()
    absorbed, _, plan = pair(model)
    gnswap.save(absorbed, tmp_path / "saved")
    loaded = gnswap.load(tmp_path / "saved", model)
    assert torch.equal(loaded(X), absorbed(X))
    assert type(loaded.act) is nn.Identity
    assert same_network(gnswap.revert(loaded), model)
    assert Plan.from_json(plan.to_json()) == plan


def test_an_activation_under_two_names() -> None:
    model = block()
    model.alias = model.act
    absorbed, plain, plan = pair(model)
    assert plan.decisions[0].absorbs == ("act", "alias")
    assert absorbed.act is absorbed.alias
    torch.testing.assert_close(absorbed(X), plain(X))
    back = gnswap.revert(absorbed)
    assert back.alias is back.act
    assert same_network(back, model)


def test_compare_and_heal_look_where_the_original_has_the_same() -> None:
    model = block(nn.SiLU())
    absorbed, plain, _ = pair(model)
    layers = [gnswap.compare(model, network, [X]).layers for network in (absorbed, plain)]
    assert [layer.name for found in layers for layer in found] == ["act", "bn"]
    assert layers[0][0].gain > 0.5


# ---------------------------------------------------------------- where it must not


def shared(self: nn.Module, y: Tensor) -> Tensor:
    return self.act(self.act(y) * 2)


def read_twice(self: nn.Module, y: Tensor) -> Tensor:
    return self.act(y) + y


def norm_twice(self: nn.Module, y: Tensor) -> Tensor:
    return self.act(self.bn(y))


def only_in_training(self: nn.Module, y: Tensor) -> Tensor:
    return self.act(y) if self.training else self.act(y) - y


def in_a_list(self: nn.Module, y: Tensor) -> Tensor:
    return self.hidden[0][0](y)


def past_its_call(self: nn.Module, y: Tensor) -> Tensor:
    return self.act.forward(self.act(y) * 2)


def by_its_kind(self: nn.Module, y: Tensor) -> Tensor:
    return self.act(y) * (2.0 if isinstance(self.act, nn.SiLU) else 1.0)


def by_value(self: nn.Module, y: Tensor) -> Tensor:
    return self.act(y) if y.sum() > 0 else y


@pytest.mark.parametrize(
    ("then", "note"),
    [
        (shared, "the module is called in several places"),
        (read_twice, "something else reads the norm's output as well"),
        (norm_twice, "the norm is called in several places"),
        (only_in_training, "something else reads the norm's output as well"),
        (past_its_call, "forward does something else where one is missing"),
        (by_its_kind, "forward does something else where one is missing"),
        (by_value, "torch.fx cannot follow it (TraceError"),
        (in_a_list, "torch.fx cannot follow it (NameError"),
    ],
)
def test_what_the_graph_does_not_prove_stays_and_is_said(
    then: Callable[[nn.Module, Tensor], Tensor], note: str
) -> None:
    model = block(nn.SiLU(), then)
    model.hidden = [[model.act]]
    training = model.training
    absorbed, plain, plan = pair(model)
    assert plan.decisions[0].absorbs is None
    assert any(note in one for one in plan.notes), plan.notes
    assert torch.equal(absorbed(X), plain(X))
    assert model.training is training


def test_an_identity_between_passes_the_value_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Identity(), nn.Identity(), nn.SiLU()).eval()
    absorbed, plain, plan = pair(model)
    assert plan.decisions[0].absorbs == ("4",)
    torch.testing.assert_close(absorbed(X), plain(X))
    model[2].register_forward_hook(lambda *_: None)
    assert gnswap.plan(model, absorb=True, groups=4).decisions[0].absorbs is None


@pytest.mark.parametrize("where", ["bn", "act"])
def test_hooks_stand_in_the_way(where: str) -> None:
    model = block()
    model.get_submodule(where).register_forward_hook(lambda *_: None)
    plan = gnswap.plan(model, absorb=True, groups=4)
    assert plan.decisions[0].absorbs is None
    assert plan.notes[-1] == "activation after bn not absorbed: hooks would see other values"


@pytest.mark.parametrize("act", [nn.GELU("tanh"), nn.PReLU(), nn.LeakyReLU(0.2)])
def test_another_function_is_left_alone(act: nn.Module) -> None:
    plan = gnswap.plan(block(act), absorb=True, groups=4)
    assert plan.decisions[0].absorbs is None
    assert plan.notes == ()


def test_torchvisions_single_relu_is_reported() -> None:
    model = randomise_norms(torchvision.models.resnet18()).eval()
    absorbed, plain, plan = pair(model)
    absorbs = {decision.name: decision.absorbs for decision in plan.swaps if decision.absorbs}
    assert absorbs == {"bn1": ("relu",)}  # the stem's own; a block calls its relu twice
    assert any("layer1.0.bn1" in note and "called in several places" in note for note in plan.notes)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(absorbed(x), plain(x), rtol=1e-4, atol=1e-4)
    assert same_network(gnswap.revert(absorbed), model)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 9), ("mobilenetv3_small_050", 0)])
def test_timm(name: str, count: int) -> None:
    """timm's ResNet has modules of its own for each activation; MobileNet's norms hold theirs already."""
    model = randomise_norms(timm.create_model(name)).eval()
    absorbed, plain, plan = pair(model, overrides={"*": {"groups": 1}} if count == 0 else None)
    assert sum(decision.absorbs is not None for decision in plan.swaps) == count
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(absorbed(x), plain(x), rtol=1e-4, atol=1e-4)
    assert same_network(gnswap.revert(absorbed), model)


# ---------------------------------------------------------------- plans that do not fit


@pytest.mark.parametrize(
    ("absorbs", "found"),
    [
        (("nowhere",), "no module has this path"),
        ((), "found"),
        (("conv",), "found Conv2d"),
        (("act", "bn"), "found one under act"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(absorbs: tuple[str, ...], found: str) -> None:
    model = block()
    before = copy.deepcopy(model)
    plan = gnswap.plan(model, groups=4).edit("bn", absorbs=absorbs)
    with pytest.raises(PlanMismatchError, match=f"absorbs is not there as planned.*{found}"):
        gnswap.apply(model, plan, inplace=True)
    assert same_network(model, before)


def test_hooks_that_came_later_are_seen_by_apply() -> None:
    model = block()
    plan = gnswap.plan(model, absorb=True, groups=4)
    model.act.register_forward_hook(lambda *_: None)
    with pytest.raises(PlanMismatchError, match="without hooks"):
        gnswap.apply(model, plan)


def test_a_norm_with_an_activation_of_its_own_takes_no_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), timm.layers.BatchNormAct2d(16, act_layer=nn.ReLU), nn.ReLU())
    plan = gnswap.plan(model, absorb=True, groups=4)
    assert plan.decisions[0].absorbs is None
    with pytest.raises(PlanMismatchError, match="without an activation of its own"):
        gnswap.apply(model, plan.edit("1", absorbs=("2",)))


def test_a_changed_place_is_not_reverted() -> None:
    absorbed, _, _ = pair(block())
    absorbed.act = nn.ReLU()
    with pytest.raises(RevertError, match="an absorbed activation was replaced"):
        gnswap.revert(absorbed)
    del absorbed.act
    with pytest.raises(RevertError, match="the place of an activation is gone"):
        gnswap.revert(absorbed)


def test_the_layer_says_what_it_computes() -> None:
    absorbed, _, _ = pair(block())
    assert isinstance(absorbed.bn, FusedGroupNorm)
    assert "ReLU(inplace=True)" in repr(absorbed.bn)
