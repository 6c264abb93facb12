"""Fidelity: what it measures is right, what it touches is put back, and it does not depend on the batches."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap._baselines import naive_group_norm
from gnswap._errors import ArgumentError, CalibrationError
from gnswap._fidelity import Fidelity, compare
from gnswap._layer import FusedGroupNorm
from tests._models import randomise_norms


def net(classes: int = 5) -> nn.Sequential:
    """A small classifier with an in-place activation behind each norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )
    randomise_norms(model).eval()
    with torch.no_grad():  # so that different photos get different answers
        model[-1].weight.mul_(20)
        model[-1].bias.sub_(model(photos()).mean(0))
    return model


def photos(count: int = 21) -> Tensor:
    """Noise of different strengths, so that the network is sure of some photos and not of others."""
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return noise * torch.linspace(0.1, 4, count)[:, None, None, None]


class Answer(nn.Module):
    """A network whose answers are given: it looks its rows up by the input's first value."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x[:, 0].long()]


def answers(theirs: list[list[float]], ours: list[list[float]], labels: list[int] | None = None) -> Fidelity:
    index = torch.arange(len(theirs), dtype=torch.float64)[:, None]
    batch: Any = index if labels is None else (index, torch.tensor(labels))
    models = [Answer(torch.tensor(table, dtype=torch.float64)) for table in (theirs, ours)]
    return compare(*models, [batch])


def test_against_plain_formulas() -> None:
    original = net()
    converted = naive_group_norm(original, 2)
    x = photos()
    fidelity = compare(original, converted, [x])
    with torch.no_grad():
        logits, ours = original(x).double(), converted(x).double()
    top, sure = logits.argmax(1), logits.softmax(1).amax(1) > 0.5
    agree = (top == ours.argmax(1)).double()
    kl = F.kl_div(ours.log_softmax(1), logits.softmax(1), reduction="batchmean")
    assert 0 < sure.sum() < 21, "the test needs photos of both kinds"
    assert fidelity.photos == 21
    assert fidelity.sure == int(sure.sum())
    assert fidelity.agreement == pytest.approx(float(agree.mean()))
    assert fidelity.agreement_sure == pytest.approx(float(agree[sure].mean()))
    assert fidelity.kl == pytest.approx(float(kl), rel=1e-5)
    assert fidelity.logit_error == pytest.approx(float((ours - logits).norm() / logits.norm()), rel=1e-5)


def test_layers_against_plain_formulas() -> None:
    """Pitfall: an in-place activation overwrites the norm's output before it is looked at."""
    original = net()
    converted = naive_group_norm(original, 2)
    x = photos()
    layers = compare(original, converted, [x]).layers
    assert [layer.name for layer in layers] == ["1", "4"]
    with torch.no_grad():
        for layer in layers:
            depth = int(layer.name) + 1
            theirs, ours = original[:depth](x).double(), converted[:depth](x).double()
            assert layer.relative_error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-5)
            assert layer.gain == pytest.approx(float((ours * theirs).sum() / theirs.square().sum()), rel=1e-5)


def test_gain_sees_a_scaled_layer() -> None:
    original = naive_group_norm(net(), 2)
    converted = copy.deepcopy(original)
    norm = converted[1]
    assert isinstance(norm, FusedGroupNorm)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.mul_(0.75)
    first = compare(original, converted, [photos()]).layers[0]
    assert first.gain == pytest.approx(0.75)
    assert first.relative_error == pytest.approx(0.25)


@pytest.mark.parametrize("size", [1, 5, 8, 16])
def test_batches_do_not_matter(size: int) -> None:
    original = net()
    converted = naive_group_norm(original, 2)
    whole = compare(original, converted, [photos()]).to_dict()
    split = compare(original, converted, photos().split(size)).to_dict()
    for key, value in whole.items():
        if key == "layers":
            for ours, theirs in zip(split[key], value, strict=True):
                assert ours.pop("name") == theirs["name"]
                assert ours == pytest.approx({k: v for k, v in theirs.items() if k != "name"}, rel=1e-5)
        else:
            assert split[key] == (value if value is None else pytest.approx(value, rel=1e-5))


