"""apply: what the new layers compute, what they keep of the old ones, and all or nothing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from _models import ZOO, AliasedNorms, NormCalledTwice, build, mlp, randomise_norms, same_state, small_cnn
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from gnswap import _sites
from gnswap._apply import apply
from gnswap._errors import ArgumentError, ModelError, NothingToSwapError, PlanMismatchError, WrappedModelError
from gnswap._layer import FusedGroupNorm
from gnswap._plan import plan
from gnswap._records import Plan


def convert(model: nn.Module, *, inplace: bool = False, **options: Any) -> nn.Module:
    return apply(model, plan(model, **options), inplace=inplace)


def bits(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an apply on a copy of it must not touch."""
    return {
        path: (id(module), type(module), module.training, dict(vars(module)).keys())
        for path, module in model.named_modules(remove_duplicate=False)
    } | {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_same_bits(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value[1], Tensor):
            assert now[name][0] == value[0], name
            assert torch.equal(now[name][1], value[1]), name
        else:
            assert now[name] == value, name


def by_hand(norm: nn.Module, x: Tensor, num_groups: int, softness: float) -> Tensor:
    """The definition, in fp64 and in the words of the method, for one norm without activation."""
    x = x.double()
    shape = (1, -1, *([1] * (x.ndim - 2)))
    mean, var = norm.running_mean.double(), norm.running_var.double()
    z = (x - mean.view(shape)) / (var + norm.eps).sqrt().view(shape)
    nominal = (var / (var + norm.eps)).view(num_groups, -1).mean(1).repeat_interleave(len(var) // num_groups)
    y = F.group_norm(z, num_groups, eps=norm.eps + softness) * (nominal + norm.eps + softness).sqrt().view(shape)
    if norm.weight is not None:
        y = y * norm.weight.double().view(shape)
    return y if norm.bias is None else y + norm.bias.double().view(shape)


# what it computes


@pytest.mark.parametrize("softness", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (9,)), (nn.BatchNorm2d, (5, 6)), (nn.BatchNorm3d, (2, 3, 4))]
)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"eps": 1e-3}])
def test_the_layer_computes_the_definition(kind: Any, shape: Any, options: Any, softness: float) -> None:
    """Pitfall 27 (3-D and 5-D inputs), 14 (affine and bias off), 11 (eps 1e-3)."""
    norm = randomise_norms(kind(24, **options)).eval()
    x = torch.randn(3, 24, *shape) * 2 + 1
    layer = convert(norm, overrides={"(root)": {"groups": 4}}, softness=softness)
    torch.testing.assert_close(layer(x).double(), by_hand(norm, x, 4, softness), rtol=1e-5, atol=1e-5)


def test_vectors() -> None:
    model, x = build("1-D, no length")
    converted = convert(model)
    hidden = model[0](x)
    expected = by_hand(model[1], hidden, 1, 1.0)
    torch.testing.assert_close(converted[:2](x).double(), expected, rtol=1e-5, atol=1e-5)


def test_pitfall_8_a_norm_called_on_two_inputs() -> None:
    """Both calls are standardised by the one set of running statistics, as BatchNorm in eval mode does it."""
    model, x = build("called twice")
    assert isinstance(model, NormCalledTwice)
    converted = convert(model, groups=4, softness=0)
    first = by_hand(model.bn, model.conv1(x), 4, 0.0).float()
    second = by_hand(model.bn, model.conv2(torch.relu(first)), 4, 0.0).float()
    torch.testing.assert_close(converted(x), second, rtol=1e-4, atol=1e-4)


def test_order_and_signs_of_an_edited_plan() -> None:
    norm = randomise_norms(nn.BatchNorm2d(8)).eval()
    order = (3, 1, 0, 2, 7, 5, 6, 4)
    signs = (1, -1, 1, 1, -1, -1, 1, 1)
    edited = plan(norm, groups=2, softness=0).edit("*", channel_order=order, signs=signs)
    layer = apply(norm, edited)
    x = torch.randn(2, 8, 5, 5)
    z = F.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps) * torch.tensor(signs).view(1, -1, 1, 1)
    y = torch.empty_like(z)
    y[:, list(order)] = F.group_norm(z[:, list(order)], 2, eps=norm.eps)
    expected = y * (norm.weight * layer.channel_gain).view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.channel_gain.sign(), torch.tensor(signs).float())


