"""Healing: it helps on photos it has not seen, never harms, resumes exactly, and says what it cannot do."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gnswap
from gnswap import ArgumentError, CalibrationError, FusedGroupNorm, HealingError, StoreError, _healer, _trial
from gnswap._convert import taught
from gnswap._couple import LEAST_PHOTOS
from tests._models import ZOO, build, randomise_norms, same_state, small_cnn


def networks(seed: int = 0, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A small network whose statistics are those of its photos, and what pure GroupNorm makes of it."""
    torch.manual_seed(seed)
    original = small_cnn().train()
    with torch.no_grad():
        for _ in range(20):
            original(photos(32))
        original[-1].weight.mul_(8)  # answers that differ from photo to photo
    original.eval()
    return original, gnswap.convert(original, **{"groups": 4, "softness": 0, **options}).model


def photos(count: int = 32, seed: int = 0) -> Tensor:
    """Noise of a size, contrast and colour of its own in every picture: what GroupNorm divides out, `[N, 3, 8, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    return x * (0.5 + torch.rand(count, 3, 1, 1, generator=generator)) + torch.randn(
        count, 3, 1, 1, generator=generator
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


QUICK: dict[str, Any] = {"steps": 20, "lr": 3e-3}


class TestHelps:
    def test_it_comes_closer_on_photos_that_nobody_has_seen(self) -> None:
        original, converted = networks()
        fresh = [photos(64, seed=9)]
        before = gnswap.compare(original, converted, fresh)
        original_weights, buffers = weights(original), dict(converted.named_buffers())
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        report = gnswap.heal(converted, original, [photos()], steps=60, lr=1e-2)
        after = gnswap.compare(original, converted, fresh)
        assert before.kl is not None
        assert after.kl is not None
        assert after.kl < 0.7 * before.kl
        assert report.healed
        assert report.verdict.startswith("healed: distance")
        assert (report.photos, report.held_out) == (24, 8)
        assert report.after.distance < report.before.distance
        assert same_state(original, _with(original, original_weights)), "the original is only read"
        assert all(torch.equal(kept[name], buffer) for name, buffer in converted.named_buffers())

    def test_the_best_weights_are_the_ones_reported(self) -> None:
        original, converted = networks()
        report = gnswap.heal(converted, original, [photos()], **QUICK)
        held = _trial.judges(32)
        singles = gnswap._running.photos_in([photos()])
        judges = torch.cat([photo for photo, judge in zip(singles, held, strict=True) if judge])
        fidelity = gnswap.compare(original, converted, [judges], layers=False)
        assert fidelity.kl == pytest.approx(report.after.distance, rel=1e-5)
        assert fidelity.agreement == pytest.approx(report.after.agreement)
        least = min(look.distance for look in report.looks)
        assert report.after == [look for look in report.looks if look.distance < 1.02 * least][-1]
        assert [look.step for look in report.looks][:3] == [0, 2, 4]

    @pytest.mark.parametrize(("last", "best_step"), [(0.505, 20), (0.52, 18), (0.4, 20)])
    def test_of_nearly_equal_weights_the_last_are_taken(
        self, monkeypatch: pytest.MonkeyPatch, last: float, best_step: int
    ) -> None:
        original, converted = networks()
        distances = iter([1.0, *[0.9] * 8, 0.5, last])
        monkeypatch.setattr(_trial.Jury, "judge", lambda *_: _trial.Score(next(distances), 0.5))
        report = gnswap.heal(converted, original, [photos()], **QUICK)
        assert (report.best_step, report.steps) == (best_step, 20)

    @pytest.mark.parametrize("name", ["aliased", "pre-activation", "1-D", "1-D, no length", "3-D", "root", "eps 1e-3"])
    def test_any_network(self, name: str) -> None:
        """Among them such as are no classifiers, and norms that are called twice."""
        original, _ = build(name)
        converted = gnswap.convert(original, softness=0).model
        x = torch.randn(16, *ZOO[name][1])
        report = gnswap.heal(converted, original, [x], steps=10, lr=1e-3, batch_size=4)
        assert report.after.distance < report.before.distance
        assert (report.after.agreement is None) == (name in ("aliased", "1-D", "3-D", "root"))

    def test_in_place_activations_behind_the_norm(self) -> None:
        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 4)]
        original = randomise_norms(nn.Sequential(*parts)).eval()
        converted = gnswap.convert(original, groups=2, softness=0).model
        report = gnswap.heal(converted, original, [photos(16)], **QUICK)
        assert report.healed

    def test_modes_and_flags_are_given_back(self) -> None:
        original, converted = networks()
        original.train()
        converted.train()
        converted[1].eval()
        converted[0].weight.requires_grad_(False)
        frozen = converted[0].weight.clone()
        gnswap.heal(converted, original, [photos()], **QUICK)
        assert original.training
        assert converted.training
        assert not converted[1].training
        assert torch.equal(converted[0].weight, frozen)
        assert all(parameter.grad is None for parameter in (*original.parameters(), *converted.parameters()))
        assert not converted[1]._forward_hooks

    def test_a_step_is_a_share_of_the_size_of_each_layer(self) -> None:
        """AdamW's first step moves whatever has a gradient by the learning rate: here, by 1e-4 of its layer's size."""
        original, converted = networks()
        before = {name: parameter.detach().clone() for name, parameter in converted.named_parameters()}
        assert gnswap.heal(converted, original, [photos()], steps=1, lr=1e-4).healed
        for name, parameter in converted.named_parameters():
            size = float(before[f"{name.rpartition('.')[0]}.weight"].square().mean().sqrt())
            assert float((parameter - before[name]).detach().abs().max()) == pytest.approx(1e-4 * size, rel=0.05), name

    def test_an_original_in_half_precision(self) -> None:
        original, converted = networks()
        assert gnswap.heal(converted, original.bfloat16(), [photos()], **QUICK).healed

    @pytest.mark.parametrize("terminal", [True, False])
    def test_progress_goes_to_a_terminal_only(
        self, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
        original, converted = networks()
        gnswap.heal(converted, original, [photos()], **QUICK)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("healing, held out" in err) == terminal

    def test_saved_loaded_and_no_longer_reverted(self, tmp_path: Path) -> None:
        original, converted = networks()
        gnswap.heal(converted, original, [photos()], **QUICK)
        gnswap.save(converted, tmp_path / "healed")
        loaded = gnswap.load(tmp_path / "healed", original)
        assert torch.equal(loaded(photos()), converted(photos()))
        with pytest.raises(gnswap.RevertError, match="the network has changed since its conversion"):
            gnswap.revert(converted)

    def test_the_order_of_the_photos_and_their_batches_do_not_matter(self) -> None:
        original, one = networks()
        other, x = copy.deepcopy(one), photos()
        gnswap.heal(one, original, [x], **QUICK)
        gnswap.heal(other, original, [(part, torch.zeros(len(part))) for part in x.flip(0).split(5)], **QUICK)
        assert same_state(one, other)

    def test_another_seed_is_another_healing(self) -> None:
        original, one = networks()
        other = copy.deepcopy(one)
        gnswap.heal(one, original, [photos()], **QUICK)
        gnswap.heal(other, original, [photos()], seed=1, **QUICK)
        assert not same_state(one, other)

    def test_parts_of_a_batch_give_the_same_up_to_rounding(self) -> None:
        original, one = networks()
        other = copy.deepcopy(one)
        gnswap.heal(one.double(), original.double(), [photos()], **QUICK)
        gnswap.heal(other.double(), original, [photos()], accumulation=3, **QUICK)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("layers", "heard"), [(1, 1), (16, 16), (17, 9), (49, 13), (200, 16)])
def test_of_many_layers_it_listens_to_some(layers: int, heard: int) -> None:
    names = [str(number) for number in range(layers)]
    some = _healer._some(names)
    assert len(some) == heard
    assert some[-1] == names[-1]
    assert some == sorted(some, key=int)


class TestNeverHarms:
    def test_where_nothing_helps_the_network_comes_back_bit_for_bit(self) -> None:
        original, converted = networks()
        before = weights(converted)
        report = gnswap.heal(converted, original, [photos()], steps=20, lr=30.0)
        assert not report.healed
        assert report.verdict.startswith("not healed: nothing was better")
        assert (report.best_step, report.after) == (0, report.before)
        assert same_state(converted, _with(converted, before))
        gnswap.revert(converted)  # does not refuse

    def test_it_stops_early_where_it_gets_no_better(self) -> None:
        original, converted = networks()
        report = gnswap.heal(converted, original, [photos()], steps=100, lr=30.0)
        assert report.steps == 80
        assert "no better since step 0" in report.verdict

    def test_a_loss_that_is_not_finite(self, tmp_path: Path) -> None:
        original, converted = networks()
        before = weights(converted)
        with pytest.raises(HealingError, match=r"the loss is no longer finite \(at step \d+ of 20\)"):
            gnswap.heal(converted, original, [photos()], steps=20, lr=1e30, checkpoint=tmp_path / "state")
        assert same_state(converted, _with(converted, before))
        assert json.loads((tmp_path / "state" / "healing.json").read_text())["step"] < 20

    def test_an_interruption_leaves_the_best_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original, converted = networks()
        before = weights(converted)
        _interrupt_after(monkeypatch, 9)
        with pytest.raises(KeyboardInterrupt):
            gnswap.heal(converted, original, [photos()], **QUICK)
        monkeypatch.undo()
        assert not same_state(converted, _with(converted, before))
        whole = _with(converted, before)
        report = gnswap.heal(whole, original, [photos()], **QUICK)
        looks = {look.step: look.distance for look in report.looks}
        found = gnswap.heal(converted, original, [photos()], steps=1, lr=1e-9).before
        assert found.distance == min(looks[step] for step in (0, 2, 4, 6, 8))


class TestSoftness:
    def test_it_ends_pure(self) -> None:
        original, converted = networks(softness=1.0)
        soft = gnswap.compare(original, converted, [photos()]).kl
        report = gnswap.heal(converted, original, [photos()], steps=60, lr=1e-2, softness_end=0.0)
        assert report.healed
        assert {layer.softness for layer in _layers(converted)} == {0.0}
        assert report.best_step >= 30, "a soft network is no candidate"
        pure = gnswap.convert(original, groups=4, softness=0).model
        judges = gnswap.heal(pure, original, [photos()], steps=1, lr=1e-9).before
        assert report.before.distance == pytest.approx(judges.distance, rel=1e-4), "compared at the same softness"
        assert soft is not None

    def test_where_nothing_helps_it_is_as_soft_as_before(self) -> None:
        original, converted = networks(softness=1.0)
        before = weights(converted)
        report = gnswap.heal(converted, original, [photos()], steps=20, lr=30.0, softness_end=0.0)
        assert not report.healed
        assert {layer.softness for layer in _layers(converted)} == {1.0}
        assert same_state(converted, _with(converted, before))


class TestResume:
    @pytest.mark.parametrize("options", [{}, {"softness_end": 0.0}], ids=["plain", "annealed"])
    @pytest.mark.parametrize("killed_after", [0, 3, 13])
    def test_it_ends_with_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, options: dict[str, Any]
    ) -> None:
        original, whole = networks(softness=0.5)
        killed, fresh = copy.deepcopy(whole), copy.deepcopy(whole)
        options = {**QUICK, **options}
        report = gnswap.heal(whole, original, [photos()], **options)
        _interrupt_after(monkeypatch, killed_after)
        with pytest.raises(KeyboardInterrupt):
            gnswap.heal(killed, original, [photos()], checkpoint=tmp_path / "state", **options)
        monkeypatch.undo()
        # another process begins with the network as it was, this one could also begin with what it has now
        for network in (fresh, killed):
            folder = tmp_path / f"state {network is fresh}"
            _copy(tmp_path / "state", folder)
            resumed = gnswap.heal(network, original, [photos()], checkpoint=folder, **options)
            assert same_state(network, whole)
            assert [layer.softness for layer in _layers(network)] == [layer.softness for layer in _layers(whole)]
            assert [_timeless(look) for look in resumed.looks] == [_timeless(look) for look in report.looks]

    def test_what_is_done_is_not_done_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original, converted = networks()
        fresh = copy.deepcopy(converted)
        report = gnswap.heal(converted, original, [photos()], checkpoint=tmp_path, **QUICK)
        _interrupt_after(monkeypatch, 0)
        assert gnswap.heal(fresh, original, [photos()], checkpoint=tmp_path, **QUICK) == report
        assert same_state(fresh, converted)

    def test_a_checkpoint_of_another_healing_is_refused(self, tmp_path: Path) -> None:
        original, converted = networks()
        other = copy.deepcopy(converted)
        gnswap.heal(converted, original, [photos()], steps=4, checkpoint=tmp_path)
        before = weights(other)
        with pytest.raises(StoreError, match=r"the checkpoint is of another healing .*steps 4 there and 5 here"):
            gnswap.heal(other, original, [photos()], steps=5, checkpoint=tmp_path)
        with pytest.raises(StoreError, match=r"another healing .*photos"):
            gnswap.heal(other, original, [photos(seed=3)], steps=4, checkpoint=tmp_path)
        with torch.no_grad():
            other[0].weight += 1
        with pytest.raises(StoreError, match="other weights of the converted network"):
            gnswap.heal(other, original, [photos()], steps=4, checkpoint=tmp_path)
        with torch.no_grad():
            other[0].weight -= 1
        assert before.keys() == weights(other).keys()

    def test_other_directories_are_refused(self, tmp_path: Path) -> None:
        original, converted = networks()
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(StoreError, match="refusing to overwrite"):
            gnswap.heal(converted, original, [photos()], steps=4, checkpoint=tmp_path)
        assert (tmp_path / "thesis.tex").read_text() == "precious"

    @pytest.mark.parametrize("text", ['{"job": {', "{}"])
    def test_a_broken_checkpoint_is_refused(self, tmp_path: Path, text: str) -> None:
        original, converted = networks()
        (tmp_path / "healing.json").write_text(text)
        with pytest.raises(StoreError, match="the checkpoint cannot be read"):
            gnswap.heal(converted, original, [photos()], steps=4, checkpoint=tmp_path)

    def test_another_schema_version_is_refused(self, tmp_path: Path) -> None:
        original, converted = networks()
        gnswap.heal(converted, original, [photos()], steps=2, checkpoint=tmp_path)
        path = tmp_path / "healing.json"
        path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 99'))
        with pytest.raises(StoreError, match=r"unknown schema version .*expected 2, found 99"):
            gnswap.heal(networks()[1], original, [photos()], steps=2, checkpoint=tmp_path)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"steps": 0}, "steps is too small"),
            ({"batch_size": 0}, "batch_size is too small"),
            ({"accumulation": 0}, "accumulation is too small"),
            ({"lr": 0.0}, "lr is out of range"),
            ({"lr": float("nan")}, "lr is out of range"),
            ({"softness_end": -1.0}, "end is out of range"),
        ],
    )
    def test_numbers(self, options: dict[str, Any], problem: str) -> None:
        original, converted = networks()
        with pytest.raises(ArgumentError, match=problem):
            gnswap.heal(converted, original, [photos()], **options)

    def test_networks_that_do_not_fit(self) -> None:
        original, converted = networks()
        half, frozen = copy.deepcopy(converted).half(), copy.deepcopy(converted).requires_grad_(False)
        shared = copy.deepcopy(original)
        twin = gnswap.apply(copy.copy(shared), gnswap.plan(shared))
        twin[0].weight = shared[0].weight
        for pair, problem in (
            ((original, original), "this model was not converted by gnswap"),
            ((converted, converted), "the original is converted too"),
            ((converted, nn.Linear(2, 2)), "the two networks are not the same architecture"),
            ((half, original), "half precision is too coarse"),
            ((frozen, original), "there is nothing to train"),
            ((twin, shared), "the two networks share tensors"),
        ):
            with pytest.raises(ArgumentError, match=problem):
                gnswap.heal(*pair, [photos()])

    def test_outputs_that_do_not_fit(self) -> None:
        original, converted = networks()
        converted[-1] = nn.Linear(24, 6)
        with pytest.raises(ArgumentError, match="the two networks' outputs do not correspond"):
            gnswap.heal(converted, original, [photos()])

    def test_layers_that_are_used_differently(self) -> None:
        original, converted = networks()
        converted[2] = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        with pytest.raises(ArgumentError, match="the two networks use a layer differently"):
            gnswap.heal(converted, original, [photos()])

    def test_photos(self) -> None:
        original, converted = networks()
        with pytest.raises(CalibrationError, match=f"too few photos to heal with .*{LEAST_PHOTOS} or more"):
            gnswap.heal(converted, original, [photos(LEAST_PHOTOS - 1)])
        with pytest.raises(CalibrationError, match="photos of different shapes"):
            gnswap.heal(converted, original, [photos(8), photos(8)[..., :6]])
        with pytest.raises(CalibrationError, match="there are no photos"):
            gnswap.heal(converted, original, [])


SCRIPT = """
import os, sys, torch, gnswap
from tests.test_heal import networks, photos, QUICK
torch.set_num_threads(1)
rank = os.environ["RANK"]
original, converted = networks()
try:
    gnswap.heal(converted, original, [photos(seed=int(rank))], **QUICK)