def test_same_call_same_bits() -> None:
    original = net()
    converted = naive_group_norm(original, 2)
    assert compare(original, converted, [photos()]) == compare(original, converted, [photos()])


def test_a_network_against_itself() -> None:
    model = naive_group_norm(net(), 2)
    fidelity = compare(model, model, [photos()])
    assert (fidelity.agreement, fidelity.kl, fidelity.logit_error) == (1.0, 0.0, 0.0)
    assert [(layer.relative_error, layer.gain) for layer in fidelity.layers] == [(0.0, 1.0)] * 2


def test_everything_touched_is_put_back() -> None:
    """The mode of each module (frozen BatchNorm inside a training network) and the hooks, also after an error."""
    original, converted = net().train(), naive_group_norm(net(), 2).train()
    original[1].eval()
    converted[4].eval()
    before = [[module.training for module in model.modules()] for model in (original, converted)]
    state = copy.deepcopy(original.state_dict())
    compare(original, converted, [photos()])
    with pytest.raises(CalibrationError, match=r"does not take a batch.*expected input"):
        compare(original, converted, [torch.randn(2, 4, 12, 12)])
    assert before == [[module.training for module in model.modules()] for model in (original, converted)]
    assert not any(module._forward_hooks for model in (original, converted) for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())


def test_no_gradients_are_kept() -> None:
    original, seen = net(), []
    converted = naive_group_norm(original, 2)
    original.register_forward_hook(lambda _m, _i, output: seen.append(output.requires_grad))
    compare(original, converted, [photos(2)])
    assert seen == [False]


