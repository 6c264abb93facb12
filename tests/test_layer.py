"""FusedGroupNorm: nn.GroupNorm with more, and nothing of a BatchNorm's state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm.layers
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gnswap import ops
from gnswap._errors import ArgumentError
from gnswap._layer import FusedGroupNorm
from gnswap.ops import _cpu_library


def standardised(num_groups: int = 2, *, softness: float = 0.0, **keywords: object) -> FusedGroupNorm:
    """A layer of 6 channels as `apply` makes it, with signs of both kinds and a nominal group variance of 0.9."""
    torch.manual_seed(0)
    layer = FusedGroupNorm(num_groups, 6, softness=softness, **keywords)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    layer.channel_scale = signs * (torch.rand(6) + 0.5)
    layer.channel_shift = torch.randn(6)
    layer.channel_order = torch.randperm(6)
    layer.channel_gain = signs * (0.9 + layer.eps + softness) ** 0.5
    if layer.weight is not None:
        nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def plain(x: Tensor) -> Tensor:
    """What nn.GroupNorm gives; not F.group_norm without weight, whose kernel rounds differently."""
    return nn.GroupNorm(2, 6)(x)


def x6(*spatial: int) -> Tensor:
    return torch.randn(3, 6, *spatial, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- as nn.GroupNorm


@pytest.mark.parametrize("spatial", [(), (7,), (5, 7), (2, 3, 4)])
def test_without_more_it_is_group_norm(spatial: tuple[int, ...]) -> None:
    theirs, ours = nn.GroupNorm(2, 6), FusedGroupNorm(2, 6)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = x6(*spatial)
    torch.testing.assert_close(ours(x), theirs(x))


def test_it_starts_as_group_norm_does() -> None:
    layer = FusedGroupNorm(2, 6)
    assert torch.equal(layer.weight, torch.ones(6))
    assert torch.equal(layer.bias, torch.zeros(6))
    nn.init.normal_(layer.weight)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(6))


def test_affine_and_bias() -> None:
    assert list(FusedGroupNorm(2, 6, affine=False).state_dict()) == []
    assert list(FusedGroupNorm(2, 6, bias=False).state_dict()) == ["weight"]
    x = x6(4)
    torch.testing.assert_close(FusedGroupNorm(2, 6, affine=False)(x), F.group_norm(x, 2))
    torch.testing.assert_close(FusedGroupNorm(2, 6, bias=False)(x), F.group_norm(x, 2, torch.ones(6)))


def test_formula_with_everything() -> None:
    layer = standardised(softness=0.5, act="silu").double()
    x, residual = x6(4, 5).double(), x6(4, 5).double().flip(0)
    column = (1, 6, 1, 1)
    u = (x * layer.channel_scale.view(column) + layer.channel_shift.view(column))[:, layer.channel_order]
    u = F.group_norm(u, 2, eps=layer.eps + 0.5)[:, layer.channel_order.argsort()]
    gain = (layer.channel_gain * layer.weight).view(column)
    expected = F.silu(u * gain + layer.bias.view(column) + residual)
    torch.testing.assert_close(layer(x, residual), expected)


def test_a_gain_without_gamma() -> None:
    layer = standardised(affine=False)
    expected = ops.group_norm(
        x6(4),
        2,
        layer.channel_gain,
        channel_scale=layer.channel_scale,
        channel_shift=layer.channel_shift,
        channel_order=layer.channel_order,
    )
    assert torch.equal(layer(x6(4)), expected)


def test_claim_2_train_is_eval_and_a_sample_is_itself_in_any_batch() -> None:
    layer, x = standardised(act="gelu"), x6(5, 7)
    y = layer.train()(x)
    assert torch.equal(layer.eval()(x), y)
    for n in range(3):
        assert torch.equal(layer(x[n : n + 1]), y[n : n + 1])


# ---------------------------------------------------------------- activation and drop


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
def test_act_by_name_is_fused(act: str) -> None:
    layer, x = FusedGroupNorm(2, 6, act=act), x6(5)
    assert layer.fused_act == act
    torch.testing.assert_close(layer(x), getattr(F, act)(F.group_norm(x, 2)))


def test_act_as_a_known_module_is_kept_and_fused() -> None:
    layer, x = FusedGroupNorm(2, 6, act=nn.ReLU(inplace=True)), x6(5)
    assert layer.fused_act == "relu"
    assert isinstance(layer.get_submodule("act"), nn.ReLU)
    torch.testing.assert_close(layer(x), F.relu(plain(x)))


def test_act_as_another_module_is_called() -> None:
    layer, x = FusedGroupNorm(2, 6, act=nn.PReLU(6)), x6(5)
    assert layer.fused_act is None
    assert "act.weight" in dict(layer.named_parameters())
    torch.testing.assert_close(layer(x), F.prelu(F.group_norm(x, 2), layer.act.weight))


def test_timm_identity_act_and_drop_are_fine() -> None:
    norm = timm.layers.BatchNormAct2d(6)
    layer = FusedGroupNorm(2, 6, act=norm.act)
    layer.drop = norm.drop
    assert layer.fused_act == "relu"


@pytest.mark.parametrize(
    "hook",
    [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook, nn.Module.register_full_backward_hook],
)
def test_hooks_on_the_activation_still_run(hook: Callable[..., object]) -> None:
    calls: list[str] = []
    layer = FusedGroupNorm(2, 6, act=nn.SiLU())
    hook(layer.act, lambda *_: calls.append("called"))
    layer(x6(5).requires_grad_()).sum().backward()
    assert calls == ["called"]


@pytest.mark.parametrize("act", ["relu", nn.ReLU()])
def test_a_drop_works_between_norm_and_activation(act: str | nn.Module) -> None:
    class Minus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    layer, x = FusedGroupNorm(2, 6, act=act), x6(5)
    layer.drop = Minus()
    assert layer.fused_act is None
    torch.testing.assert_close(layer(x), F.relu(-plain(x)))


def test_a_drop_without_activation_runs() -> None:
    layer, x = FusedGroupNorm(2, 6), x6(5)
    layer.drop = nn.Dropout(1.0)
    assert torch.equal(layer(x), torch.zeros_like(x))
    torch.testing.assert_close(layer.eval()(x), plain(x))


# ---------------------------------------------------------------- softness


class TestSoftness:
    @pytest.mark.parametrize("value", [0.25, 1.0, 100.0])
    def test_output_at_nominal_variance_does_not_jump(self, value: float) -> None:
        layer = standardised().double()
        # each group is +-sqrt(0.9) after standardising: mean 0 and the nominal variance 0.9
        u = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(1, 6, 1) * 0.9**0.5
        x = (u - layer.channel_shift[:, None]) / layer.channel_scale[:, None]
        layer.channel_gain = layer.channel_gain.sign() * (0.9 + layer.eps) ** 0.5
        before = layer(x)
        layer.softness = value
        torch.testing.assert_close(layer(x), before, rtol=1e-9, atol=1e-9)
        layer.softness = 0.0
        torch.testing.assert_close(layer(x), before, rtol=1e-9, atol=1e-9)

    def test_it_halves_the_fluctuation_at_one(self) -> None:
        """Softness 1 on unit variance: d log y / d log v is -1/4 and no longer -1/2."""
        x = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(1, 6, 4)
        layer = FusedGroupNorm(1, 6, eps=0.0, dtype=torch.float64)
        layer.channel_gain = torch.ones(6, dtype=torch.float64)
        for softness, slope in ((0.0, -0.5), (1.0, -0.25)):
            layer.softness = softness
            step = 1e-5
            ratio = layer((1 + step) * x) / layer(x)
            log_ratio = ratio.detach()[0, 0, 0].log() / (2 * step)
            assert float(log_ratio) - 0.5 == pytest.approx(slope, abs=1e-4)

    def test_negative_gains_keep_their_sign(self) -> None:
        layer = standardised(softness=1.0)
        signs = layer.channel_gain.sign()
        for value in (0.0, 2.0, 0.5):
            layer.softness = value
            assert torch.equal(layer.channel_gain.sign(), signs)
        assert (signs < 0).any()

    def test_gamma_is_not_touched_and_dtype_stays(self) -> None:
        layer = standardised().to(torch.bfloat16)
        weight, before = layer.weight, layer.weight.detach().clone()
        layer.softness = 0.7
        assert layer.weight is weight
        assert torch.equal(weight, before)
        assert layer.channel_gain.dtype == torch.bfloat16

    def test_a_plain_layer_only_gets_a_bigger_eps(self) -> None:
        layer, x = FusedGroupNorm(2, 6), x6(5)
        layer.softness = 0.5
        assert layer.channel_gain is None
        torch.testing.assert_close(layer(x), F.group_norm(x, 2, layer.weight, layer.bias, eps=0.5 + 1e-5))

    @pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
    def test_out_of_range_is_refused_and_changes_nothing(self, value: float) -> None:
        layer = standardised(softness=0.5)
        gain = layer.channel_gain.clone()
        with pytest.raises(ArgumentError, match="softness out of range"):
            layer.softness = value
        assert layer.softness == 0.5
        assert torch.equal(layer.channel_gain, gain)
        with pytest.raises(ArgumentError, match="softness out of range"):
            FusedGroupNorm(2, 6, softness=value)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_deepcopy_and_pickle_keep_everything(copied: Callable[[FusedGroupNorm], FusedGroupNorm]) -> None:
    layer = standardised(softness=0.3, act=nn.GELU())
    layer.drop = nn.Identity()
    layer.weight.requires_grad_(False)
    twin = copied(layer.eval())
    assert torch.equal(twin(x6(5)), layer(x6(5)))
    assert (twin.softness, twin.training, twin.fused_act) == (0.3, False, "gelu")
    assert not twin.weight.requires_grad
    assert twin.channel_scale is not layer.channel_scale


def test_pitfall_17_state_dict_round_trip() -> None:
    layer, other = standardised(), standardised()
    nn.init.normal_(layer.weight)
    layer.channel_gain = 2 * layer.channel_gain
    layer.channel_order = layer.channel_order.flip(0)
    assert set(layer.state_dict()) == {
        "weight",
        "bias",
        "channel_scale",
        "channel_shift",
        "channel_order",
        "channel_gain",
    }
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x6(5)), layer(x6(5)))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        FusedGroupNorm(2, 6).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = standardised(act="relu").to(dtype)
    assert layer.channel_order.dtype == torch.int64
    x = x6(5).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    # gamma times gain is rounded once, and the result once
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), layer.double()(x.double()), rtol=2 * eps, atol=eps)
    assert FusedGroupNorm(2, 6, dtype=dtype).weight.dtype == dtype


def test_meta_device() -> None:
    layer = FusedGroupNorm(2, 6, act="relu", device="meta")
    assert layer(torch.empty(2, 6, 3, device="meta")).shape == (2, 6, 3)
    materialised = layer.to_empty(device="cpu")
    materialised.reset_parameters()
    torch.testing.assert_close(materialised(x6(5)), F.relu(plain(x6(5))))


def test_gradients_reach_what_is_trained_and_nothing_else() -> None:
    layer, x = standardised(act="silu"), x6(5).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == {"weight", "bias"}


@pytest.mark.parametrize("act", ["silu", nn.SiLU(), nn.Mish(), None])
def test_compiles_as_one_graph(act: str | nn.Module | None) -> None:
    layer, x = standardised(act=act), x6(5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x.flip(0)), layer(x, x.flip(0)))


@pytest.mark.parametrize("act", ["silu", nn.SiLU(), nn.Mish(), None])
def test_fx_traces_through_it(act: str | nn.Module | None) -> None:
    """As torchvision's and timm's feature extractors do."""
    layer, x = standardised(act=act), x6(5)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.Flatten()))
    assert torch.equal(traced(x), layer(x).flatten(1))
    with pytest.raises(ArgumentError, match="channels of this layer"):
        traced(x[:, :3])


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked", "track_running_stats"])
def test_pitfall_23_batch_statistics_are_refused_with_advice(name: str) -> None:
    layer = FusedGroupNorm(2, 6)
    with pytest.raises(AttributeError, match=f"no {name}.*before the conversion"):
        getattr(layer, name)
    assert not hasattr(layer, name)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = layer.other


def test_pitfall_23_folding_into_a_convolution_is_an_error() -> None:
    with pytest.raises(AttributeError, match="keeps no batch statistics"):
        fuse_conv_bn_eval(nn.Conv2d(3, 6, 3).eval(), FusedGroupNorm(2, 6).eval())


def test_pitfall_22_sync_and_freeze_leave_it_alone() -> None:
    layer = standardised()
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layer) is layer
    assert timm.layers.freeze_batch_norm_2d(layer) is layer


def test_repr_says_what_the_layer_is() -> None:
    assert "(2, 6, eps=1e-05, backend=" in repr(FusedGroupNorm(2, 6))
    text = standardised(softness=0.5, act="relu", bias=False).extra_repr()
    assert text.startswith("2, 6, eps=1e-05, bias=False, act=relu, softness=0.5, scale, order, backend=")
    assert "affine=False" in repr(FusedGroupNorm(2, 6, affine=False))


def test_repr_names_the_backend_and_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu_library, "_load", lambda: pytest.fail("the kernels were loaded"))
    library = _cpu_library.Library(Path("kernels.so"), "avx2", "GCC", "no module")
    states = {"cpp, not loaded yet": None, "cpp avx2": library, "aten": "no compiler"}
    for label, state in states.items():
        monkeypatch.setattr(_cpu_library, "_state", state)
        assert repr(FusedGroupNorm(2, 6)).endswith(f"backend={label})")
    assert "backend=reference)" in repr(FusedGroupNorm(2, 6, device="meta"))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(("num_groups", "num_channels"), [(4, 6), (0, 6), (-2, 6), (1, 0)])
def test_groups_must_divide_channels(num_groups: int, num_channels: int) -> None:
    with pytest.raises(ArgumentError, match="num_groups must divide num_channels"):
        FusedGroupNorm(num_groups, num_channels)


def test_unknown_activation() -> None:
    with pytest.raises(ArgumentError, match=r"unknown activation .*expected one of relu, .*found 'tanh'"):
        FusedGroupNorm(2, 6, act="tanh")


def test_channels_are_checked_even_without_parameters() -> None:
    with pytest.raises(ArgumentError, match=r"channels of this layer .*expected 6, found 8"):
        FusedGroupNorm(2, 6, affine=False)(torch.randn(2, 8, 3))