def test_signs_on_a_layer_that_is_not_standardised() -> None:
    norm = randomise_norms(nn.BatchNorm2d(8)).eval()
    signs = (1, -1) * 4
    edited = plan(norm, groups=2, softness=0).edit("*", standardise=False, signs=signs)
    x, s = torch.randn(2, 8, 5, 5), torch.tensor(signs).view(1, -1, 1, 1)
    expected = F.group_norm(x * s, 2, eps=norm.eps) * s * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(apply(norm, edited)(x), expected, rtol=1e-5, atol=1e-5)


def test_without_running_statistics_it_is_torchs_group_norm() -> None:
    model, x = build("no running statistics")
    converted = convert(model, groups=4)
    assert not any("channel_" in name for name in converted.state_dict())
    norm = model[1]
    hidden = model[0](x)
    expected = F.group_norm(hidden, 4, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(converted[:2](x), expected)


@pytest.mark.parametrize("c", [1, 3, 8, 17, 24, 36, 40, 56, 72, 88, 120, 144, 997])
@pytest.mark.filterwarnings("ignore:.*got another number of groups:UserWarning")  # the point of the test
def test_pitfall_24_awkward_numbers_of_channels(c: int) -> None:
    norm = randomise_norms(nn.BatchNorm2d(c)).eval()
    layer = convert(norm, groups=32, overrides={"(root)": {"groups": 1}} if c == 1 else None)
    assert layer(torch.randn(2, c, 3, 3)).isfinite().all()


def test_pitfall_26_a_group_of_few_values_is_not_zeroed() -> None:
    """GN(4, 4) on (N, 4) is beta whatever the input: the default plan never makes such groups."""
    norm = randomise_norms(nn.BatchNorm1d(8)).eval()
    layer = convert(norm)
    one, two = layer(torch.randn(1, 8)), layer(torch.randn(1, 8))
    assert (one - two).abs().max() > 0.1


# where it goes


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("inplace", [False, True])
def test_every_kind_of_model(name: str, inplace: bool) -> None:
    model, x = build(name)
    before, sites = bits(model), [paths for paths, _ in _sites.find_norms(model)]
    parameters = {id(p) for p in model.parameters()}
    converted = convert(model, inplace=inplace)
    assert converted(x).isfinite().all()
    assert not _sites.find_norms(converted)
    for paths in sites:  # aliases stay aliases
        layers = {id(_sites.get(converted, path)) for path in paths}
        assert len(layers) == 1
        assert isinstance(_sites.get(converted, paths[0]), FusedGroupNorm)
    names = [n for n, _ in converted.named_modules(remove_duplicate=False)]
    assert len(names) == len(set(names))
    if inplace:
        assert {id(p) for p in converted.parameters()} == parameters
        assert (converted is model) == (name != "root")
    else:
        assert_same_bits(bits(model), before)
        assert not {id(p) for p in converted.parameters()} & parameters


def test_pitfall_9_no_phantom_modules() -> None:
    model, _ = build("named parents")
    count = len(list(model.parameters()))
    converted = convert(model, inplace=True)
    assert not any("." in name for module in converted.modules() for name in module._modules)
    assert len(list(converted.parameters())) == count


def test_kept_layers_are_left_as_they_are() -> None:
    model = small_cnn()
    kept = model[4]
    converted = convert(model, exclude="4", inplace=True)
    assert converted[4] is kept
    assert isinstance(converted[1], FusedGroupNorm)


# what is carried over


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_pitfall_13_dtype(dtype: torch.dtype) -> None:
    model, x = build("eps 1e-3")
    converted = convert(model.to(dtype))
    assert {t.dtype for t in converted.state_dict().values()} == {dtype}
    assert converted(x.to(dtype)).dtype == dtype
    assert converted[1].eps == 1e-3


def test_pitfall_13_flags_and_identity() -> None:
    model, _ = build("plain")
    model.train()
    model[4].eval()
    model[1].weight.requires_grad_(False)
    weight, bias, old = model[1].weight, model[1].bias, model[1].weight.clone()
    converted = convert(model, inplace=True)
    assert (converted[1].training, converted[4].training) == (True, False)
    assert converted[1].weight is weight
    assert converted[1].bias is bias
    assert torch.equal(weight, old)
    assert (weight.requires_grad, bias.requires_grad) == (False, True)


def test_pitfall_13_meta_device() -> None:
    with torch.device("meta"):
        model = small_cnn()
    converted = convert(model)
    assert all(t.is_meta for t in converted.state_dict().values())
    assert converted(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_pitfall_15_frozen_norms_are_converted_and_stay_frozen() -> None:
    model, _ = build("frozen affine")
    converted = convert(model)
    assert not any(p.requires_grad for p in converted[1].parameters())
    frozen = freeze_batch_norm_2d(build("plain")[0])
    converted = convert(frozen)
    assert isinstance(converted[1], FusedGroupNorm)
    assert isinstance(converted[1].weight, nn.Parameter)
    assert not converted[1].weight.requires_grad
    assert torch.equal(converted[1].weight, frozen[1].weight)


def test_activation_and_dropout_are_the_same_objects() -> None:
    norm = randomise_norms(BatchNormAct2d(16, act_layer=nn.SiLU, drop_layer=nn.Dropout)).eval()
    model = nn.Sequential(norm)
    act, drop = norm.act, norm.drop
    x = torch.randn(2, 16, 4, 4)
    converted = convert(model, groups=4, softness=0, inplace=True)
    assert converted[0].act is act
    assert converted[0].drop is drop
    torch.testing.assert_close(converted(x), F.silu(by_hand(norm, x, 4, 0.0)).float(), rtol=1e-4, atol=1e-5)


def test_pitfall_16_hooks_of_every_kind_and_their_handles() -> None:
    model, x = build("plain")
    seen: list[str] = []
    norm = model[1]
    handles = [
        norm.register_forward_hook(lambda *_: seen.append("forward")),
        norm.register_forward_pre_hook(lambda *_: seen.append("forward_pre")),
        norm.register_forward_pre_hook(lambda *_: seen.append("kwargs_pre"), with_kwargs=True),
        norm.register_full_backward_hook(lambda *_: seen.append("backward")),
        norm.register_full_backward_pre_hook(lambda *_: seen.append("backward_pre")),
        norm.register_state_dict_post_hook(lambda *_: seen.append("state_dict")),
        norm.register_state_dict_pre_hook(lambda *_: seen.append("state_dict_pre")),
        norm.register_load_state_dict_pre_hook(lambda module, *_: seen.append(f"load_pre {type(module).__name__}")),
        norm.register_load_state_dict_post_hook(lambda *_: seen.append("load")),
    ]
    del norm
    converted = convert(model, inplace=True)
    converted(x.requires_grad_()).sum().backward()
    converted.load_state_dict(converted.state_dict())
    expected = {
        "forward", "forward_pre", "kwargs_pre", "backward", "backward_pre", "state_dict", "state_dict_pre", "load",
        "load_pre FusedGroupNorm",
    }  # fmt: skip
    assert set(seen) == expected
    for handle in handles:
        handle.remove()
    seen.clear()
    converted(x).sum().backward()
    converted.load_state_dict(converted.state_dict())
    assert not seen


def test_pitfall_16_custom_attributes() -> None:
    model, _ = build("plain")
    model[1].tag, model[1].callback = "stem", len
    converted = convert(model)
    assert (converted[1].tag, converted[1].callback) == ("stem", len)
    assert converted[1].num_features == 16
    assert "momentum" not in vars(converted[1])


# what users do with it


def test_pitfall_17_copies_pickles_and_state_dicts() -> None:
    model, x = build("aliased")
    made = plan(model)
    converted = apply(model, made)
    expected = converted(x)
    assert torch.equal(copy.deepcopy(converted)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(x), expected)
    fresh = apply(build("aliased", seed=1)[0], made)
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(fresh(x), expected)
    old, new = set(model.state_dict()), set(converted.state_dict())
    gone = ("running_mean", "running_var", "num_batches_tracked")
    assert all(name.endswith(gone) for name in old - new)


def test_pitfall_19_an_optimizer_from_before_still_trains() -> None:
    model, x = build("plain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    converted = convert(model, inplace=True)
    before = {name: p.detach().clone() for name, p in converted.named_parameters()}
    optimizer.zero_grad()
    converted(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in converted.named_parameters())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in converted.parameters()}


def test_pitfall_20_initialising_again_resets_gamma_and_beta_only() -> None:
    """As it would have left the running statistics; the docstring of apply says so."""
    converted = convert(build("plain")[0])
    scale = converted[1].channel_scale.clone()

    def init(module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    converted.apply(init)
    assert torch.equal(converted[1].weight, torch.ones(16))
    assert torch.equal(converted[1].channel_scale, scale)


def test_pitfall_21_a_rebuilt_model_takes_the_stored_plan() -> None:
    model, x = build("plain")
    made = plan(model, groups=4)
    stored = made.to_json()
    rebuilt, _ = build("plain")
    assert torch.equal(apply(rebuilt, Plan.from_json(stored))(x), apply(model, made)(x))


def test_pitfall_22_batchnorm_conversions_afterwards_do_nothing() -> None:
    converted = convert(build("plain")[0])
    expected = bits(converted)
    assert_same_bits(bits(nn.SyncBatchNorm.convert_sync_batchnorm(converted)), expected)
    assert_same_bits(bits(convert_sync_batchnorm(converted)), expected)
    assert_same_bits(bits(freeze_batch_norm_2d(converted)), expected)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_pitfall_23_reparameterising_comes_first(name: str) -> None:
    model = randomise_norms(timm.create_model(name)).eval()
    made = plan(model)
    assert made.swaps
    with pytest.raises(ModelError, match="before the conversion"):
        reparameterize_model(apply(model, made), inplace=True)
    merged = reparameterize_model(model)
    if plan(merged).swaps:  # some of these have no norm left, and then say so
        assert convert(merged)(torch.randn(1, 3, 64, 64)).isfinite().all()
    else:
        with pytest.raises(NothingToSwapError):
            convert(merged)


# all or nothing


def test_nothing_to_swap() -> None:
    with pytest.raises(NothingToSwapError, match=r"swaps nothing.*no BatchNorm"):
        convert(nn.Linear(2, 2))
    with pytest.raises(NothingToSwapError, match=r'2 layers kept.*excluded by "\*"'):
        convert(small_cnn(), exclude="*")


def test_no_plan_and_no_plain_model() -> None:
    with pytest.raises(ArgumentError, match="not a plan"):
        apply(small_cnn(), "plan.json")  # type: ignore[arg-type]
    with pytest.raises(WrappedModelError, match="DataParallel"):
        apply(nn.DataParallel(small_cnn()), plan(small_cnn()))


def test_a_converted_model_is_refused() -> None:
    model = small_cnn()
    made = plan(model, exclude="4")
    converted = apply(model, made)
    with pytest.raises(ModelError, match=r"converted already.*revert"):
        apply(converted, made)


class Bigger(nn.Sequential):
    """Norm layers as in `small_cnn`, and one more Linear."""


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: nn.Sequential(nn.Identity(), nn.BatchNorm2d(16)), r"another model \(at 4\).*no norm there"),
        (AliasedNorms, r"at 1\).*no norm there"),
        (lambda: freeze_batch_norm_2d(small_cnn()), "another type of layer.*FrozenBatchNorm2d"),
        (lambda: Bigger(*small_cnn(), nn.Linear(5, 5)), "other parameters are not.*fingerprint"),
        (lambda: Bigger(*small_cnn(), nn.BatchNorm1d(5)), r"leaves a layer out \(at 9\)"),
    ],
)
def test_a_plan_for_another_model(other: Any, match: str) -> None:
    made, model = plan(small_cnn()), other()
    before = bits(model)
    with pytest.raises(PlanMismatchError, match=match):
        apply(model, made, inplace=True)
    assert_same_bits(bits(model), before)