def test_labels_give_both_accuracies() -> None:
    theirs = [[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [2.0, 0, 0]]
    ours = [[2.0, 0, 0], [2.0, 0, 0], [2.0, 0, 0], [2.0, 0, 0]]
    fidelity = answers(theirs, ours, labels=[0, 1, 0, -1])
    assert (fidelity.labelled, fidelity.accuracy_original) == (3, pytest.approx(2 / 3))
    assert fidelity.accuracy_converted == pytest.approx(2 / 3)
    assert answers(theirs, ours).accuracy_original is None


@pytest.mark.parametrize(
    "second", [None, "name", torch.randn(21), torch.arange(20)], ids=["none", "text", "floats", "other length"]
)
def test_what_is_no_label_is_ignored(second: Any) -> None:
    fidelity = compare(net(), net(), [(photos(), second)], layers=False)
    assert (fidelity.photos, fidelity.labelled, fidelity.accuracy_original) == (21, 0, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_answers_do_not_agree(bad: float) -> None:
    """argmax of a row with NaN is the NaN's place, which may be the right class by chance."""
    fidelity = answers([[5.0, 0], [5.0, 0]], [[bad, 0], [5.0, 0]], labels=[0, 0])
    assert fidelity.agreement == 0.5
    assert fidelity.accuracy_converted == 0.5
    assert not math.isfinite(fidelity.logit_error)
    assert str(Fidelity.from_json(fidelity.to_json())) == str(fidelity), "the record can still be written"


def test_nobody_is_sure() -> None:
    fidelity = answers([[0.0, 0, 0.1]], [[0.0, 0, 0.1]])
    assert (fidelity.sure, fidelity.agreement_sure) == (0, None)


def test_certainty_has_no_nan() -> None:
    assert answers([[1e5, 0.0], [-math.inf, 0.0]], [[1e5, 1.0], [-5.0, 0.0]]).kl == pytest.approx(0.00335, rel=0.01)


class Features(nn.Module):
    """What segmentation and detection networks give: several maps, nested, with something that is no tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.kind = net()[:6], kind

    def forward(self, x: Tensor) -> Any:
        maps = self.body(x)
        return {
            "map": maps,
            "tuple": (maps, [maps * 2, None]),
            "dict": {"out": maps, "count": torch.ones(2, dtype=torch.long), "name": "x"},
        }[self.kind]


@pytest.mark.parametrize("kind", ["map", "tuple", "dict"])
def test_no_classifier(kind: str) -> None:
    original = Features(kind)
    converted = naive_group_norm(original, 2)
    fidelity = compare(original, converted, [photos()])
    assert (fidelity.agreement, fidelity.agreement_sure, fidelity.kl, fidelity.sure) == (None, None, None, 0)
    body = compare(original.body, converted.body, [photos()])
    assert fidelity.logit_error == pytest.approx(body.logit_error)
    assert fidelity.layers == tuple(dataclasses.replace(layer, name=f"body.{layer.name}") for layer in body.layers)


def test_headless_network_is_no_classifier() -> None:
    """timm's num_classes=0 gives `[N, features]`: the largest feature is no answer."""
    original = net()
    original.num_classes = 0  # type: ignore[assignment]
    assert compare(original, naive_group_norm(original, 2), [photos()]).agreement is None


def test_half_networks_get_half_inputs() -> None:
    original = net()
    converted = naive_group_norm(original, 2).to(torch.bfloat16)
    exact = compare(original, naive_group_norm(original, 2), [photos()])
    assert compare(original, converted, [photos()]).logit_error == pytest.approx(exact.logit_error, rel=0.05)


@pytest.mark.parametrize("batches", [[], iter(()), [torch.empty(0, 3, 12, 12)]], ids=["list", "iterator", "no rows"])
def test_no_photos(batches: Any) -> None:
    with pytest.raises(CalibrationError, match=r"no photos to compare on.*can be read only once"):
        compare(net(), net(), batches)


@pytest.mark.parametrize("batch", ["photo.jpg", None, (), {"x": 1}, torch.tensor(1.0)], ids=str)
def test_a_batch_that_is_no_tensor(batch: Any) -> None:
    with pytest.raises(CalibrationError, match="a batch is no tensor"):
        compare(net(), net(), [batch])


def test_outputs_that_differ_in_shape() -> None:
    with pytest.raises(ArgumentError, match=r"outputs do not correspond.*\(8, 5\).*\(8, 4\)"):
        compare(net(5), naive_group_norm(net(4), 2), [photos()])


def test_outputs_without_numbers() -> None:
    class Class(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).argmax(1)

    with pytest.raises(ArgumentError, match="outputs do not correspond"):
        compare(Class(), Class(), [photos()])


def test_another_architecture() -> None:
    with pytest.raises(ArgumentError, match=r"not the same architecture \(at 4\)"):
        compare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), naive_group_norm(net(), 2), [photos()])


@pytest.mark.parametrize("shorter", ["original", "converted"])
def test_a_layer_called_another_number_of_times(shorter: str) -> None:
    class Repeat(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.norm, self.times = nn.BatchNorm2d(3), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.norm(x)
            return x

    times = (1, 2) if shorter == "original" else (2, 1)
    with pytest.raises(ArgumentError, match=r"use a layer differently \(at norm\)"):
        compare(Repeat(times[0]).eval(), naive_group_norm(Repeat(times[1]).eval(), 1), [photos()])


def test_a_norm_as_the_whole_network() -> None:
    original = randomise_norms(nn.BatchNorm2d(3)).eval()
    assert compare(original, naive_group_norm(original, 1), [photos()]).layers[0].name == "(root)"


def test_naive_copy_of_lite0_knows_nothing(lite0: nn.Module, sample_batch: Tensor, sample_labels: Tensor) -> None:
    fidelity = compare(lite0, naive_group_norm(lite0), [(sample_batch[:12], sample_labels[:12])], layers=False)
    assert fidelity.agreement is not None
    assert fidelity.agreement < 0.1
    assert fidelity.accuracy_original is not None
    assert fidelity.accuracy_original >= 0.8
    assert fidelity.accuracy_converted == 0
