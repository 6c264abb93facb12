"""The command line: what it prints and where, its exit codes, and what its arguments stand for."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import gnswap
from gnswap import _cli_models
from gnswap._cli import app
from gnswap._healer import Healer
from tests._models import randomise_norms, same_state

VERBS = ("inspect", "explain", "convert", "export", "validate", "bench", "demo", "doctor")

# A user's own module, in the directory where the command is run.
NETS = '''
import torch
from torch import nn

class Net(nn.Sequential):
    """Says how its inputs look, as timm's networks do."""

    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}

def small():
    torch.manual_seed(0)
    return Net(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
               nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

def silent():
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))

def without_norms():
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())

def lazy():
    return nn.Sequential(nn.LazyBatchNorm2d())

def nothing():
    return {"a": 1}

class Zoo:
    small = staticmethod(small)

def broken():
    raise RuntimeError("the user's own bug")

ready = small()
number = 3
'''

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in a fresh directory with `nets.py` in it."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "nets", raising=False)

    def invoke(*arguments: str) -> Result:
        # an exception that gets through is a bug, unless it is the user's own
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False)

    return invoke


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.effect_noise((20, 24), 40 + 10 * number).convert("RGB").save(folder / f"{number}.png")
    return tmp_path / "photos"


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


# --- help, version, usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_examples(verb: str, run: Run) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"gnswap {verb}" in result.stdout
    assert "--json" in result.stdout


def test_help_lists_the_verbs_and_exit_codes(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in VERBS)
    assert "parity failed" in " ".join(result.stdout.replace("│", " ").split())


def test_version(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"gnswap {gnswap.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "nets:small"), "--output"),
        (("convert", "resnet10t", "-o", "x", "--pretrained", "--weights", "w"), "not both"),
        (("convert", "nets:small", "-o", "x", "--groups", "many"), "neither auto nor a whole number"),
        (("convert", "nets:small", "-o", "x", "--groups", "2.5"), "neither auto nor a whole number"),
        (("convert", "nets:small", "-o", "x", "--softness", "soft"), "neither auto nor a number"),
        (("convert", "nets:small", "-o", "x", "--order", "random"), "random"),
        (("convert", "nets:small", "-o", "x", "--limit", "3"), "--calib"),
        (("convert", "nets:small", "-o", "x", "--heal", "3"), "--calib"),
        (("convert", "nets:small", "-o", "x", "--group-size", "0"), "--group-size"),
        (("explain", "resnet10t", "--pretrained", "--weights", "w"), "not both"),
        (("explain", "nets:small", "--groups", "0"), "--groups"),
        (("validate", "a.onnx", "b", "--provider", "tpu"), "tpu"),
        (("inspct", "nets:small"), "inspct"),
        (("inspect",), "MODEL"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str, run: Run) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in said(result)
    assert not result.stdout


# --- inspect ---------------------------------------------------------------------------------------------------


def test_inspect_prints_a_table(run: Run) -> None:
    result = run("inspect", "nets:small")
    assert result.exit_code == 0, result.stderr
    assert "BatchNorm2d" in result.stdout
    assert "1 can be swapped" in result.stdout
    assert result.stderr == "building nets:small ...\n"


def test_inspect_prints_one_json_document(run: Run) -> None:
    result = run("inspect", "nets:small", "--json")
    assert gnswap.Inventory.from_json(result.stdout).sites[0].num_channels == 16


def test_inspect_a_timm_model(run: Run) -> None:
    result = run("inspect", "test_resnet", "--json")
    assert result.exit_code == 0, result.stderr
    assert gnswap.Inventory.from_json(result.stdout) == gnswap.inspect(timm.create_model("test_resnet"))


@pytest.mark.parametrize(("model", "word"), [("nets:without_norms", "no BatchNorm"), ("nets:lazy", "not initialised")])
def test_inspect_with_nothing_to_swap(model: str, word: str, run: Run) -> None:
    result = run("inspect", model)
    assert result.exit_code == 3
    assert word in result.stdout


# --- explain ---------------------------------------------------------------------------------------------------


def test_explain_ranks_the_layers(run: Run) -> None:
    result = run("explain", "test_resnet")
    assert result.exit_code == 0, result.stderr
    assert "gamma, beta into GroupNorm(32): worst layers" in result.stdout
    assert "of a fresh network" in result.stdout
    assert "the weights are random" in said(result)


def test_explain_one_layer_as_json_with_a_figure(run: Run, tmp_path: Path) -> None:
    result = run("explain", "nets:small", "1", "--groups", "4", "--figure", "layer.png", "--json")
    assert result.exit_code == 0, result.stderr
    (layer,) = gnswap.Explanation.from_json(result.stdout).layers
    assert (layer.name, layer.num_groups) == ("1", 4)
    assert (tmp_path / "layer.png").stat().st_size > 1000
    detail = run("explain", "nets:small", "1", "--groups", "4")
    assert "3: channels 12 to 15" in detail.stdout
    assert "gnswap: standardised, 1 group of 16, softness 1" in detail.stdout
    assert "0: channel 0" in run("explain", "nets:small", "1").stdout


def test_explain_of_dead_groups(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dead.py").write_text(NETS.replace("nn.ReLU(),", "nn.ReLU(), nn.BatchNorm2d(16),"))
    state = run("explain", "dead:small", "--json")
    assert state.exit_code == 0
    network = _cli_models.build_model("dead:small")
    network[1].running_var.zero_()
    torch.save(network.state_dict(), tmp_path / "dead.pth")
    assert run("explain", "dead:small", "--weights", "dead.pth").exit_code == 0
    assert "none alive" in run("explain", "dead:small", "1", "--weights", "dead.pth").stdout


def test_explain_a_saved_conversion_with_its_own_plan(run: Run, photos: Path) -> None:
    assert run("convert", "nets:small", "-o", "saved", "--group-size", "8").exit_code == 0
    (photos / "broken.png").write_bytes(b"no picture")
    refused = run("explain", "saved")
    assert refused.exit_code == 1
    assert "Say that it is fine: --model nets:small" in said(refused)
    result = run("explain", "saved", "--model", "nets:small", "--calib", str(photos), "--json")
    assert result.exit_code == 0, result.stderr
    explanation = gnswap.Explanation.from_json(result.stdout)
    assert explanation.samples == 3
    assert "skipped: " in said(result)
    assert explanation.layers[0].remedy == "standardised, 2 groups of 8, softness 1"
    assert "On 3 photos" in run("explain", "saved", "--model", "nets:small", "--calib", str(photos)).stdout
    assert run("explain", "saved", "--pretrained").exit_code == 2
    stray = run("explain", "nets:small", "--model", "nets:small")
    assert stray.exit_code == 1
    assert "--model is for a saved conversion" in said(stray)


def test_explain_without_norms(run: Run) -> None:
    assert run("explain", "nets:without_norms").exit_code == 3


# --- what MODEL stands for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nets:small", "nets:Zoo.small", "nets:ready"])
def test_factories(name: str, run: Run) -> None:
    assert run("inspect", name).exit_code == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet_50", "timm has no model of this name (at resnet_50). Did you mean resnet50"),
        ("zzzzzzz", "timm has no model of this name (at zzzzzzz). timm.list_models()"),
        ("nowhere.at_all:f", "there is no such module (at nowhere.at_all:f)"),
        ("nets.deeper:f", "there is no such module"),
        ("nets:smal", "there is no 'smal' in nets (at nets:smal). Did you mean small"),
        ("nets:qqq", "there is no 'qqq' in nets"),
        ("nets:nothing", "returned no network (at nets:nothing): expected a torch.nn.Module, found dict"),
        ("nets:number", "returned no network (at nets:number): expected a torch.nn.Module, found int"),
    ],
)
def test_models_that_are_not_there(name: str, message: str, run: Run) -> None:
    result = run("inspect", name)
    assert result.exit_code == 1
    assert message in said(result)
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_the_users_own_errors_show_as_they_are(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the user's own bug"):
        run("inspect", "nets:broken")
    (tmp_path / "needs.py").write_text("import not_installed_at_all")
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        run("inspect", "needs:f")


def test_pretrained_weights_that_cannot_be_fetched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, pretrained: bool) -> nn.Module:
        raise ConnectionError(f"no route to the hub for {name}, {pretrained}")

    monkeypatch.setattr(timm, "create_model", create)
    result = run("convert", "resnet10t", "--pretrained", "-o", "out")
    assert result.exit_code == 1
    assert "pretrained weights could not be had (at resnet10t): found ConnectionError" in said(result)


def test_pretrained_is_not_for_factories(run: Run) -> None:
    result = run("convert", "nets:small", "--pretrained", "-o", "out")
    assert result.exit_code == 1
    assert "--pretrained is for timm models" in said(result)


# --- convert ---------------------------------------------------------------------------------------------------


def test_convert_prints_decisions_and_saves(run: Run) -> None:
    result = run("convert", "nets:small", "-o", "out", "--groups", "2", "--softness", "0.5")
    assert result.exit_code == 0, result.stderr
    assert "swap" in result.stdout
    assert "1 of 1 norm layers swapped" in result.stdout
    reason = gnswap.plan(_cli_models.build_model("nets:small"), groups=2, softness=0.5).decisions[0].reason
    assert f"why 1  {reason} (1x)" in result.stdout
    assert "Saved to out" in result.stdout
    loaded = gnswap.load("out", _cli_models.build_model("nets:small"))
    assert (loaded[1].num_groups, loaded[1].softness) == (2, 0.5)


def test_convert_prints_one_json_document(run: Run, photos: Path) -> None:
    arguments = ("--group-size", "8", "--max-softness", "0.25", "--order", "natural", "--calib", str(photos))
    result = run("convert", "nets:small", "-o", "out", *arguments, "--limit", "2", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    plan = gnswap.Plan.from_dict(data["plan"])
    assert (plan.decisions[0].group_size, plan.decisions[0].softness) == (8, 0.25)
    assert data["report"]["fidelity"]["photos"] == 2
    assert (data["model"], data["directory"]) == ("nets:small", "out")
    assert data["source"] == {"kind": "factory", "name": "nets:small", "options": {}}


def test_convert_writes_a_report(run: Run, photos: Path, tmp_path: Path) -> None:
    result = run("convert", "nets:small", "-o", "out", "--groups", "4", "--calib", str(photos))
    assert result.exit_code == 0, result.stderr
    assert f"what was kept: {Path('out') / 'report.html'}" in result.stdout
    report = gnswap.FidelityReport.from_json((tmp_path / "out" / "report.json").read_text())
    assert (report.photos, report.held_out, report.swapped) == (3, False, 1)
    assert report.command == f"gnswap convert nets:small -o out --groups 4 --calib {photos}"
    assert {photo.name for photo in report.worst} == {"0.png", "1.png", "2.png"}
    assert all(photo.thumbnail for photo in report.worst)
    assert run("convert", "nets:small", "-o", "out").exit_code == 0  # a report is no foreign file
    assert gnswap.FidelityReport.from_json((tmp_path / "out" / "report.json").read_text()).photos == 0


def test_healing_goes_on_after_a_kill(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3, 9):
        Image.effect_noise((20, 24), 40 + 10 * number).convert("RGB").save(photos / f"{number}.png")
    arguments = ("convert", "nets:small", "--softness", "0", "--calib", str(photos), "--heal", "5", "-o")
    assert run(*arguments, "whole").exit_code == 0
    whole_step, taken = Healer._one_step, []

    def step(healer: Healer) -> float:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(healer.step)
        return whole_step(healer)

    monkeypatch.setattr(Healer, "_one_step", step)
    assert run(*arguments, "halved").exit_code == 130
    (left,) = tmp_path.glob(".halved.*.healing")
    assert not (tmp_path / "halved").exists()
    taken.clear()
    assert run(*arguments, "halved").exit_code == 0
    assert taken == [3, 4]
    assert not left.exists()
    network = _cli_models.build_model("nets:small")
    whole, halved = (gnswap.load(name, network).state_dict() for name in ("whole", "halved"))
    assert all(torch.equal(halved[name], tensor) for name, tensor in whole.items())


def test_convert_heals(run: Run, photos: Path) -> None:
    for number in range(3, 9):
        Image.effect_noise((20, 24), 40 + 10 * number).convert("RGB").save(photos / f"{number}.png")
    arguments = ("convert", "nets:small", "--softness", "0", "--calib", str(photos), "--heal", "4", "--json")
    result = run(*arguments, "-o", "healed")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    healing = gnswap.HealReport.from_dict(report["healing"])
    assert (healing.photos, healing.held_out, healing.steps) == (7, 2, 4)
    assert healing.verdict in report["notes"]
    assert "healing, 4 steps" in said(result)
    assert run(*arguments[:-3], "-o", "unhealed").exit_code == 0
    network = _cli_models.build_model("nets:small")
    states = [gnswap.load(name, network).state_dict() for name in ("healed", "unhealed")]
    assert healing.healed == any(not torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    as_text = run(*arguments[:-1], "-o", "healed")
    assert f"Healing: {healing.verdict}." in as_text.stdout


def test_convert_refits(run: Run, photos: Path) -> None:
    for number in range(3, 12):
        Image.effect_noise((20, 24), 40 + 10 * number).convert("RGB").save(photos / f"{number}.png")
    arguments = ("convert", "nets:small", "--softness", "0", "--calib", str(photos), "--refit")
    result = run(*arguments, "--json", "-o", "refitted")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)["report"]
    refitting = gnswap.RefitReport.from_dict(report["refitting"])
    assert (refitting.photos, refitting.held_out) == (12, 3)
    assert refitting.verdict in report["notes"]
    assert " refitting ..." in said(result)
    assert f"Refit: {refitting.verdict}." in " ".join(run(*arguments, "-o", "refitted").stdout.split())
    assert "--refit fits to the photos of --calib" in said(run("convert", "nets:small", "-o", "out", "--refit"))


def test_convert_prints_the_fidelity(run: Run, photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    result = run("convert", "nets:small", "-o", "out", "--calib", str(photos))
    assert result.exit_code == 0, result.stderr
    for expected in ("on 3 photos", "same top-1 answer", "KL(original, converted)", "furthest off", "relative error"):
        assert expected in result.stdout
    assert "skipped: the picture cannot be read" in said(result)


def test_convert_for_a_target(run: Run, photos: Path) -> None:
    result = run("convert", "nets:small", "-o", "out", "--calib", str(photos), "--fidelity", "0.5", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["plan"]["options"]["fidelity"] == 0.5
    alone = run("convert", "nets:small", "-o", "out", "--fidelity", "0.5")
    assert alone.exit_code == 2
    assert "--fidelity is judged on the photos of --calib" in said(alone)


def test_convert_absorbs(run: Run) -> None:
    result = run("convert", "test_resnet", "-o", "out", "--absorb", "--json")
    assert result.exit_code == 0, result.stderr
    decisions = json.loads(result.stdout)["plan"]["decisions"]
    assert any(decision["absorbs"] for decision in decisions)
    norms = [m for m in gnswap.load("out").modules() if isinstance(m, gnswap.FusedGroupNorm)]
    assert any(norm.act is not None for norm in norms)


def test_convert_a_timm_model_that_is_loaded_by_its_name(run: Run) -> None:
    result = run("convert", "test_resnet", "-o", "out", "--include", "layer1.*", "--exclude", "*bn2")
    assert result.exit_code == 0, result.stderr
    assert "the weights are random" in said(result)
    names = [name for name, m in gnswap.load("out").named_modules() if isinstance(m, gnswap.FusedGroupNorm)]
    assert names
    assert all(name.startswith("layer1.") and not name.endswith("bn2") for name in names)


def test_convert_says_warnings_once(run: Run) -> None:
    result = run("convert", "nets:small", "-o", "out", "--groups", "7")
    assert result.exit_code == 0, result.stderr
    assert said(result).count("another number of groups") == 1
    assert "note: 1 layer" in said(result)


def test_convert_with_nothing_to_swap(run: Run, tmp_path: Path) -> None:
    result = run("convert", "nets:without_norms", "-o", "out", "--json")
    assert result.exit_code == 3
    assert "nothing" in said(result)
    assert not result.stdout
    assert not (tmp_path / "out").exists()


def test_convert_refuses_a_directory_of_others_before_any_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    result = run("convert", "nets:broken", "-o", "out")
    assert result.exit_code == 1
    assert "refusing to overwrite" in said(result)
    assert "thesis.tex" in said(result)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_convert_with_a_glob_that_fits_nothing(run: Run) -> None:
    result = run("convert", "nets:small", "-o", "out", "--include", "layer9.*")
    assert result.exit_code == 1
    assert "layer9.*" in said(result)


def test_a_directory_that_cannot_be_made_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = run("convert", "nets:small", "-o", "nets.py/deep/out")
    assert result.exit_code == 1
    assert re.match(r"error: the directory cannot be made \(at .*/nets.py/deep/out\): expected a folder", said(result))
    assert sorted(tmp_path.iterdir()) == before


def test_photos_for_a_network_that_does_not_say_how_it_wants_them(run: Run, photos: Path) -> None:
    result = run("convert", "nets:silent", "-o", "out", "--calib", str(photos))
    assert result.exit_code == 1
    assert "or set it as the network's attribute pretrained_cfg where it is built" in said(result)


@pytest.mark.parametrize("content", [None, "empty"])
def test_convert_without_photos(content: str | None, run: Run, tmp_path: Path) -> None:
    if content:
        (tmp_path / "pictures").mkdir()
    result = run("convert", "nets:small", "-o", "out", "--calib", "pictures")
    assert result.exit_code == 1
    assert ("holds no pictures" if content else "no such folder") in said(result)
    assert not (tmp_path / "out").exists()


# --- --weights -------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(run: Run) -> nn.Module:
    assert run  # it stands in the directory that `nets` is imported from
    return randomise_norms(_cli_models.build_model("nets:small"), seed=3)


def reverted() -> nn.Module:
    return gnswap.revert(gnswap.load("out", _cli_models.build_model("nets:small")))


def test_weights_from_safetensors(run: Run, trained: nn.Module) -> None:
    save_file(trained.state_dict(), "w.safetensors")
    result = run("convert", "nets:small", "-o", "out", "--weights", "w.safetensors")
    assert result.exit_code == 0, result.stderr
    assert same_state(reverted(), trained)


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (lambda state: state, ()),
        (lambda state: {"state_dict": state, "epoch": 3}, ("from under 'state_dict'",)),
        (lambda state: {"model": {f"module.{k}": v for k, v in state.items()}}, ("under 'model'", "prefix 'module.'")),
        (lambda state: {k: v for k, v in state.items() if "num_batches" not in k}, ()),
    ],
)
def test_weights_from_checkpoints(wrap: Any, notes: tuple[str, ...], run: Run, trained: nn.Module) -> None:
    torch.save(wrap(dict(trained.state_dict())), "w.pth")
    result = run("convert", "nets:small", "-o", "out", "--weights", "w.pth")
    assert result.exit_code == 0, result.stderr
    assert all(note in said(result) for note in notes)
    assert same_state(reverted(), trained)


class Evil:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def test_weights_that_would_run_code(run: Run, tmp_path: Path) -> None:
    torch.save({"state_dict": Evil()}, "w.pth")
    result = run("convert", "nets:small", "-o", "out", "--weights", "w.pth")
    assert result.exit_code == 1
    assert "refusing to unpickle this file (at w.pth)" in said(result)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Evil()))
    assert run("convert", "nets:small", "-o", "out", "--weights", "w.pkl").exit_code == 1
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


def test_a_whole_pickled_model(run: Run) -> None:
    torch.save(nn.Linear(2, 2), "w.pth")
    result = run("convert", "nets:small", "-o", "out", "--weights", "w.pth")
    assert result.exit_code == 1
    assert "names and tensors only, found Unsupported global: GLOBAL torch" in said(result)
    assert "weights_only" not in said(result), "torch's advice to turn the protection off"
    assert "save model.state_dict() alone" in said(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), "0.weight is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "extra is not in the model"),
        (lambda s: s.update({"5.bias": torch.ones(7)}), "5.bias is (7,), not (5,)"),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str, run: Run, trained: nn.Module) -> None:
    state = dict(trained.state_dict())
    change(state)
    torch.save(state, "w.pth")
    result = run("convert", "nets:small", "-o", "out", "--weights", "w.pth")
    assert result.exit_code == 1
    assert "the weights do not fit the model" in said(result)
    assert message in said(result)


def test_weights_that_diverged(run: Run, trained: nn.Module) -> None:
    state = dict(trained.state_dict())
    state["5.bias"] = torch.full((5,), float("nan"))
    torch.save(state, "w.pth")
    result = run("convert", "nets:small", "-o", "out", "--weights", "w.pth")
    assert result.exit_code == 1
    assert "error: the weights are not finite (at nets:small)" in said(result)
    assert "found NaN or infinity in 5.bias. Take a checkpoint from before the training diverged." in said(result)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", None, "there is no such weights file"),
        ("w.pth", b"hello", "the weights cannot be read"),
        ("w.pth", b"\x80\x02garbage", "refusing to unpickle"),
        ("w.pth", b"", "the weights cannot be read"),
        ("w.safetensors", b"hello", "the weights cannot be read"),
    ],
)
def test_weights_that_are_no_weights(name: str, content: bytes | None, message: str, run: Run, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run("convert", "nets:small", "-o", "out", "--weights", name)
    assert result.exit_code == 1
    assert message in said(result)


def test_a_file_without_a_state_dict(run: Run) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, "w.pth")
    result = run("convert", "nets:small", "-o", "out", "--weights", "w.pth")
    assert result.exit_code == 1
    assert "no state dict in this file (at w.pth)" in said(result)
    assert "dict with epoch, lr" in said(result)


# --- export and validate ---------------------------------------------------------------------------------------


def test_from_conversion_to_parity(run: Run, photos: Path) -> None:
    """convert, export, validate; then a file that differs."""
    assert run("convert", "nets:small", "-o", "out", "--groups", "2").exit_code == 0
    result = run("export", "out", "-o", "out.onnx")
    assert result.exit_code == 1
    assert "code that a file names is not run by itself" in said(result)
    assert "--model nets:small" in said(result)

    result = run("export", "out", "-o", "out.onnx", "--model", "nets:small", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["dynamic_axes"][0] == "batch"

    validate = ("validate", "out.onnx", "out", "--provider", "cpu", "--model", "nets:small")
    (photos / "broken.png").write_bytes(b"no picture")
    result = run(*validate, "--images", str(photos), "--json")
    assert "skipped: the picture cannot be read: " in said(result)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["passed"] is True
    (photos / "broken.png").unlink()
    result = run(*validate)
    assert result.exit_code == 0, result.stderr
    assert "torch's own" in result.stdout
    assert "all on CPUExecutionProvider" in result.stdout
    result = run(*validate, "--images", str(photos), "--limit", "2", "--layers", "--original")
    assert result.exit_code == 0, result.stderr
    assert "2x3x16x16" in result.stdout
    assert "1 of 1 norms" in result.stdout
    assert "Every norm that was compared is within its bound" in result.stdout
    result = run(*validate, "--images", str(photos), "--limit", "5", "--batch", "3", "--json")
    assert {row["input_shapes"][0] for row in json.loads(result.stdout)["outputs"] if row["inputs"] == "given"} == {
        "3x3x16x16"
    }
    assert run(*validate, "--tolerance", "1e-12").exit_code == 4

    bench = ("bench", "out.onnx", "out", "--provider", "cpu", "--model", "nets:small", "--seconds", "0.1")
    result = run(*bench, "--threads", "1", "--figure", "speed.png")
    assert result.exit_code == 0, result.stderr
    for expected in ("original, BatchNorm folded", "GroupNorm as torch exports it", "normalisation", "1.00x"):
        assert expected in result.stdout
    assert Path("speed.png").stat().st_size

    assert run("convert", "nets:small", "-o", "out", "--groups", "1", "--softness", "0").exit_code == 0
    result = run(*validate, "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["passed"] is False
    assert "parity failed" in said(result)
    result = run(*validate, "--layers")
    assert result.exit_code == 4
    assert "The first norm that departs: 1, by" in " ".join(result.stdout.split())

    if not torch.cuda.is_available():
        result = run("validate", "out.onnx", "out", "--model", "nets:small")
        assert result.exit_code == 1
        assert "error:" in said(result)
        assert "CUDA" in said(result)


def test_export_for_a_target_in_half_precision(run: Run) -> None:
    assert run("convert", "nets:small", "-o", "out").exit_code == 0
    arguments = ("export", "out", "-o", "o.onnx", "--model", "nets:small")
    result = run(*arguments, "--target", "cpu", "--dtype", "fp16", "--autotune", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["target"], report["inputs"][0]["dtype"]) == ("cpu", "FLOAT16")
    assert "by table" in report["timings"]
    assert "the fastest of" in report["norms"][0]["reason"]
    assert run(*arguments, "--target", "gpu").exit_code == 2
    result = run(*arguments, "--autotune")
    assert result.exit_code == 1
    assert "nothing to time for every runtime" in said(result)


def test_export_for_one_batch_size(run: Run) -> None:
    assert run("convert", "nets:small", "-o", "out").exit_code == 0
    arguments = ("out", "--model", "nets:small")
    result = run("export", *arguments, "-o", "o.onnx", "--fixed-batch", "3", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["dynamic_axes"] == []
    assert report["inputs"][0]["shape"][0] == "3"
    validated = run("validate", "o.onnx", *arguments, "--provider", "cpu", "--batch", "3")
    assert validated.exit_code == 0, said(validated)
    assert run("export", *arguments, "-o", "o.onnx", "--fixed-batch", "0").exit_code == 2


def test_export_for_one_size_and_an_opset(run: Run) -> None:
    assert run("convert", "nets:small", "-o", "out").exit_code == 0
    arguments = ("export", "out", "-o", "o.onnx", "--model", "nets:small", "--fixed-size")
    result = run(*arguments, "--opset", "21", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["dynamic_axes"], report["opset"]) == (["batch"], 21)
    result = run(*arguments, "--opset", "17")
    assert result.exit_code == 1
    assert "18 to 24" in said(result)


def test_export_for_one_thread(run: Run) -> None:
    assert run("convert", "nets:small", "-o", "out", "--groups", "2").exit_code == 0
    forms = []
    for threads in ("1", "2"):
        result = run(
            "export", "out", "-o", "o.onnx", "--model", "nets:small", "--target", "cpu", "--threads", threads, "--json"
        )
        assert result.exit_code == 0, result.stderr
        forms.append({norm["lowering"] for norm in json.loads(result.stdout)["norms"]})
    assert forms[0] == {"instance_norm_conv"}
    assert "layer_norm_conv" in forms[1]


def test_networks_that_do_not_say_what_they_take(run: Run) -> None:
    assert run("convert", "nets:silent", "-o", "out").exit_code == 0
    arguments = ("export", "out", "-o", "o.onnx", "--model", "nets:silent")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "Give --input, as 3x224x224" in said(result)
    result = run(*arguments, "--input", "3x0x5")
    assert result.exit_code == 2
    assert "'3x0x5' is no shape" in said(result)


def test_export_of_nothing(run: Run) -> None:
    result = run("export", "nowhere", "-o", "o.onnx")
    assert result.exit_code == 1
    assert "no saved conversion here (at nowhere)" in said(result)


def test_export_with_another_model(run: Run) -> None:
    assert run("convert", "nets:small", "-o", "out").exit_code == 0
    result = run("export", "out", "-o", "o.onnx", "--model", "nets:silent")
    assert result.exit_code == 1
    assert "of another architecture" in said(result)


# --- as a process ----------------------------------------------------------------------------------------------


def process(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    root = str(Path(gnswap.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    (cwd / "nets.py").write_text(NETS)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_python_dash_m(tmp_path: Path) -> None:
    running = process("-m", "gnswap", "inspect", "nets:small", "--json", cwd=tmp_path)
    stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 0, stderr
    assert json.loads(stdout)["sites"][0]["paths"] == ["1"]
    assert stderr == "building nets:small ...\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_saving(number: signal.Signals, tmp_path: Path) -> None:
    """What was there stays, and nothing is left lying about."""
    script = (
        "import os, signal, sys, time\n"
        "from gnswap import _cli, _weights\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "def slow(*args):\n"
        "    open('writing', 'w').close()\n"
        "    time.sleep(60)\n"
        "_weights.write = slow\n"
        "sys.argv = ['gnswap', 'convert', 'nets:small', '-o', 'out']\n"
        "_cli.main()\n"
    )
    running = process("-c", script, cwd=tmp_path)
    while not (tmp_path / "writing").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=30)
    assert running.returncode == (130 if number == signal.SIGINT else 143), stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["nets.py", "writing"]
