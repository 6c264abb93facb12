"""What photos choose beyond order and signs: groups, softness, corrections; each can help or do nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from _models import build, same_state
from torch import Tensor, nn

from gnswap import _corrections, _tuned_layer, _tuning
from gnswap._apply import apply
from gnswap._build import build_layer
from gnswap._errors import PlanError
from gnswap._estimate import Arrangement, Tables, level, relative_error
from gnswap._moments import collect
from gnswap._norms import read_norm
from gnswap._onnx.plain import plain as plain_copy
from gnswap._plan import plan
from gnswap._records import Decision, Plan
from gnswap._revert import revert
from gnswap._running import photos_in
from gnswap._store import load, save
from gnswap._trial import Jury, Score, converted, parted


def photos(count: int = 32, seed: int = 0) -> list[Tensor]:
    """Pictures whose contrast and brightness differ, as photos' do."""
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(count, 1, 1, 1, generator=generator) * 1.5 + 0.25
    return [
        torch.randn(count, 3, 8, 8, generator=generator) * contrast + torch.randn(count, 1, 1, 1, generator=generator)
    ]


def lifelike(seed: int = 0) -> nn.Module:
    """A classifier whose running statistics are those of the photos."""
    model, _ = build("plain", seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for part in photos(256, 9)[0].split(64):
            model(part)
    return model.eval()


def swapped_answers(model: nn.Module, decisions: Iterable[Decision], x: Tensor) -> Tensor:
    with converted(model, decisions), torch.no_grad():
        answers: Tensor = model(x)
    return answers


# trying out


def test_a_trial_answers_as_the_converted_model_and_leaves_nothing() -> None:
    model, x = build("aliased")
    before = copy.deepcopy(model)
    made = plan(model, groups=2)
    with torch.no_grad():
        torch.testing.assert_close(swapped_answers(model, made.decisions, x), apply(model, made)(x))
        assert torch.equal(model(x), before(x))
    assert same_state(model, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_is_fitted_to_the_photos_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refitting and healing are judged on them: corrections that had seen them would look better than they are."""
    fitted: list[list[Tensor]] = []
    corrected = _tuning.corrected

    def seen(model: nn.Module, trial: _corrections.Trial, singles: list[Tensor]) -> list[Decision]:
        fitted.append(singles)
        return corrected(model, trial, singles)

    monkeypatch.setattr(_tuning, "corrected", seen)
    plan(lifelike(), groups=4, softness=0, calibration=photos(40))
    learned, judging = parted(photos_in(photos(40)))
    assert len(judging) == 10
    assert torch.equal(torch.cat(fitted[0]), learned)


def test_the_jury() -> None:
    model = lifelike()
    jury = Jury(model, photos_in(photos()))
    assert jury.score([]) == Score(0.0, 1.0)
    soft, pure = (jury.score(plan(model, softness=softness).decisions) for softness in (4.0, 0.0))
    assert 0 < soft.distance < pure.distance
    broken = plan(model).edit("1", offset=(1e38,) * 16, gain=(1e38,) * 16)
    assert jury.score(broken.decisions) == Score(float("inf"), 0.0)


def test_a_jury_for_what_is_no_classifier() -> None:
    model, x = build("1-D")
    jury = Jury(model, photos_in([x]))
    score = jury.score(plan(model, softness=0).decisions)
    assert score.agreement is None
    assert 0 < score.distance < 10
    far, near = ([[output + error for output in batch] for batch in jury.expected] for error in (0.2, 0.1))
    assert jury.prefers(near, far) == (True, "")
    assert jury.prefers(far, near) == (False, "")


def test_what_a_jury_prefers() -> None:
    jury = Jury(lifelike(), photos_in(photos(16)))
    (expected,) = (torch.cat([batch[0] for batch in jury.expected]),)

    def off_by(*errors: float) -> list[list[torch.Tensor]]:
        """Answers with the first logit off, by so much on each photo in turn."""
        found = expected.clone()
        found[:, 0] += torch.tensor(errors, dtype=found.dtype).repeat(16)[:16]
        return [[batch] for batch in found.split([len(batch[0]) for batch in jury.expected])]

    even, worse = off_by(0.5), off_by(0.6)
    assert jury.prefers(even, worse) == (True, "")  # nearer on every photo: no chance in it
    assert jury.prefers(worse, even) == (False, "")
    # nearer on all photos but the one that the divergence feels most: that is chance, and the logits decide
    unsure = expected.softmax(1)[:, 0].sub(0.5).abs().argmin()
    for far, taken in ((1.8, True), (3.0, False)):
        errors = [far if photo == unsure else 0.2 for photo in range(16)]
        found = off_by(*errors)
        assert jury.judge(found).distance > jury.judge(even).distance
        nearer, note = jury.prefers(found, even)
        assert nearer is taken
        assert note.startswith("within its standard error, so the squared error of the logits decides: ")
    shifted = [[output + 3.0] for (output,) in even]  # added to all logits alike, which changes no answer
    assert jury.prefers(shifted, worse) == (True, "")
    broken = [[output * float("nan")] for (output,) in even]
    assert jury.prefers(broken, even) == (False, "")
    assert jury.prefers(even, broken) == (True, "")


# groups


@pytest.mark.parametrize("softness", [0.0, 0.7])
def test_the_estimated_error_is_the_layers_own(softness: float) -> None:
    model, x = build("root")
    assert isinstance(model, nn.BatchNorm2d)
    found = Arrangement((11, 3, 5, 1, 0, 2, 4, 6, 10, 9, 8, 7), (1, -1, 1, 1, -1, 1, 1, 1, -1, 1, 1, 1))
    decision = dataclasses.replace(
        plan(model, groups=3, softness=softness).decisions[0], channel_order=found.order, signs=found.signs
    )
    tables = collect(model, [x]).layers[""].tables(read_norm(model))
    gain = level(tables, 3, found, model.eps, softness).tolist()
    decision = dataclasses.replace(decision, gain=tuple(gain))
    assert model.bias is not None
    beta = model.bias.view(1, -1, 1, 1)
    with torch.no_grad():
        theirs, ours = model(x) - beta, build_layer(model, decision)(x) - beta
    expected = float((ours - theirs).norm() / theirs.norm())
    assert relative_error(tables, 3, found, model.eps, softness, gain) == pytest.approx(expected, rel=1e-4)


def test_groups_by_photos_are_no_worse_than_without() -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.BatchNorm2d(128), nn.Flatten(), nn.Linear(128 * 64, 5)).eval()
    made = plan(model, calibration=photos())
    assert made.decisions[0].num_groups in (1, 2)
    assert "relative_error" in made.decisions[0].evidence


class Aside(nn.Module):
    """Norms that forward does not run: a head for training, and one whose statistics somebody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.aux, self.latents = nn.BatchNorm2d(16), nn.BatchNorm2d(16, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y + self.aux(y) if self.training else y


def test_norms_that_no_photo_reaches_are_said() -> None:
    made = plan(Aside().eval(), calibration=photos())
    (note,) = [note for note in made.notes if "no photo" in note]
    assert note.startswith("no photo reached aux and 1 more: exclude what is used outside of forward")
    assert "0 samples reached the layer" in made.decisions[2].reason
    assert not any(
        "no photo" in note for note in plan(Aside().eval(), exclude=["aux", "latents"], calibration=photos()).notes
    )


# softness for a target


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A jury for which agreement is the mean softness, and corrections that do nothing."""

    def score(_jury: Jury, decisions: Iterable[Decision]) -> Score:
        softness = [decision.softness for decision in decisions]
        return Score(1.0, sum(softness) / len(softness))

    monkeypatch.setattr(Jury, "score", score)


@pytest.mark.usefixtures("graded")
def test_the_least_softness_that_reaches_the_target() -> None:
    made = plan(lifelike(), calibration=photos(), fidelity=0.5)
    softness = [decision.softness for decision in made.swaps]
    assert 0.5 <= sum(softness) / len(softness) < 0.75
    assert any("target 0.5 is met" in note and "it cost a softness of" in note for note in made.notes)
    assert all("for the target" in decision.reason for decision in made.swaps)


@pytest.mark.usefixtures("graded")
def test_a_target_out_of_reach_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"out of reach: softness 0\.25 everywhere keeps the class of 0\.250"):
        made = plan(lifelike(), calibration=photos(), fidelity=0.5, max_softness=0.25)
    assert all(decision.softness == 0.25 for decision in made.swaps)
    assert any("out of reach" in note for note in made.notes)


def test_a_target_that_pure_groupnorm_meets() -> None:
    made = plan(lifelike(), calibration=photos(), fidelity=0.01)
    assert all(decision.softness == 0 for decision in made.swaps)
    assert any("met by pure GroupNorm" in note for note in made.notes)


def test_a_target_is_judged_by_all_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those held out alone are too few: here all their answers change and none of the others'."""
    batches = photos()
    total = sum(len(batch) for batch in batches)
    seen: list[int] = []

    def score(jury: Jury, _decisions: object) -> Score:
        seen.append(len(jury.photos))
        return Score(1.0, 0.0 if len(jury.photos) < total // 2 else 0.8)

    monkeypatch.setattr(Jury, "score", score)
    made = plan(lifelike(), calibration=batches, fidelity=0.75)
    assert {total // 2, total // 4} <= set(seen)
    assert any(f"is met by pure GroupNorm on {total} photos" in note for note in made.notes)


@pytest.mark.usefixtures("graded")
def test_softness_that_was_given_is_not_touched() -> None:
    made = plan(lifelike(), calibration=photos(), fidelity=0.6, overrides={"1": {"softness": 0.3}})
    assert made.decisions[0].softness == 0.3
    assert made.decisions[1].softness > 0.8


# corrections


LOUD = 3.0  # photos this much louder than the running statistics say: BatchNorm passes it on, GroupNorm divides it out


def answer_errors(model: nn.Module, *decisions: Iterable[Decision]) -> list[float]:
    other = LOUD * photos(64, seed=5)[0]
    with torch.no_grad():
        expected = model(other)
    return [float((swapped_answers(model, each, other) - expected).norm()) for each in decisions]


def test_corrections_repair_a_drifted_layer() -> None:
    model = lifelike()
    bare = plan(model, softness=0).decisions
    loud = photos_in([LOUD * photos()[0]])
    trial = _corrections.tried(bare, (Jury(model, loud[::2]), Jury(model, loud[1::2])))
    fixed, note = _corrections.corrected(model, trial, loud), trial.note
    assert all(decision.gain is not None and decision.offset is not None for decision in fixed)
    assert "paired corrections" in note
    assert "not fitted on" in note
    before, after = answer_errors(model, bare, fixed)
    assert after < 0.9 * before


def test_levels_repair_a_drifted_layer() -> None:
    model = lifelike()
    made = plan(model, calibration=[LOUD * photos()[0]], softness=0)
    assert all(decision.gain is not None for decision in made.swaps)
    assert all("level from photos" in decision.reason for decision in made.swaps)
    before, after = answer_errors(model, plan(model, softness=0).decisions, made.decisions)
    assert after < 0.9 * before
    assert Plan.from_json(made.to_json()) == made


def test_levels_that_harm_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def nonsense(tables: Tables, *_rest: object) -> Tensor:
        return torch.full(tables.mean.shape[1:], 10.0)

    monkeypatch.setattr(_tuned_layer, "level", nonsense)
    made = plan(lifelike(), calibration=photos())
    assert all(decision.gain is None or max(decision.gain) < 2 for decision in made.swaps)
    assert not any("level from photos" in decision.reason for decision in made.swaps)


@pytest.mark.usefixtures("graded")
def test_of_equally_good_ways_the_plainest_is_taken() -> None:
    made = plan(lifelike(), calibration=photos(), groups=2)
    assert all(decision.channel_order is None and decision.signs is None for decision in made.swaps)
    assert any(note.startswith("taken: as without photos; ") for note in made.notes)


def test_corrections_that_harm_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lifelike()

    def nonsense(_model: nn.Module, decisions: Iterable[Decision], _photos: object) -> list[Decision]:
        return [dataclasses.replace(d, gain=(1.5,) * d.num_channels, offset=(5.0,) * d.num_channels) for d in decisions]

    monkeypatch.setattr(_corrections, "_fitted", nonsense)
    made = plan(model, calibration=photos())
    assert all(decision.gain is None and decision.offset is None for decision in made.swaps)
    assert any("no paired corrections" in note for note in made.notes)


def test_photos_each_of_a_size_of_its_own() -> None:
    """So that every batch holds one photo, whose scatter nobody knows."""
    model, (x, *_) = lifelike(), photos(12)
    sizes = [photo.repeat(1, 1, 2, 2)[..., : 16 - number] for number, photo in enumerate(x.split(1))]
    single = photos_in(sizes)
    assert [photo.shape[-1] for photo in single] == list(range(5, 17))
    bare = plan(model, softness=0).decisions
    for fitted in _corrections._fitted(model, bare, single[:1]):
        assert fitted.offset == (0.0,) * fitted.num_channels
    trial = _corrections.tried(bare, (Jury(model, single[::2]), Jury(model, single[1::2])))
    assert math.isfinite(trial.distance)
    assert plan(model, calibration=sizes).notes[0] == "chosen on 9 photos and judged on 3 others"


@pytest.mark.parametrize("name", ["called twice", "aliased", "1-D", "3-D", "1-D, no length", "affine=False", "root"])
def test_corrections_on_networks_of_all_kinds(name: str) -> None:
    model, x = build(name)
    before = copy.deepcopy(model)
    made = plan(model, calibration=[torch.cat([x + shift for shift in range(5)])])
    assert same_state(model, before)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.isfinite(apply(model, made)(x)).all()


def hand_corrected() -> tuple[nn.Module, Plan, Tensor]:
    model, x = build("plain")
    generator = torch.Generator().manual_seed(0)
    gain, offset = (torch.rand(16, generator=generator) + 0.5).tolist(), torch.randn(16, generator=generator).tolist()
    return model, plan(model, groups=4).edit("1", gain=tuple(gain), offset=tuple(offset)), x


def test_corrections_leave_the_parameters_alone() -> None:
    model, made, x = hand_corrected()
    plain = apply(model, made.edit("1", gain=None, offset=None))
    layer = apply(model, made)[1]
    assert torch.equal(layer.weight, model[1].weight)
    assert torch.equal(layer.bias, model[1].bias)
    gain, offset = (torch.tensor(value).view(-1, 1, 1) for value in (made.decisions[0].gain, made.decisions[0].offset))
    beta = layer.bias.view(-1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(model[0](x)), (plain[1](model[0](x)) - beta) * gain + beta + offset)


def test_corrected_models_are_saved_exported_and_reverted(tmp_path: Path) -> None:
    model, made, x = hand_corrected()
    swapped = apply(model, made).eval()
    with torch.no_grad():
        expected = swapped(x)
        save(swapped, tmp_path / "saved")
        assert torch.equal(load(tmp_path / "saved", build("plain", seed=3)[0]).eval()(x), expected)
        prepared, _, _ = plain_copy(swapped)
        torch.testing.assert_close(prepared(x), expected, rtol=1e-4, atol=1e-5)
    assert same_state(revert(swapped), model)


def test_a_change_of_softness_keeps_the_corrections() -> None:
    model, made, _ = hand_corrected()
    layer = apply(model, made)[1]
    correction, offset = layer.channel_correction.clone(), layer.channel_offset.clone()
    layer.softness = 0.2
    assert torch.equal(layer.channel_correction, correction)
    assert torch.equal(layer.channel_offset, offset)
    expected = build_layer(model[1], dataclasses.replace(made.decisions[0], softness=0.2))
    torch.testing.assert_close(layer.channel_gain, expected.channel_gain)


@pytest.mark.parametrize("field", ["gain", "offset"])
@pytest.mark.parametrize("values", [(1.0,) * 3, (float("nan"),) * 16])
def test_corrections_that_do_not_fit_are_refused(field: str, values: tuple[float, ...]) -> None:
    with pytest.raises(PlanError, match=f"wrong {field}.*16 finite numbers"):
        plan(build("plain")[0]).edit("1", **{field: values})
