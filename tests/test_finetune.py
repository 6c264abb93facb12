"""Fine-tuning: it learns, resumes exactly, keeps a network that can be used, and says what it cannot do."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import gnswap
from gnswap import ArgumentError, FinetuneError, FusedGroupNorm, StoreError, _finetuned, _finetuner
from gnswap._cli import app
from gnswap._head import new_head
from gnswap._param_groups import freeze
from gnswap._photos import PhotoBatches
from tests._models import randomise_norms, same_state, small_cnn

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 2, "config": CONFIG}


def pictures(root: Path, count: int = 10, classes: tuple[str, ...] = ("across", "down"), size: int = 20) -> Path:
    """Stripes with noise, across or down: what no mean colour tells apart."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            stripes = 90 * (np.arange(size) // 2 % 2)[:, None] * np.ones((1, size))
            stripes = stripes if number % 2 == 0 else stripes.T
            noise = generator.uniform(0, 120, (size, size, 3))
            Image.fromarray((stripes[..., None] + noise).astype(np.uint8)).save(root / name / f"{index}.png")
    return root


def original(classes: int = 5) -> nn.Sequential:
    """A network with dropout, for 16 pixels."""
    torch.manual_seed(0)
    parts = list(small_cnn())
    parts[-1:] = [nn.Dropout(0.2), nn.Linear(24, classes)]
    return randomise_norms(nn.Sequential(*parts)).eval()


def network() -> nn.Module:
    return gnswap.convert(original(), groups=4, softness=1.0).model


def tiny() -> nn.Module:
    """A network of timm's, which knows its layers and how its pictures are prepared."""
    torch.manual_seed(0)
    return gnswap.convert(randomise_norms(timm.create_model("test_resnet")).eval(), softness=1.0).model


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures: drawing one takes longer than training these networks."""
    monkeypatch.setattr(_finetuned, "can_draw", lambda: False)


def layers(model: nn.Module) -> list[FusedGroupNorm]:
    return [layer for layer in model.modules() if isinstance(layer, FusedGroupNorm)]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let fine-tuning be interrupted like by Ctrl-C before its next step, once it has done that many."""
    one_step = _finetuner.Finetuner._one_step

    def interrupted(self: _finetuner.Finetuner, batches: Any) -> bool:
        if self.step >= steps:
            raise KeyboardInterrupt
        return one_step(self, batches)

    monkeypatch.setattr(_finetuner.Finetuner, "_one_step", interrupted)


class TestResume:
    @pytest.mark.parametrize(
        "options",
        [{}, {"softness_end": 0.0, "ema": 0.9, "accumulation": 2, "precision": "bf16"}],
        ids=["plain", "everything"],
    )
    @pytest.mark.parametrize("killed_after", [3, 13])
    def test_it_ends_with_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, options: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(_finetuner, "_SAVE_SECONDS", 0.0)  # after every step
        data = pictures(tmp_path / "data")
        whole = network()
        killed = copy.deepcopy(whole)
        report = gnswap.finetune(whole, data, tmp_path / "whole", **QUICK, **options)
        again = copy.deepcopy(killed)
        with monkeypatch.context() as patch:
            interrupt_after(patch, min(killed_after, report.steps - 1))
            with pytest.raises(KeyboardInterrupt):
                gnswap.finetune(killed, data, tmp_path / "killed", **QUICK, **options)
        assert not json.loads((tmp_path / "killed" / "finetune.json").read_text())["report"]["done"]
        resumed = gnswap.finetune(again, data, tmp_path / "killed", **QUICK, **options)
        assert same_state(again, whole)
        for part in ("", "last"):
            one, two = (gnswap.load(tmp_path / name / part, original(2)) for name in ("whole", "killed"))
            assert same_state(one, two)
            assert [layer.softness for layer in layers(one)] == [layer.softness for layer in layers(two)]
        assert resumed.curve == report.curve
        assert [look.loss for look in resumed.judgements] == [look.loss for look in report.judgements]

    def test_a_second_look_at_what_is_done_trains_nothing(self, tmp_path: Path) -> None:
        data, one, other = pictures(tmp_path / "data"), network(), network()
        report = gnswap.finetune(one, data, tmp_path / "out", **QUICK)
        before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
        assert gnswap.finetune(other, data, tmp_path / "out", **QUICK) == report
        assert same_state(one, other)
        assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before

    def test_another_job_and_other_files_are_refused(self, tmp_path: Path) -> None:
        data = pictures(tmp_path / "data")
        gnswap.finetune(network(), data, tmp_path / "out", **{**QUICK, "epochs": 0.1})
        with pytest.raises(
            FinetuneError, match=r"the directory holds another fine-tuning .*lr 0.0001.* there and 1.0 her"
        ):
            gnswap.finetune(network(), data, tmp_path / "out", lr=1.0, **{**QUICK, "epochs": 0.1})
        (tmp_path / "out" / "thesis.tex").write_text("precious")
        with pytest.raises(StoreError, match=r"refusing to overwrite .*thesis"):
            gnswap.finetune(network(), data, tmp_path / "out", **QUICK)
        gnswap.save(network(), tmp_path / "saved")
        with pytest.raises(StoreError, match=r"refusing to overwrite .*no fine-tuning"):
            gnswap.finetune(network(), data, tmp_path / "saved", **QUICK)

    def test_a_broken_state_is_refused(self, tmp_path: Path) -> None:
        data = pictures(tmp_path / "data")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "finetune.json").write_text('{"job": {')
        with pytest.raises(StoreError, match="the state of the fine-tuning cannot be read"):
            gnswap.finetune(network(), data, tmp_path / "out", **QUICK)


