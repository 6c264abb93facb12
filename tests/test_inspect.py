"""inspect finds every norm with all its names, says what stands against a swap, and touches nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from _models import ZOO, AliasedNorms, SharedBlock, build, frozen_affine, same_state, small_cnn
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import Tensor, nn

from gnswap._apply import apply
from gnswap._errors import ArgumentError, WrappedModelError
from gnswap._inspect import inspect
from gnswap._plan import plan
from gnswap._records import Inventory
from gnswap._sites import fingerprint


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@pytest.mark.parametrize("name", ZOO)
def test_every_batchnorm_of_the_zoo_can_be_swapped(name: str) -> None:
    model, _ = build(name)
    inventory = inspect(model)
    expected = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(inventory.swappable) == len(inventory.sites) == len(expected) > 0
    assert inventory.fingerprint == fingerprint(model)
    assert inventory.notes == ()


@pytest.mark.parametrize("name", ZOO)
def test_the_model_is_neither_run_nor_changed(name: str) -> None:
    model, _ = build(name)
    before, modules = copy.deepcopy(model), list(model.modules())

    def fail(*_: object) -> None:
        raise AssertionError("inspect ran the model")

    hooks = [module.register_forward_pre_hook(fail) for module in modules]
    inspect(model)
    for hook in hooks:
        hook.remove()
    assert same_state(model, before)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("name", ZOO)
def test_meta_models_give_the_same_inventory(name: str) -> None:
    model, _ = build(name)
    assert inspect(copy.deepcopy(model).to("meta")) == inspect(model)


def test_a_site_says_what_there_is() -> None:
    model = nn.Sequential(timm.layers.BatchNormAct2d(16, eps=1e-3, act_layer=nn.SiLU, drop_layer=nn.Dropout2d))
    model[0].register_forward_hook(lambda *_: None)
    model[0].register_full_backward_hook(lambda *_: None)
    (site,) = inspect(model).sites
    assert site.to_dict() == {
        "paths": ["0"],
        "norm_type": "timm.layers.norm_act.BatchNormAct2d",
        "num_channels": 16,
        "eps": 1e-3,
        "affine": True,
        "bias": True,
        "frozen": False,
        "running_stats": True,
        "dims": "4",
        "act": "SiLU",
        "drop": "Dropout2d",
        "hooks": 2,
        "refusal": None,
    }


def test_identity_activation_and_dropout_are_none() -> None:
    (site,) = inspect(timm.layers.BatchNormAct2d(16, apply_act=False)).sites
    assert site.act is None
    assert site.drop is None


def test_inventory_is_plain_data() -> None:
    inventory = inspect(AliasedNorms())
    assert Inventory.from_json(inventory.to_json()) == inventory
    assert inventory.model.endswith("AliasedNorms")


def test_inventory_prints_as_text() -> None:
    model = nn.ModuleDict(
        {"a": timm.layers.BatchNormAct2d(8, affine=False), "b": nn.LazyBatchNorm2d(), "c": nn.LayerNorm(8)}
    )
    model["d"] = model["a"]
    assert str(inspect(model)).splitlines() == [
        "torch.nn.modules.container.ModuleDict: 2 BatchNorm layers, 1 can be swapped",
        "  a = d: BatchNormAct2d, 8 channels, eps 1e-05, act ReLU, no gamma",
        "  b: LazyBatchNorm2d, 0 channels, eps 1e-05",
        "    kept: not initialised: run one input through the model first",
        "  left alone: c: LayerNorm",
    ]


def test_a_converted_model_has_nothing_left_to_swap() -> None:
    model = small_cnn()
    converted = apply(model, plan(model))
    inventory = inspect(converted)
    assert inventory.sites == ()
    assert inventory.left_alone == ("1: FusedGroupNorm", "4: FusedGroupNorm")
    assert inventory.notes == (), "the shell that a layer keeps for revert is no norm held outside the tree"


def test_pitfall_6_the_root_itself() -> None:
    (site,) = inspect(nn.BatchNorm2d(12)).sites
    assert site.paths == ("",)
    assert site.name == "(root)"


def test_pitfall_7_aliases() -> None:
    assert [site.paths for site in inspect(AliasedNorms()).sites] == [("bn1", "bn2", "extra.norm"), ("head.1",)]
    assert [site.paths for site in inspect(SharedBlock()).sites] == [("left.1", "right.1")]


def test_pitfall_14_what_is_missing_is_said() -> None:
    assert {site.affine for site in inspect(small_cnn(affine=False)).sites} == {False}
    assert {(site.affine, site.bias) for site in inspect(small_cnn(bias=False)).sites} == {(True, False)}
    assert {site.running_stats for site in inspect(small_cnn(track_running_stats=False)).sites} == {False}


def test_pitfall_15_frozen_norms() -> None:
    assert {site.frozen for site in inspect(frozen_affine()).sites} == {True}
    assert {site.frozen for site in inspect(timm.layers.freeze_batch_norm_2d(small_cnn())).sites} == {True}
    assert {site.frozen for site in inspect(small_cnn()).sites} == {False}
    assert {site.frozen for site in inspect(small_cnn(affine=False)).sites} == {False}


@pytest.mark.parametrize(
    ("name", "norms", "kinds"),
    [
        ("efficientnet_b0", 49, {"BatchNormAct2d"}),  # pitfall 1
        ("levit_128s", 52, {"BatchNorm1d", "BatchNorm2d"}),
        ("regnety_002", 44, {"BatchNormAct2d"}),
        ("repvgg_a0", 61, {"BatchNormAct2d"}),
        ("mobileone_s0", 226, {"BatchNormAct2d"}),
        ("densenet121", 121, {"BatchNormAct2d"}),
        ("resnet18", 20, {"BatchNorm2d"}),
        ("convnext_atto", 0, set()),
    ],
)
def test_timm_architectures(name: str, norms: int, kinds: set[str]) -> None:
    inventory = inspect(on_meta(name))
    assert len(inventory.swappable) == len(inventory.sites) == norms
    assert {site.norm_type.rpartition(".")[2] for site in inventory.sites} == kinds


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_timms_conversions_of_whole_networks(name: str) -> None:
    plain = inspect(on_meta(name))
    synced = inspect(timm.layers.convert_sync_batchnorm(on_meta(name)))
    frozen = inspect(timm.layers.freeze_batch_norm_2d(timm.create_model(name)))
    for other in (synced, frozen):
        assert [(site.paths, site.num_channels, site.eps, site.act) for site in other.swappable] == [
            (site.paths, site.num_channels, site.eps, site.act) for site in plain.sites
        ]
    assert {site.norm_type.rpartition(".")[2] for site in synced.sites} <= {"SyncBatchNorm", "SyncBatchNormAct"}
    assert {site.frozen for site in frozen.sites} == {True}


def test_pitfall_2_and_3_an_unknown_norm_is_a_site_with_a_reason() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    inventory = inspect(nn.Sequential(Doubled(8), nn.BatchNorm2d(8)))
    assert len(inventory.sites) == 2
    assert [site.name for site in inventory.swappable] == ["1"]
    assert "register_norm" in (inventory.sites[0].refusal or "")
    assert inventory.sites[0].num_channels == 8


def test_norms_inside_a_norm_are_refused_with_it() -> None:
    inventory = inspect(nn.Sequential(SplitBatchNorm2d(8, num_splits=2)))
    assert [site.name for site in inventory.sites] == ["0", "0.aux_bn.0"]
    assert inventory.swappable == ()
    assert inventory.sites[1].refusal == "part of another norm layer, 0"


def test_pitfall_4_other_norms_are_left_alone_by_name() -> None:
    others = nn.Sequential(
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.GroupNorm(2, 8),
        nn.RMSNorm(8),
        timm.layers.LayerNorm2d(8),
        timm.layers.FilterResponseNormTlu2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 1)),
    )
    inventory = inspect(others)
    assert inventory.sites == ()
    assert inventory.left_alone == (
        "0: InstanceNorm2d",
        "1: LayerNorm",
        "2: GroupNorm",
        "3: RMSNorm",
        "4: LayerNorm2d",
        "5: FilterResponseNormTlu2d",
    )


def test_pitfall_5_lazy_norms_are_refused() -> None:
    (site,) = inspect(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())).sites
    assert site.refusal == "not initialised: run one input through the model first"
    assert site.num_channels == 0


class HoldsOutside(nn.Module):
    """Keeps its norm in a plain attribute as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)
        held = {
            "directly": self.bn,
            "list": [self.bn],
            "tuple": (1, self.bn),
            "dict": {"bn": self.bn},
            "method": self.bn.forward,
            "block": [nn.Sequential(self.bn)],
        }[how]
        vars(self)["held"] = held


