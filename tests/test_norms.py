"""Norm layers are read by exact type, and what cannot be swapped is refused with the reason."""

from __future__ import annotations

import copy

import pytest
import timm.layers
import torch
from _models import randomise_norms
from timm.layers.norm_act import FrozenBatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn
from torch.nn.utils import parametrize, prune
from torchvision.ops.misc import FrozenBatchNorm2d

from gnswap._errors import ArgumentError, ModelError
from gnswap._norms import NormState, foreign_attributes, is_norm_like, read_norm, refusal, register_norm


def foreign_frozen(package: str, **attributes: object) -> nn.Module:
    """A FrozenBatchNorm2d as detectron2 and transformers have it, without those packages."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self.register_buffer(name, torch.full((8,), value))
            vars(self).update(attributes)

    FrozenBatchNorm2d.__module__ = f"{package}.somewhere"
    FrozenBatchNorm2d.__qualname__ = FrozenBatchNorm2d.__name__ = "TestFrozenBatchNorm2d"
    return FrozenBatchNorm2d()


@pytest.mark.parametrize(
    ("norm", "dims"),
    [
        (nn.BatchNorm1d(8), "2 or 3"),
        (nn.BatchNorm2d(8), "4"),
        (nn.BatchNorm3d(8), "5"),
        (nn.SyncBatchNorm(8), "2 or more"),
        (timm.layers.BatchNormAct2d(8), "4"),
        (FrozenBatchNormAct2d(8), "4"),
        (FrozenBatchNorm2d(8), "4"),
        (foreign_frozen("detectron2", eps=1e-5), "4"),
        (foreign_frozen("transformers"), "4"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_supported_type_is_read_by_reference(norm: nn.Module, dims: str) -> None:
    randomise_norms(norm)
    state = read_norm(norm)
    assert is_norm_like(norm)
    assert refusal(norm) is None
    assert (state.num_channels, state.dims) == (8, dims)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(state, name) is getattr(norm, name)


def test_pitfall_1_fused_activation_and_dropout_are_seen() -> None:
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)
    state = read_norm(norm)
    assert state.act is norm.act
    assert type(state.act) is nn.SiLU
    assert state.drop is norm.drop
    assert type(state.drop) is nn.Dropout2d


def test_pitfall_1_activation_survives_timms_own_conversions() -> None:
    norm = timm.layers.BatchNormAct2d(8)
    for converted in (convert_sync_batchnorm(copy.deepcopy(norm)), freeze_batch_norm_2d(copy.deepcopy(norm))):
        state = read_norm(converted)
        assert type(state.act) is nn.ReLU
        assert refusal(converted) is None


def test_sync_batch_norm_act_made_by_hand_has_no_activation() -> None:
    state = read_norm(SyncBatchNormAct(8))
    assert state.act is None
    assert state.drop is None


def test_an_activation_that_a_plain_batchnorm_would_not_run_is_not_taken_for_one() -> None:
    norm = nn.BatchNorm2d(8)
    norm.act = nn.ReLU()  # BatchNorm2d.forward does not call it
    assert refusal(norm) == "holds act, which a swap would lose"


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
@pytest.mark.parametrize("home", ["torchvision", "detectron2", "transformers"])
def test_pitfall_11_eps_of_frozen_norms(home: str, eps: float) -> None:
    norm = FrozenBatchNorm2d(8, eps=eps) if home == "torchvision" else foreign_frozen(home, eps=eps)
    assert read_norm(norm).eps == eps


def test_pitfall_11_transformers_frozen_norm_has_a_fixed_eps() -> None:
    assert read_norm(foreign_frozen("transformers")).eps == 1e-5


def test_a_frozen_norm_of_unknown_origin_is_refused() -> None:
    norm = foreign_frozen("somebody")
    assert is_norm_like(norm)
    assert "keeps running statistics but is unknown" in (refusal(norm) or "")


def test_pitfall_14_missing_affine_and_statistics() -> None:
    assert read_norm(nn.BatchNorm2d(8, affine=False)).weight is None
    without_bias = read_norm(nn.BatchNorm2d(8, bias=False))
    assert without_bias.weight is not None
    assert without_bias.bias is None
    bare = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    assert read_norm(bare).num_channels == 8
    assert refusal(bare) is None


class UserBatchNorm(nn.BatchNorm2d):
    """A subclass that does something of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class BareUserBatchNorm(nn.BatchNorm2d):
    """A subclass that adds nothing; still not ours to judge."""


@pytest.mark.parametrize("norm", [UserBatchNorm(8), BareUserBatchNorm(8), SplitBatchNorm2d(8)], ids=repr)
def test_pitfall_3_unknown_subclasses_are_refused(norm: nn.Module) -> None:
    assert is_norm_like(norm)
    assert f"{type(norm).__name__} is a subclass of BatchNorm unknown to gnswap" in (refusal(norm) or "")
    with pytest.raises(ModelError, match="unknown to gnswap"):
        read_norm(norm)


def test_pitfall_3_quantised_norms_are_refused() -> None:
    from torch.ao.nn.quantized import BatchNorm2d

    assert "unknown to gnswap" in (refusal(BatchNorm2d(8)) or "")


