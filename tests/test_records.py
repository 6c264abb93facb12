"""Records: exact through JSON, strict on reading, and a plan that contradicts itself cannot be made."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnswap._errors import ArgumentError, GnswapError, PlanError
from gnswap._record import Record
from gnswap._records import PLAN_SCHEMA_VERSION, Decision, Inventory, Plan, Site, matches


@st.composite
def decisions(draw: st.DrawFn) -> Decision:
    groups, group_size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    channels = groups * group_size
    signs = st.lists(st.sampled_from((-1, 1)), min_size=channels, max_size=channels).map(tuple)
    return Decision(
        paths=tuple(draw(st.lists(st.text(max_size=9), min_size=1, max_size=3, unique=True))),
        norm_type="torch.nn.modules.batchnorm.BatchNorm2d",
        num_channels=channels,
        action=draw(st.sampled_from(("swap", "keep"))),
        reason=draw(st.text(max_size=20)),
        num_groups=groups,
        softness=draw(st.floats(0, 1e6)),
        standardise=draw(st.booleans()),
        channel_order=draw(st.none() | st.permutations(range(channels)).map(tuple)),
        signs=draw(st.none() | signs),
        loudness=draw(st.none() | st.just((1.5,) * channels)),
        centre=draw(st.none() | st.just((-0.25,) * channels)),
    )


@given(st.lists(decisions(), max_size=3))
def test_a_plan_reads_back_exactly(made: list[Decision]) -> None:
    plan = Plan("f" * 64, "Net", tuple(made), options={"groups": 8, "fidelity": None}, notes=("a",))
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json(indent=None)) == plan


def make(**changes: object) -> Decision:
    good = Decision(("bn",), "BatchNorm2d", 8, "swap", "because", num_groups=2)
    return dataclasses.replace(good, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_groups": 3},
            r"impossible number of groups \(at bn\): expected a divisor of 8 channels, found 3",
        ),
        ({"num_groups": 0}, "impossible number of groups"),
        ({"softness": -1.0}, r"impossible softness \(at bn\): expected 0 or more"),
        ({"softness": math.inf}, "impossible softness"),
        ({"softness": math.nan}, "impossible softness"),
        ({"channel_order": (0, 1)}, "channel_order is no permutation"),
        ({"channel_order": (0,) * 8}, "channel_order is no permutation"),
        ({"signs": (1,) * 7}, "wrong signs"),
        ({"signs": (0,) * 8}, "wrong signs"),
        ({"loudness": (1.0,) * 7 + (0.0,)}, "wrong loudness"),
        ({"loudness": (1.0,) * 7}, "wrong loudness"),
        ({"centre": (0.0,) * 7 + (math.nan,)}, "wrong centre"),
        ({"paths": ()}, "names no path"),
    ],
)
def test_impossible_decisions(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make(**changes)


def test_a_kept_site_needs_no_groups() -> None:
    assert make(action="keep", num_groups=0).group_size == 0


def plan_data() -> dict[str, object]:
    return Plan("f", "Net", (make(),)).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=99), r"unknown schema version .*expected 1, found 99"),
        (lambda d: d.pop("schema_version"), "unknown schema version"),
        (lambda d: d.update(colour="red"), r"unknown key \(at Plan\).*found colour"),
        (lambda d: d["decisions"][0].update(num_group=4), r"unknown key \(at Plan.decisions\[0\]\)"),
        (
            lambda d: d["decisions"][0].pop("reason"),
            r"missing key \(at Plan.decisions\[0\]\): expected reason",
        ),
        (lambda d: d["decisions"][0].update(num_groups="2"), r"wrong type .*num_groups\): expected int"),
        (lambda d: d["decisions"][0].update(num_groups=True), r"wrong type .*num_groups\): expected int"),
        (lambda d: d["decisions"][0].update(action="explode"), r"wrong type .*action\)"),
        (lambda d: d["decisions"][0].update(softness="soft"), r"wrong type .*softness\): expected float"),
        (lambda d: d.update(decisions={}), r"wrong type of value \(at Plan.decisions\)"),
        (lambda d: d.update(decisions=[3]), r"wrong type of value \(at Plan.decisions\[0\]\)"),
    ],
)
def test_bad_plans_say_where(change: object, message: str) -> None:
    data = plan_data()
    change(data)  # type: ignore[operator]
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)


def test_cut_off_json() -> None:
    with pytest.raises(PlanError, match=r"not JSON \(at Plan, line \d+\)"):
        Plan.from_json(Plan("f", "Net", (make(),)).to_json()[:-9])
    with pytest.raises(PlanError, match="unknown schema version"):
        Plan.from_json("[]")


def test_schema_version_is_written() -> None:
    assert json.loads(Plan("f", "Net", ()).to_json())["schema_version"] == PLAN_SCHEMA_VERSION


@dataclasses.dataclass(frozen=True)
class Measured(Record):
    value: float
    names: tuple[str, ...] = ()


@given(st.floats(allow_nan=False))
def test_floats_are_exact(value: float) -> None:
    assert Measured.from_json(Measured(value).to_json()) == Measured(value)


def test_nan_survives() -> None:
    assert math.isnan(Measured.from_json(Measured(math.nan).to_json()).value)


def test_edit() -> None:
    plan = Plan("f", "Net", (make(paths=("a.bn", "b.bn")), make(paths=("",))))
    edited = plan.edit("b.*", num_groups=4)
    assert [decision.num_groups for decision in edited.decisions] == [4, 2]
    assert plan.decisions[0].num_groups == 2
    assert [decision.num_groups for decision in plan.edit("(root)", num_groups=8).decisions] == [2, 8]
    with pytest.raises(PlanError, match=r"no such field \(at groups\): expected one of .*num_groups"):
        plan.edit("a.bn", groups=4)
    with pytest.raises(PlanError, match=r"no site has such a name \(at layer9\): expected one of a.bn"):
        plan.edit("layer9", num_groups=4)
    with pytest.raises(PlanError, match="impossible number of groups"):
        plan.edit("*", num_groups=3)


def test_inventory_reads_back() -> None:
    site = Site(("bn",), "BatchNorm2d", 8, 1e-3, True, True, False, True, "4", act="ReLU", refusal="lazy")
    fine = dataclasses.replace(site, paths=("", "x"), refusal=None)
    inventory = Inventory("Net", "f", (site, fine), left_alone=("ln: LayerNorm",), notes=("note",))
    assert Inventory.from_json(inventory.to_json()) == inventory
    assert inventory.swappable == (fine,)
    assert (site.name, fine.name) == ("bn", "(root)")


def test_globs() -> None:
    assert matches("layer1.0.bn2", "layer1.*.bn?")
    assert matches("", "(root)")
    assert not matches("layer1.bn", "bn")


def test_error_messages_answer_four_questions() -> None:
    error = GnswapError("it broke", where="here", expected="a", found="b", fix="Do this.")
    assert str(error) == "it broke (at here): expected a, found b. Do this."
    assert str(GnswapError("it broke")) == "it broke"
    assert isinstance(ArgumentError("x"), ValueError)