@pytest.mark.parametrize("how", ["directly", "list", "tuple", "dict", "method", "block"])
def test_a_norm_that_a_plain_attribute_holds_too_is_refused(how: str) -> None:
    (site,) = inspect(nn.Sequential(HoldsOutside(how))).sites
    assert site.refusal == "also held outside the module tree, by 0.held, where a swap would not reach it"


def test_a_norm_that_only_a_plain_attribute_holds_is_noted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    model.stages = [nn.Sequential(nn.BatchNorm2d(8))]  # the classic forgotten ModuleList
    inventory = inspect(model)
    assert inventory.sites == ()
    assert inventory.notes == ("stages: BatchNorm2d is in a plain attribute, no submodule of the model: left alone",)


def test_plain_attributes_that_hold_blocks_of_the_tree_are_fine() -> None:
    model = small_cnn()
    block = nn.Sequential(nn.BatchNorm2d(8))
    model.add_module("block", block)
    model.order = [block]
    assert all(site.refusal is None for site in inspect(model).sites)


class CallsBatchNorm(nn.Module):
    """Normalises by function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


class FoldsByHand(nn.Module):
    """Uses the state of its norm instead of calling it, as quantisation-aware training does."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var)


def test_pitfall_11_functional_calls_are_reported_as_unreachable() -> None:
    inventory = inspect(nn.Sequential(CallsBatchNorm(), nn.BatchNorm2d(3), CallsBatchNorm()))
    assert inventory.notes == (
        "unreachable: 0 and 1 more: CallsBatchNorm calls batch_norm as a function in its forward; left alone",
    )
    assert len(inventory.swappable) == 1


def test_pitfall_11_weight_standardisation_is_no_norm_of_activations() -> None:
    (note,) = inspect(on_meta("nf_resnet26")).notes
    assert note.startswith("stem.conv and 28 more: ScaledStdConv2d standardises its weights with batch_norm")


def test_a_parent_that_reads_running_statistics_keeps_its_norm() -> None:
    (site,) = inspect(nn.Sequential(FoldsByHand())).sites
    assert site.refusal == "the forward of FoldsByHand reads its running statistics, which GroupNorm has not"


def test_pitfall_16_foreign_attributes_are_noted() -> None:
    model = small_cnn()
    model[1].lr_scale = 0.1
    assert inspect(model).notes == ("1: attributes put there from outside go along in a swap: lr_scale",)
    model[4].lr_scale = 0.2
    assert inspect(model).notes == ("1 and 1 more: attributes put there from outside go along in a swap: lr_scale",)


def test_pitfall_12_wrapped_models() -> None:
    with pytest.raises(WrappedModelError, match="wrapped by DataParallel"):
        inspect(nn.DataParallel(small_cnn()))
    with pytest.raises(ArgumentError, match="not a model"):
        inspect(small_cnn)  # type: ignore[arg-type]


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspect(on_meta("resnet18"))
