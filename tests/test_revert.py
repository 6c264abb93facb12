"""revert: the original bit for bit, or an error that says what stands against it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from _models import ZOO, build, randomise_norms, same_state, small_cnn
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn

from gnswap import _sites
from gnswap._apply import apply
from gnswap._errors import ModelError, RevertError, WrappedModelError
from gnswap._layer import FusedGroupNorm
from gnswap._plan import plan
from gnswap._revert import revert


def convert(model: nn.Module, *, inplace: bool = False, **options: Any) -> nn.Module:
    return apply(model, plan(model, **options), inplace=inplace)


def plain_attributes(model: nn.Module) -> dict[str, Any]:
    """Type, mode, momentum and so on of every module under every name."""
    return {
        path: (type(module), {k: v for k, v in vars(module).items() if isinstance(v, str | int | float | bool | None)})
        for path, module in model.named_modules(remove_duplicate=False)
    }


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("through", ["nothing", "deepcopy", "pickle"])
def test_pitfall_18_bit_for_bit(name: str, inplace: bool, through: str) -> None:
    """timm's unfreeze loses momentum, num_batches_tracked and the training flag."""
    model, x = build(name)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0123
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.fill_(77)
    expected, before = model(x), copy.deepcopy(model)
    converted = convert(model, inplace=inplace)
    if through == "deepcopy":
        converted = copy.deepcopy(converted)
    elif through == "pickle":
        converted = pickle.loads(pickle.dumps(converted))
    reverted = revert(converted, inplace=inplace)
    assert same_state(reverted, before)
    assert plain_attributes(reverted) == plain_attributes(before)
    assert torch.equal(reverted(x), expected)
    assert [paths for paths, _ in _sites.find_norms(reverted)] == [paths for paths, _ in _sites.find_norms(before)]
    assert _sites.fingerprint(reverted) == _sites.fingerprint(before)
    assert _sites.applied(reverted) is None
    assert (_sites.applied(converted) is None) == (inplace and name != "root")


def test_a_reverted_network_can_be_converted_again() -> None:
    model, x = build("aliased")
    converted = convert(model)
    assert torch.equal(convert(revert(converted))(x), converted(x))


def test_parameters_stay_the_same_objects() -> None:
    model, _ = build("plain")
    parameters = [id(p) for p in model.parameters()]
    reverted = revert(convert(model, inplace=True), inplace=True)
    assert reverted is model
    assert [id(p) for p in model.parameters()] == parameters


def test_todays_mode_and_flags() -> None:
    model, _ = build("plain")
    converted = convert(model).train()
    converted[1].weight.requires_grad_(False)
    reverted = revert(converted)
    assert reverted[1].training
    assert not reverted[1].weight.requires_grad


def test_fused_activation_and_frozen_norms() -> None:
    model = nn.Sequential(randomise_norms(BatchNormAct2d(8, act_layer=nn.PReLU))).eval()
    for original in (model, freeze_batch_norm_2d(copy.deepcopy(model))):
        converted = convert(original)
        reverted = revert(converted)
        assert type(reverted[0]) is type(original[0])
        assert same_state(reverted, original)
        x = torch.randn(2, 8, 3, 3)
        assert torch.equal(reverted(x), original(x))


def test_hooks_from_before_and_from_after_the_conversion() -> None:
    model, x = build("plain")
    seen: list[str] = []

    def remember(module: nn.Module, *_: Any) -> None:
        seen.append(type(module).__name__)

    first = model[1].register_forward_hook(remember)
    model[1].register_load_state_dict_pre_hook(remember)
    convert(model, inplace=True)
    second = model[1].register_full_backward_hook(remember)
    revert(model, inplace=True)
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["BatchNorm2d"] * 3
    first.remove()
    second.remove()
    seen.clear()
    model(x).sum().backward()
    assert not seen


def test_training_stands_against_it() -> None:
    model, x = build("plain")
    converted = convert(model)
    optimizer = torch.optim.SGD(converted[1:2].parameters(), lr=0.1)
    converted(x).square().sum().backward()
    optimizer.step()
    state = copy.deepcopy(converted.state_dict())
    with pytest.raises(RevertError, match=r"has changed since.*1\.weight, 1\.bias.*force=True"):
        revert(converted)
    forced = revert(converted, force=True)
    assert torch.equal(forced[1].weight, state["1.weight"])
    assert torch.equal(forced[1].running_mean, model[1].running_mean)
    assert forced[1].momentum == model[1].momentum


def test_many_changes_are_counted() -> None:
    converted = convert(build("plain")[0]).double()
    with pytest.raises(RevertError, match=r"0\.weight, 0\.bias, 1\.weight and \d+ more"):
        revert(converted)
    forced = revert(converted, force=True)
    assert {t.dtype for n, t in forced.state_dict().items() if "num_batches" not in n} == {torch.float64}
    assert forced(torch.randn(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_a_changed_softness_is_no_obstacle_to_the_original_where_it_is_forced() -> None:
    model, x = build("plain")
    converted = convert(model)
    converted[1].softness = 0.25  # changes channel_gain
    with pytest.raises(RevertError, match=r"1\.channel_gain"):
        revert(converted)
    assert torch.equal(revert(converted, force=True)(x), model(x))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = small_cnn()
    converted = convert(model)
    assert plain_attributes(revert(converted)) == plain_attributes(model)
    filled = converted.to_empty(device="cpu")
    with pytest.raises(RevertError, match="has changed"):
        revert(filled)
    with pytest.raises(RevertError, match="never had values"):
        revert(filled, force=True)


def test_what_was_never_converted() -> None:
    with pytest.raises(RevertError, match="no record of a conversion"):
        revert(small_cnn())
    with pytest.raises(RevertError, match=r"no record of a conversion.*as a whole"):
        revert(convert(small_cnn())[:3])
    with pytest.raises(WrappedModelError, match="DataParallel"):
        revert(nn.DataParallel(convert(small_cnn())))


def test_a_layer_that_is_gone_or_replaced() -> None:
    for change, match in (
        (lambda m: m.__setitem__(4, nn.Identity()), "was replaced.*found Identity"),
        (lambda m: m.__setitem__(4, FusedGroupNorm(1, 24)), "was replaced"),
        (lambda m: m.__delitem__(slice(4, None)), "is gone"),
    ):
        converted = convert(small_cnn())
        change(converted)
        with pytest.raises(RevertError, match=match):
            revert(converted, force=True, inplace=True)
        assert isinstance(converted[1], FusedGroupNorm)  # nothing was changed


def test_an_uncopyable_model() -> None:
    converted = convert(small_cnn())
    converted.handle = (number for number in range(3))
    with pytest.raises(ModelError, match=r"cannot be copied.*inplace=True"):
        revert(converted)
    assert isinstance(revert(converted, inplace=True)[1], nn.BatchNorm2d)