def test_a_plan_edited_into_nonsense() -> None:
    model = small_cnn()
    made = plan(model)
    twice = dataclasses.replace(made, decisions=(*made.decisions, made.decisions[0]))
    with pytest.raises(PlanMismatchError, match="more than once"):
        apply(model, twice)
    with pytest.raises(PlanMismatchError, match=r"another number of channels.*expected 8, found 16"):
        apply(model, made.edit("1", num_channels=8))
    alias = AliasedNorms()
    with pytest.raises(PlanMismatchError, match="a norm under bn1 only"):
        apply(alias, plan(alias).edit("bn1", paths=("bn1",)).edit("bn1", paths=("bn1", "bn3")))
    stats = small_cnn(track_running_stats=False)
    with pytest.raises(PlanMismatchError, match=r"no running statistics.*standardise=False"):
        apply(stats, plan(stats).edit("1", standardise=True))


def test_a_layer_refused_at_the_last_moment_stops_everything() -> None:
    model = small_cnn()
    made = plan(model)
    model[4].running_var.fill_(-1)
    before = bits(model)
    with pytest.raises(ModelError, match=r"cannot be swapped \(at 4\).*negative"):
        apply(model, made, inplace=True)
    assert_same_bits(bits(model), before)


def test_a_plan_edited_past_a_refusal_is_refused_by_the_place_too() -> None:
    model = small_cnn()
    model.held = [model[4]]  # a plain list: a swap in the tree would not reach it
    made = plan(model).edit("4", action="swap", num_groups=1)
    with pytest.raises(ModelError, match=r"cannot be swapped \(at 4\).*held outside the module tree"):
        apply(model, made, inplace=True)