except gnswap.ArgumentError as error:
    print(error)
report = gnswap.heal(converted.double(), original.double(), [photos()], checkpoint=sys.argv[1], **QUICK)
torch.save([dict(converted.state_dict()), report.to_dict()], sys.argv[1] + rank)
"""


class TestSeveralProcesses:
    def test_two_do_what_one_does_in_two_parts(self, tmp_path: Path) -> None:
        """Started as accelerate and torchrun start them: with variables of the environment, on the CPU over gloo."""
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
        common |= {"PYTHONPATH": str(Path(__file__).parent.parent), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(tmp_path / "state")],
                env={**common, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in "01"
        ]
        original, converted = networks()
        original, converted = original.double(), converted.double()
        report = gnswap.heal(converted, original, [photos()], accumulation=2, **QUICK)
        for rank, process in enumerate(started):
            output = process.communicate(timeout=240)[0]
            assert process.returncode == 0, output
            assert "the processes do not do the same" in output, "each had photos of its own at first"
            state, theirs = torch.load(tmp_path / f"state{rank}", weights_only=True)
            for name, tensor in converted.state_dict().items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-9, atol=1e-9)
            assert theirs["best_step"] == report.best_step > 0
        assert (tmp_path / "state" / "healing.json").is_file()

    def test_without_accelerate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setitem(sys.modules, "accelerate.state", None)
        original, converted = networks()
        with pytest.raises(gnswap.MissingDependencyError, match=r"several processes need accelerate.*gnswap\[train\]"):
            gnswap.heal(converted, original, [photos()])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _layers(model: nn.Module) -> list[FusedGroupNorm]:
    return [layer for layer in model.modules() if isinstance(layer, FusedGroupNorm)]


def _with(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy with other weights."""
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    return model


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let healing be interrupted like by Ctrl-C before its next step, once it has done that many."""
    one_step = _healer.Healer._one_step

    def interrupted(self: _healer.Healer) -> float:
        if self.step >= steps:
            raise KeyboardInterrupt
        return one_step(self)

    monkeypatch.setattr(_healer.Healer, "_one_step", interrupted)


def _timeless(look: gnswap._healing.Look) -> tuple[int, float | None, float, float | None]:
    return look.step, look.loss, look.distance, look.agreement


def _copy(folder: Path, target: Path) -> None:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_healing_alone_says_so() -> None:
    """What is asked of photos for refitting is not asked where nothing is refitted."""
    original, _ = networks()
    conversion = gnswap.convert(original, softness=0)
    with pytest.raises(CalibrationError, match="too few photos to heal with"):
        taught(conversion, original, [photos(5)], refitting=False, steps=4)