class TestLearns:
    def test_it_tells_stripes_apart_and_the_result_can_be_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()  # with the figure
        data, model = pictures(tmp_path / "data", 24), network()
        options = {**QUICK, "epochs": 6, "lr": 5e-3, "augment": "none"}
        report = gnswap.finetune(model, data, tmp_path / "out", softness_end=0.0, **options)
        assert report.best.accuracy >= 0.9
        assert report.before.accuracy < 0.8
        assert (report.photos, report.held_out, report.classes) == (38, 10, ("across", "down"))
        assert {layer.softness for layer in layers(model)} == {0.0}, "only a pure network can be the best"
        assert report.best.step >= report.of_steps // 2
        assert report.before.softness == 1.0
        saved = gnswap.load(tmp_path / "out", original(2))
        assert same_state(saved, model)
        x = torch.randn(3, 3, 16, 16)
        assert torch.equal(saved.eval()(x), model.eval()(x))
        lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "val"] == [look.step for look in report.judgements]
        assert lines[-1]["accuracy"] == report.last.accuracy
        assert (tmp_path / "out" / "metrics.png").read_bytes().startswith(b"\x89PNG")
        assert not (tmp_path / "out" / "training.safetensors").exists()
        assert json.loads((tmp_path / "out" / "finetune.json").read_text())["report"] == report.to_dict()

    def test_the_best_is_kept_and_not_the_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        accuracies = iter([2.0, 4.0, 3.0])
        monkeypatch.setattr(_finetuner.Finetuner, "_judge", lambda *_: (next(accuracies), 1.0))
        model = network()
        report = gnswap.finetune(model, pictures(tmp_path / "data"), tmp_path / "out", **QUICK)
        assert (report.best.step, report.last.step) == (8, 16)
        best, last = (gnswap.load(tmp_path / "out" / part, original(2)) for part in ("", "last"))
        assert same_state(best, model)
        assert not same_state(last, model)

    def test_a_network_of_timm(self, tmp_path: Path) -> None:
        """It knows its head, its layers and its pictures; it is found by its name when it is loaded."""
        model = tiny()
        options = {"epochs": 1, "batch_size": 4, "size": 32, "layer_decay": 0.7, "ema": 0.9, "distill": 1.0}
        report = gnswap.finetune(model, pictures(tmp_path / "data"), tmp_path / "out", **options)
        assert same_state(gnswap.load(tmp_path / "out"), model)
        assert model.num_classes == 2
        assert report.input["input_size"] == [3, 32, 32]
        with pytest.raises(gnswap.RevertError, match="the network has changed since its conversion"):
            gnswap.finetune(model, tmp_path / "data", tmp_path / "more", **options)

    def test_distillation_remembers(self, tmp_path: Path) -> None:
        """With the old head on the new features, its answers stay nearer to the original's, on the same pictures."""
        data, before = pictures(tmp_path / "data"), original()
        x = torch.cat(list(PhotoBatches(data, CONFIG)))
        distances = []
        for weight in (0.0, 10.0):
            options = {**QUICK, "epochs": 8, "lr": 1e-2, "augment": "none"}
            gnswap.finetune(network(), data, tmp_path / str(weight), distill=weight, **options)
            tuned = gnswap.load(tmp_path / str(weight) / "last", original(2)).eval()
            tuned[-1] = before[-1]
            with torch.no_grad():
                ours, theirs = tuned(x).log_softmax(1), before(x).log_softmax(1)
            distances.append(float((theirs.exp() * (theirs - ours)).sum(1).mean()))
        assert distances[1] < 0.7 * distances[0]

    def test_a_head_that_is_kept(self, tmp_path: Path) -> None:
        data = pictures(tmp_path / "data")
        model = gnswap.convert(original(2), groups=4).model
        head = model[-1].weight.clone()
        gnswap.finetune(model, data, tmp_path / "out", head="keep", freeze="4", **QUICK)
        assert not torch.equal(head, model[-1].weight)
        with pytest.raises(ArgumentError, match=r"does not give a number for each class .*\(4, 2\), found \(4, 5\)"):
            gnswap.finetune(network(), data, tmp_path / "five", head="keep", **QUICK)

    def test_norms_that_the_plan_kept_stay_as_they_are(self, tmp_path: Path) -> None:
        model = gnswap.convert(original(), groups=4, exclude="1").model
        statistics = model[1].running_mean.clone()
        report = gnswap.finetune(model, pictures(tmp_path / "data"), tmp_path / "out", **QUICK)
        assert torch.equal(gnswap.load(tmp_path / "out" / "last", original(2))[1].running_mean, statistics)
        assert "1 norms that the plan kept have their statistics frozen" in report.notes

    @pytest.mark.parametrize("terminal", [True, False])
    def test_progress_goes_to_a_terminal_only(
        self, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
        gnswap.finetune(network(), pictures(tmp_path / "data"), tmp_path / "out", **{**QUICK, "epochs": 0.5})
        out, err = capsys.readouterr()
        assert out == ""
        assert ("fine-tuning, epoch" in err) == terminal


class TestStops:
    def test_a_loss_that_is_not_finite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data, model = pictures(tmp_path / "data"), network()
        losses = _finetuner.Finetuner._losses

        def broken(self: _finetuner.Finetuner, x: Any, labels: Any) -> Any:
            return losses(self, x, labels) * (float("nan") if self.step == 11 else 1.0)

        monkeypatch.setattr(_finetuner.Finetuner, "_losses", broken)
        expected = r"the loss is no longer finite \(at step 12 of 16, pictures \w+/\d.png, \w+/\d.png\)"
        with pytest.raises(FinetuneError, match=expected) as caught:
            gnswap.finetune(model, data, tmp_path / "out", **QUICK)
        assert "keeps the last good state, of step 8, and the best network so far" in str(caught.value)
        assert same_state(gnswap.load(tmp_path / "out", original(2)), model)
        assert json.loads((tmp_path / "out" / "finetune.json").read_text())["report"]["steps"] == 8

    def test_a_gradient_that_is_not_finite(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gnswap._engine.Engine.grad_norm", lambda _self: float("inf"))
        with pytest.raises(FinetuneError, match="the gradient is no longer finite"):
            gnswap.finetune(network(), pictures(tmp_path / "data"), tmp_path / "out", **QUICK)

    def test_a_network_that_answers_nonsense(self, tmp_path: Path) -> None:
        model = network()
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        with pytest.raises(FinetuneError, match="the loss on the validation pictures is no longer finite"):
            gnswap.finetune(model, pictures(tmp_path / "data"), tmp_path / "out", **QUICK)


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"epochs": 0}, r"epochs is out of range .*above 0, finite, found 0"),
            ({"lr": float("nan")}, "lr is out of range"),
            ({"batch_size": 0}, "batch_size is out of range .*1 or more"),
            ({"weight_decay": -1}, "weight_decay is out of range"),
            ({"label_smoothing": 1.0}, "label_smoothing is out of range"),
            ({"layer_decay": 1.5}, "layer_decay is out of range"),
            ({"layer_decay": 0.5}, "the layers of this network cannot be told apart"),
            ({"ema": 1.0}, "ema is out of range"),
            ({"head": "none"}, "head is out of range .*new, keep"),
            ({"val": 1.5}, "val is no share"),
            ({"augment": "nonsense"}, "timm does not know this augmentation"),
            ({"freeze": "nowhere"}, "there is nothing of this name to freeze"),
            ({"precision": "fp16"}, "fp16 needs a GPU"),
            ({"config": None}, "it is not known how photos have to be prepared"),
        ],
        ids=str,
    )
    def test_options(self, tmp_path: Path, options: dict[str, Any], problem: str) -> None:
        if options.get("precision") == "fp16" and torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(gnswap.GnswapError, match=problem):
            gnswap.finetune(network(), pictures(tmp_path / "data"), tmp_path / "out", **{**QUICK, **options})
        assert not (tmp_path / "out").exists()

    def test_networks(self, tmp_path: Path) -> None:
        data = pictures(tmp_path / "data")
        with pytest.raises(ArgumentError, match="this model was not converted by gnswap"):
            gnswap.finetune(original(), data, tmp_path / "out", **QUICK)
        with pytest.raises(ArgumentError, match="half precision is too coarse to train in"):
            gnswap.finetune(network().half(), data, tmp_path / "out", **QUICK)
        headless = gnswap.convert(original()[:-1], groups=4).model
        with pytest.raises(ArgumentError, match="it is not known which layer of this network gives the classes"):
            gnswap.finetune(headless, data, tmp_path / "out", **QUICK)

    def test_heads_and_what_is_left_to_train(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 1))
        model.pretrained_cfg = {"classifier": "0"}
        with pytest.raises(ArgumentError, match=r"the head is of an unknown kind \(at 0\)"):
            new_head(model, 2, seed=0)
        with pytest.raises(ArgumentError, match=r"there is nothing to train .*freeze='0'"):
            freeze(model, "0", head="0")

    def test_an_average_of_sharded_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", True)
        with pytest.raises(ArgumentError, match="an average of sharded weights is not supported"):
            gnswap.finetune(network(), pictures(tmp_path / "data"), tmp_path / "out", ema=0.9, **QUICK)

    def test_ways_of_distributing_that_are_not_supported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("accelerate.Accelerator.distributed_type", "DistributedType.DEEPSPEED")
        with pytest.raises(ArgumentError, match=r"this way of distributing is not supported .*found DEEPSPEED"):
            gnswap.finetune(network(), pictures(tmp_path / "data"), tmp_path / "out", **QUICK)

    def test_without_accelerate(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "accelerate", None)
        with pytest.raises(gnswap.MissingDependencyError, match=r"fine-tuning needs accelerate.*gnswap\[train\]"):
            gnswap.finetune(network(), pictures(tmp_path / "data"), tmp_path / "out", **QUICK)

    def test_accelerate_in_another_precision(self, tmp_path: Path) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        Accelerator(cpu=True)
        try:
            with pytest.raises(ArgumentError, match=r"accelerate cannot do this here .*mixed_precision='bf16'"):
                gnswap.finetune(network(), pictures(tmp_path / "data"), tmp_path / "out", precision="bf16", **QUICK)
        finally:
            AcceleratorState._reset_state()


def test_the_command_line(tmp_path: Path) -> None:
    """Convert's directory in, a directory of the same kind out, the report on stdout."""
    data = str(pictures(tmp_path / "data"))
    gnswap.save(tiny(), tmp_path / "gn")
    command = ["finetune", str(tmp_path / "gn"), "--data", data, "-o", str(tmp_path / "out"), "--size", "32"]
    runner = CliRunner()
    done = runner.invoke(app, [*command, "--epochs", "1", "--batch-size", "4", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["done"], report["steps"], report["classes"]) == (True, 4, ["across", "down"])
    assert gnswap.load(tmp_path / "out").num_classes == 2
    shown = runner.invoke(app, [*command, "--epochs", "1", "--batch-size", "4"])
    assert "Fine-tuned: accuracy" in shown.stdout
    refused = runner.invoke(app, [*command, "--epochs", "2", "--val", "nowhere"])
    assert refused.exit_code == 1
    assert "there is no such data" in refused.stderr
