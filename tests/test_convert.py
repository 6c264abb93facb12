"""convert: one call, the input untouched, and a report of what came of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _models import ZOO, build, same_state, small_cnn
from torch import Tensor, nn

from gnswap._convert import Conversion, ConversionReport, convert
from gnswap._errors import ArgumentError, CalibrationError, NothingToSwapError
from gnswap._fidelity import compare
from gnswap._layer import FusedGroupNorm
from gnswap._plan import plan
from gnswap._sites import find_norms


@pytest.mark.parametrize("name", ZOO)
def test_the_input_is_left_untouched(name: str) -> None:
    model, x = build(name)
    same, _ = build(name)
    conversion = convert(model)
    assert isinstance(conversion, Conversion)
    assert same_state(model, same)
    assert not any(isinstance(module, FusedGroupNorm) for module in model.modules())
    assert not find_norms(conversion.model)
    assert conversion.plan == plan(model)
    assert conversion.report.swapped == len(conversion.plan.decisions)
    assert conversion.report.fidelity is None
    assert conversion.model(x).isfinite().all()


def test_kept_layers_and_options() -> None:
    conversion = convert(small_cnn(), group_size=8, softness=0, exclude="4")
    assert (conversion.report.swapped, conversion.report.kept) == (1, 1)
    assert conversion.report.notes[0] == 'kept 4: excluded by "4"'
    assert conversion.model[1].num_groups == 2
    assert conversion.model[1].softness == 0


def batches() -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    yield torch.randn(4, 3, 8, 8)
    yield torch.randn(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64)


def test_fidelity_from_a_one_shot_iterator() -> None:
    model, _ = build("plain")
    conversion = convert(model, calibration=batches(), fidelity=0.01)
    expected = compare(model, conversion.model, batches())
    assert conversion.report.fidelity == expected
    assert expected.photos == 7
    assert any("target 0.01 met" in note for note in conversion.report.notes)
    assert ConversionReport.from_json(conversion.report.to_json()) == conversion.report


def test_a_missed_target_is_said() -> None:
    model, _ = build("plain")
    with torch.no_grad():
        model[-1].weight.mul_(10)  # without this one class always wins
        model[-1].bias.sub_(model(torch.randn(64, 3, 8, 8)).mean(0))
    with pytest.warns(UserWarning, match="the target 1 is out of reach"):
        conversion = convert(model, calibration=[torch.randn(64, 3, 8, 8)], fidelity=1.0, group_size=4)
    assert conversion.report.fidelity is not None
    assert conversion.report.fidelity.agreement < 1
    assert any("target 1 missed" in note for note in conversion.report.notes)


def test_a_target_for_what_is_no_classifier() -> None:
    model, x = build("1-D")
    notes = convert(model, calibration=[x], fidelity=0.9).report.notes
    assert any("cannot be judged: the network is no classifier" in note for note in notes)


def test_photos_that_are_none() -> None:
    with pytest.raises(CalibrationError):
        convert(small_cnn(), calibration=[])
    with pytest.raises(ArgumentError, match=r"not an iterable of batches.*found Tensor.*in a list"):
        convert(small_cnn(), calibration=torch.randn(2, 3, 8, 8))


def test_nothing_to_swap() -> None:
    with pytest.raises(NothingToSwapError, match="swaps nothing"):
        convert(nn.Linear(2, 2))


def test_a_network_inside_another_is_converted_once() -> None:
    inner = convert(small_cnn()).model
    outer = nn.ModuleDict({"backbone": inner, "neck": nn.BatchNorm2d(8)})
    converted = convert(outer)
    assert converted.report.swapped == 1
    assert isinstance(converted.model["neck"], FusedGroupNorm)