@pytest.mark.parametrize(
    "other",
    [
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.LayerNorm(8),
        nn.GroupNorm(2, 8),
        nn.Conv2d(3, 8, 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_pitfall_4_other_norms_are_not_batchnorms(other: nn.Module) -> None:
    assert not is_norm_like(other)


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d(), nn.LazyBatchNorm2d(), nn.LazyBatchNorm3d(affine=False)])
def test_pitfall_5_lazy_norms_ask_for_a_dry_forward(lazy: nn.Module) -> None:
    assert refusal(lazy) == "not initialised: run one input through the model first"


def test_pitfall_5_lazy_norm_after_its_first_input() -> None:
    lazy = nn.LazyBatchNorm2d()
    lazy(torch.randn(2, 8, 3, 3))
    assert refusal(lazy) is None
    assert read_norm(lazy).num_channels == 8


def test_pitfall_16_parametrised_affine_is_refused() -> None:
    norm = nn.BatchNorm2d(8)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    assert refusal(norm) == "weight parametrised (torch.nn.utils.parametrize): remove_parametrizations first"
    parametrize.remove_parametrizations(norm, "weight")
    assert refusal(norm) is None


def test_pitfall_16_pruned_affine_is_refused() -> None:
    norm = nn.BatchNorm2d(8)
    prune.l1_unstructured(norm, "weight", amount=2)
    assert "weight_orig" in (refusal(norm) or "")


def test_replaced_forward_is_refused() -> None:
    norm = nn.BatchNorm2d(8)
    norm.forward = lambda x: x
    assert refusal(norm) == "its forward was replaced on this instance"


@pytest.mark.parametrize("kind", ["parameter", "buffer", "child"])
def test_state_that_a_swap_would_lose_is_refused_by_name(kind: str) -> None:
    norm = nn.BatchNorm2d(8)
    if kind == "parameter":
        norm.register_parameter("mine", nn.Parameter(torch.ones(1)))
    elif kind == "buffer":
        norm.register_buffer("mine", torch.ones(1))
    else:
        norm.add_module("mine", nn.Identity())
    assert refusal(norm) == "holds mine, which a swap would lose"


def test_half_of_the_statistics_is_refused() -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_var = None
    assert refusal(norm) == "has one of running_mean and running_var only"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    norm = nn.BatchNorm2d(8)
    getattr(norm, name)[2:4] = value
    assert refusal(norm) == f"{name} is NaN or infinite in 2 of 8 channels"
    assert refusal(norm.to("meta")) is None, "a meta tensor has no values to look at"


def test_negative_variance_is_refused() -> None:
    norm = nn.BatchNorm2d(8)
    norm.running_var[5] = -0.1
    assert refusal(norm) == "running_var is negative in 1 of 8 channels"


def test_a_division_by_zero_is_refused() -> None:
    norm = nn.BatchNorm2d(8, eps=0.0)
    norm.running_var[0] = 0.0
    assert refusal(norm) == "running_var + eps is 0 in 1 of 8 channels"


def test_shapes_that_disagree_are_refused() -> None:
    norm = nn.BatchNorm2d(8)
    norm.weight = nn.Parameter(torch.ones(4))
    assert "weight is torch.float32 of shape (4,)" in (refusal(norm) or "")


def test_no_channels_are_refused() -> None:
    assert refusal(nn.BatchNorm2d(0)) == "has no channels"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_are_fine(dtype: torch.dtype) -> None:
    assert refusal(randomise_norms(nn.BatchNorm2d(8).to(dtype))) is None


class ThirdPartyNorm(nn.Module):
    """A norm with its own names for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))


def read_third_party(norm: nn.Module) -> NormState:
    return NormState(8, 1e-4, norm.gamma, None, norm.mean, norm.var)


def test_third_parties_register_their_norm() -> None:
    norm = ThirdPartyNorm()
    assert not is_norm_like(norm)
    register_norm(ThirdPartyNorm, read_third_party)
    assert is_norm_like(norm)
    assert refusal(norm) is None
    assert read_norm(norm).weight is norm.gamma


def test_a_reader_that_forgets_state_is_found_out() -> None:
    class Forgotten(ThirdPartyNorm):
        pass

    register_norm(Forgotten, lambda norm: NormState(8, 1e-4, None, None, norm.mean, norm.var))
    assert refusal(Forgotten()) == "holds gamma, which a swap would lose"


def test_a_reader_must_return_a_state() -> None:
    class Wrong(ThirdPartyNorm):
        pass

    register_norm(Wrong, lambda norm: norm.gamma)  # type: ignore[arg-type, return-value]
    with pytest.raises(ModelError, match="the registered reader returned no NormState"):
        read_norm(Wrong())


def test_registering_a_class_does_not_register_its_subclasses() -> None:
    class Child(BareUserBatchNorm):
        pass

    class Registered(nn.BatchNorm2d):
        pass

    register_norm(Registered, NormState.from_batchnorm)
    assert refusal(Registered(8)) is None
    assert refusal(Child(8)) is not None


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ArgumentError, match="not a module class"):
        register_norm(torch.relu, NormState.from_batchnorm)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="not callable"):
        register_norm(BareUserBatchNorm, None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="this norm is built in"):
        register_norm(nn.BatchNorm2d, NormState.from_batchnorm)


def test_pitfall_16_foreign_attributes_are_named() -> None:
    norm = nn.BatchNorm2d(8)
    assert foreign_attributes(norm) == ()
    norm.learning_rate_scale = 0.1
    assert foreign_attributes(norm) == ("learning_rate_scale",)
    assert foreign_attributes(timm.layers.BatchNormAct2d(8)) == ()
    assert foreign_attributes(freeze_batch_norm_2d(nn.BatchNorm2d(8))) == ()
