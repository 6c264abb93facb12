"""plan: options in, decisions and reasons out; what cannot be is refused, and what is changed is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from _models import ZOO, AliasedNorms, build, mlp, net_1d, small_cnn
from torch import nn

from gnswap._calibrate import calibrate
from gnswap._errors import ArgumentError, PlanError, PlanMismatchError, WrappedModelError
from gnswap._grouping import auto_groups
from gnswap._plan import plan
from gnswap._records import Decision, Plan


def by_name(made: Plan) -> dict[str, Decision]:
    return {decision.name: decision for decision in made.decisions}


def wide(*channels: int) -> nn.Sequential:
    return nn.Sequential(*(nn.BatchNorm2d(c) for c in channels))


@pytest.mark.parametrize("name", ZOO)
def test_defaults(name: str) -> None:
    model, _ = build(name)
    made = plan(model)
    assert made.decisions
    for decision in made.decisions:
        assert decision.action == "swap"
        assert decision.num_groups == auto_groups(decision.num_channels)
        assert decision.softness == (0.0 if name == "no running statistics" else 1.0)
        assert decision.reason


def test_the_same_model_gives_the_same_plan_and_survives_json() -> None:
    one, two = (plan(AliasedNorms(), groups=2, overrides={"bn*": {"softness": 0.1}}) for _ in range(2))
    assert one == two
    assert Plan.from_json(one.to_json()) == one


def test_the_plan_says_how_it_came_about() -> None:
    made = plan(small_cnn(), group_size=8, softness=0.3, exclude="4")
    assert made.options["group_size"] == 8
    assert made.options["exclude"] == ["4"]
    assert made.options["calibrated"] is False
    assert made.versions["torch"] == torch.__version__
    assert set(made.versions) == {"gnswap", "torch", "timm"}
    assert made.model.endswith("Sequential")


def test_groups_by_number_and_by_size() -> None:
    assert [d.num_groups for d in plan(wide(64, 128), groups=8).decisions] == [8, 8]
    assert [d.num_groups for d in plan(wide(64, 128), group_size=16).decisions] == [4, 8]


def test_a_changed_number_of_groups_is_one_warning_and_many_reasons() -> None:
    with pytest.warns(UserWarning, match=r"3 layers got another number of groups.*0 \(4\), 1 \(6\)") as caught:
        made = plan(wide(16, 24, 17, 128), groups=32)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    reasons = [decision.reason for decision in made.decisions]
    assert ["32 groups asked for" in reason for reason in reasons] == [True, True, True, False]


def test_no_warning_where_nothing_was_changed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(wide(64, 128), groups=16)
        plan(wide(17, 24))


@pytest.mark.parametrize(("c", "groups"), [(c, g) for c in (2, 3, 8, 17, 24, 32, 144) for g in (8, 32)])
@pytest.mark.filterwarnings("ignore:.*got another number of groups:UserWarning")  # tested above
def test_pitfall_25_one_channel_per_group_never_comes_by_itself(c: int, groups: int) -> None:
    (decision,) = plan(wide(c), groups=groups, overrides={"*": {"groups": c}}).decisions
    assert decision.action == "swap"
    assert decision.num_groups < c


def test_pitfall_25_one_channel_per_group_by_name() -> None:
    (decision,) = plan(wide(32), overrides={"0": {"groups": 32}}).decisions
    assert decision.num_groups == 32
    assert "InstanceNorm" in decision.reason


def test_a_single_channel_is_kept_unless_it_is_named() -> None:
    (decision,) = plan(wide(1)).decisions
    assert decision.action == "keep"
    assert 'overrides={"0": {"groups": 1}}' in decision.reason
    assert plan(wide(1), overrides={"*": {"action": "swap"}}).kept
    for override in ({"groups": 1}, {"action": "swap"}):
        (decision,) = plan(wide(1), overrides={"0": override}).decisions
        assert decision.num_groups == 1
        assert "InstanceNorm" in decision.reason


# softness


def test_softness() -> None:
    def soft(**options: Any) -> float:
        return plan(wide(64), **options).decisions[0].softness

    assert soft() == 1.0
    assert soft(max_softness=0.25) == 0.25
    assert soft(max_softness=9.0) == 1.0
    assert soft(softness=0) == 0.0
    assert soft(softness=4.0) == 4.0
    assert soft(overrides={"0": {"softness": 0.5}}) == 0.5
    assert soft(softness=0, overrides={"0": {"softness": "auto"}}) == 0.0


# vectors


@pytest.mark.parametrize("make", [mlp, net_1d])
def test_pitfall_26_batchnorm1d_gets_one_soft_group(make: Any) -> None:
    """GN(4, 4) on (N, 4) is about 0 silently."""
    (decision,) = plan(make(), max_softness=2.0).decisions
    assert (decision.num_groups, decision.softness) == (1, 2.0)
    assert "BatchNorm1d may see vectors" in decision.reason
    assert "the most allowed" in decision.reason
    with pytest.warns(UserWarning, match="1 layer got another number of groups"):
        (decision,) = plan(make(), groups=4, softness=0.5).decisions
    assert (decision.num_groups, decision.softness) == (1, 0.5)
    (decision,) = plan(make(), overrides={"1": {"groups": 2, "softness": 0}}).decisions
    assert (decision.num_groups, decision.softness) == (2, 0.0)


def test_without_running_statistics_it_is_a_plain_group_norm() -> None:
    made = plan(small_cnn(track_running_stats=False), softness=0.5)
    assert [d.standardise for d in made.decisions] == [False, False]
    assert [d.softness for d in made.decisions] == [0.0, 0.0]
    assert all("plain GroupNorm" in d.reason for d in made.decisions)


# which layers


def test_include_and_exclude_see_every_alias() -> None:
    decisions = by_name(plan(AliasedNorms(), include="extra.norm"))
    assert decisions["bn1"].action == "swap"
    assert decisions["head.1"].action == "keep"
    assert decisions["head.1"].reason == "not among the layers to include"
    decisions = by_name(plan(AliasedNorms(), include=["*"], exclude=["extra.*"]))
    assert decisions["bn1"].action == "keep"
    assert decisions["bn1"].reason == 'excluded by "extra.*"'


def test_the_root_has_a_name() -> None:
    assert plan(nn.BatchNorm2d(8), overrides={"(root)": {"groups": 2}}).decisions[0].num_groups == 2


def test_overrides_are_ranked() -> None:
    model = wide(64, 64, 64)
    made = plan(
        model,
        groups=2,
        overrides={"1": {"groups": 16}, "*": {"groups": 4, "softness": 0.5}, "[12]": {"group_size": 8}},
    )
    assert [d.num_groups for d in made.decisions] == [4, 16, 8]  # glob; own path; later glob
    assert [d.softness for d in made.decisions] == [0.5, 0.5, 0.5]  # key by key


def test_override_action() -> None:
    made = plan(wide(8, 8), exclude="*", overrides={"1": {"action": "swap"}})
    assert [d.action for d in made.decisions] == ["keep", "swap"]
    made = plan(wide(8, 8), overrides={"1": {"action": "keep"}})
    assert made.decisions[1].reason == "kept by an override"


def test_an_override_of_one_layer_must_divide() -> None:
    with pytest.raises(PlanError, match=r'overrides\["0"\].*a divisor of 24, found 5'):
        plan(wide(24), overrides={"0": {"groups": 5}})
    with pytest.raises(PlanError, match="a divisor of 24, found 7"):
        plan(wide(24), overrides={"0": {"group_size": 7}})


def test_refused_layers_are_kept_with_the_reason() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.LazyBatchNorm2d())
    made = plan(model)
    assert [d.action for d in made.decisions] == ["swap", "keep"]
    assert "not initialised" in made.decisions[1].reason
    with pytest.raises(PlanError, match=r"this layer cannot be swapped.*not initialised"):
        plan(model, overrides={"1": {"action": "swap"}})


# what is refused


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"groups": 8, "group_size": 8}, "groups and group_size contradict"),
        ({"groups": 0}, r'plan.groups|groups.*at least 1, or "auto", found 0'),
        ({"groups": True}, "found True"),
        ({"groups": "many"}, "found 'many'"),
        ({"group_size": 2.5}, "group_size.*found 2.5"),
        ({"softness": -1}, "impossible softness"),
        ({"softness": float("inf")}, "impossible softness"),
        ({"max_softness": float("nan")}, "impossible softness.*max_softness"),
        ({"order": "random"}, 'unknown order.*"auto", "natural", or a mapping'),
        ({"fidelity": 0.9}, "without photos.*Pass calibration="),
        ({"fidelity": 90, "calibration": []}, "impossible target"),
        ({"include": 3}, "include is no glob"),
        ({"exclude": [3]}, "exclude is no glob"),
        ({"overrides": ["1"]}, "overrides is no mapping"),
        ({"overrides": {"1": {"softness": -1}}}, r'overrides\["1"\].softness'),
    ],
)
def test_impossible_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        plan(small_cnn(), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"include": "nothing"}, 'plan.include.*"nothing" fits no norm layer|"nothing" fits no norm layer'),
        ({"exclude": ["1", "7"]}, '"7" fits no norm layer'),
        ({"overrides": {"9.*": {}}}, "fits no norm layer.*such as 1, 4"),
        ({"overrides": {"1": {"group": 4}}}, 'unknown key.*groups.*Did you mean "groups"'),
        ({"overrides": {"1": {"action": "drop"}}}, "unknown action"),
        ({"overrides": {"1": {"groups": 4, "group_size": 4}}}, "contradict"),
        ({"overrides": {"1": 4}}, "from a glob to a mapping"),
    ],
)
def test_overrides_and_globs_that_fit_nothing(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        plan(small_cnn(), **options)


def test_near_names_are_offered() -> None:
    with pytest.raises(PlanError, match=r"head\.1.*For all layers inside it write \"head\.\*\""):
        plan(AliasedNorms(), exclude="head")
    with pytest.raises(PlanError, match=r"such as bn1"):
        plan(AliasedNorms(), exclude="bn11")


def test_wrapped_models_are_refused() -> None:
    with pytest.raises(WrappedModelError, match="DataParallel"):
        plan(nn.DataParallel(small_cnn()))


# photos


def batches(count: int = 4) -> list[torch.Tensor]:
    """Noise, brighter or darker in each colour: photos differ in what they are as a whole, too."""
    generator = torch.Generator().manual_seed(0)
    noise, colour = (torch.randn(8 * count, 3, side, side, generator=generator) for side in (8, 1))
    return list((noise + colour).split(8))


def test_photos_choose_order_and_signs() -> None:
    model, _ = build("plain")
    made = plan(model, groups=4, calibration=iter(batches()))
    assert any(decision.signs is not None for decision in made.swaps)
    for decision in made.swaps:
        assert decision.evidence["fluctuation"] <= decision.evidence["fluctuation_natural"]
        assert "photos" in decision.reason
    assert any("24 photos" in note for note in made.notes)
    assert Plan.from_json(made.to_json()) == made


def test_the_order_of_the_photos_does_not_matter() -> None:
    model, _ = build("plain")
    x = torch.cat(batches())
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    assert plan(model, calibration=[x]) == plan(model, calibration=shuffled.split(5))


def test_statistics_in_place_of_photos() -> None:
    """Order, signs and levels come from them alone; views and corrections need the photos themselves."""
    model, _ = build("plain")
    statistics = calibrate(model, batches())
    made = plan(model, groups=4, calibration=statistics)
    assert any(decision.signs is not None for decision in made.swaps)
    assert all(decision.gain is not None and decision.offset is None for decision in made.swaps)
    assert plan(model, groups=4, calibration=statistics) == made
    with pytest.raises(PlanMismatchError, match=r"statistics are of another model.*gnswap\.calibrate"):
        plan(net_1d(), calibration=statistics)


def test_natural_order_is_left_alone() -> None:
    made = plan(build("plain")[0], groups=4, calibration=batches(), order="natural")
    assert all(decision.channel_order is None and decision.signs is None for decision in made.swaps)


def test_too_few_photos_choose_nothing_and_it_is_said() -> None:
    made = plan(build("plain")[0], calibration=[torch.randn(4, 3, 8, 8)])
    assert all(decision.channel_order is None and decision.signs is None for decision in made.swaps)
    assert all("4 samples reached the layer" in decision.reason for decision in made.swaps)


def test_an_order_of_ones_own() -> None:
    mine = list(range(15, -1, -1))
    made = by_name(plan(small_cnn(), groups=4, order={"1": mine}))
    assert made["1"].channel_order == tuple(mine)
    assert made["4"].channel_order is None
    with_photos = by_name(plan(build("plain")[0], groups=4, order={"1": mine}, calibration=batches()))
    assert with_photos["1"].channel_order == tuple(mine)
    with pytest.raises(PlanError, match="fits no norm layer"):
        plan(small_cnn(), order={"7": mine})
    with pytest.raises(PlanError, match=r"no permutation.*each of 0 to 15 once"):
        plan(small_cnn(), order={"1": mine[1:]})
    with pytest.raises(ArgumentError, match=r"an order is no permutation.*whole numbers"):
        plan(small_cnn(), order={"1": "backwards"})


def test_meta_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("levit_128s")
    made = plan(model)
    assert made.swaps
    assert all(d.num_groups == 1 and d.softness == 1.0 for d in made.swaps if "BatchNorm1d" in d.norm_type)