def test_a_standardisation_beyond_half_precision() -> None:
    model = small_cnn().half()
    model[4].running_mean.fill_(60000)
    model[4].running_var.fill_(0)
    before = bits(model)
    with pytest.raises(ModelError, match=r"not finite \(at 4\).*float16.*Convert the model in float32"):
        convert(model, inplace=True)
    assert_same_bits(bits(model), before)


def test_the_record_of_the_conversion() -> None:
    model = small_cnn()
    made = plan(model)
    converted = apply(model, made)
    record = _sites.applied(converted)
    assert record is not None
    assert record.plan == made
    assert record.digest == _sites.digest(converted)
    assert "_origin" not in str(converted.state_dict().keys())
    assert sum(1 for _ in converted.modules()) == sum(1 for _ in model.modules())


def test_mlp_trains_at_batch_size_one() -> None:
    converted = convert(mlp()).train()
    converted(torch.randn(1, 6)).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())


# time and memory


def test_resnet50_takes_less_than_a_second() -> None:
    model = timm.create_model("resnet50")
    start = time.process_time()
    convert(model)
    assert time.process_time() - start < 1.0
    assert same_state(model, model)


def big_model() -> nn.Sequential:
    """192 MiB in blocks that malloc gives back to the system when they are freed."""
    model = nn.Sequential()
    for _ in range(6):
        model.append(nn.Linear(1, 1, device="meta"))
        model[-1].weight = nn.Parameter(torch.zeros(8 * 2**20 + 1))
        model.append(nn.BatchNorm2d(64))
    return model


def peak_growth(job: Callable[[], Any]) -> float:
    """Memory that the job takes at its peak beyond what was in use before, in sizes of `big_model`."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    done, seen = threading.Event(), [resident()]

    def sample() -> None:
        while not done.wait(0.0005):
            seen.append(resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    kept = job()
    seen.append(resident())
    done.set()
    sampler.join()
    del kept
    return (max(seen) - seen[0]) / (6 * 32 * 2**20)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux shows it")
def test_peak_memory() -> None:
    model = big_model()
    made = plan(model)
    apply(small_cnn(), plan(small_cnn()))  # what a first call loads
    assert peak_growth(lambda: apply(model, made)) < 1.2
    assert peak_growth(lambda: apply(model, made, inplace=True)) < 0.2
    # the measurement sees what it should
    assert peak_growth(lambda: (copy.deepcopy(model), copy.deepcopy(model))) > 1.7
