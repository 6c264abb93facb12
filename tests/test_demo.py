"""The demo on a small network; `.ci/run` runs it on the real one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import gnswap
from gnswap import _baselines, _demo, _samples
from gnswap._cli import app
from tests._models import build, randomise_norms, small_cnn

PARTS = {"swapped", "methods", "bit_equal_after_load", "reverts_exactly", "parity", "speed", "files", "seconds"}


def network() -> nn.Module:
    """In place of EfficientNet-Lite0: it exports in seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise_norms(timm.create_model("test_resnet", num_classes=5))
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    return model.eval()


def photos() -> list[_samples.SamplePhoto]:
    sizes = enumerate(((80, 90), (120, 70), (64, 64)))
    return [
        _samples.SamplePhoto(f"{n}.png", Image.effect_noise(size, 50 + n).convert("RGB"), [1, None, 3][n])
        for n, size in sizes
    ]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[_demo.DemoReport, Path, list[str]]:
    said: list[str] = []

    @contextlib.contextmanager
    def step(text: str) -> Iterator[None]:
        said.append(text)
        yield

    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_samples, "lite0", network)
        patch.setattr(_samples, "sample_photos", photos)
        patch.setattr(_demo, "_SECONDS", 0.05)
        return _demo.run(out, step), out, said


def test_the_whole_way(ran: tuple[_demo.DemoReport, Path, list[str]]) -> None:
    report, out, said = ran
    assert report.bit_equal_after_load
    assert report.reverts_exactly
    assert report.parity.passed
    assert report.norm_layers == report.swapped > 0
    assert [method.name.split()[0].rstrip(",") for method in report.methods] == ["fresh", "naive", *["gnswap"] * 3]
    assert {method.fidelity.photos for method in report.methods} == {3}
    assert {method.fidelity.labelled for method in report.methods} == {2}
    assert all(Path(path).exists() for path in report.files.values())
    assert all(pair.ratio > 0 for pair in report.speed)
    assert len(said) > 8
    gnswap.load(out / "lite0-gn", network())


@pytest.mark.parametrize(("options", "passes"), [([], True), (["--json"], True), (["--json"], False)])
def test_on_the_command_line(
    options: list[str],
    passes: bool,
    ran: tuple[_demo.DemoReport, Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = ran[0]
    if not passes:
        wrong = dataclasses.replace(report.parity.outputs[0], passed=False)
        report = dataclasses.replace(report, parity=dataclasses.replace(report.parity, outputs=(wrong,)))

    def run(out: Path, step: _demo.Step) -> _demo.DemoReport:
        with step("converting"):
            assert out == tmp_path
        return report

    monkeypatch.setattr(_demo, "run", run)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), *options])
    assert result.exit_code == (0 if passes else 4), result.stderr
    assert result.stderr == "converting ...\n"
    if options:
        assert set(json.loads(result.stdout)) >= PARTS
    else:
        for expected in ("naive copy", "gnswap as it comes", "bit-equal: yes", "bit for bit: yes", "parity"):
            assert expected in result.stdout


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "the directory cannot be made" in result.stderr


@pytest.mark.parametrize("make", [_baselines.naive_group_norm, _baselines.fresh_group_norm])
def test_baselines_are_plain_group_norm(make: object) -> None:
    model = randomise_norms(small_cnn()).eval()
    before = model[1].weight.clone()
    swapped = make(model, 5)  # type: ignore[operator]
    assert isinstance(model[1], nn.BatchNorm2d)
    assert torch.equal(model[1].weight, before)
    norm = swapped[1]
    assert (norm.num_groups, swapped[4].num_groups) == (4, 4)  # the largest divisors of 16 and 24 up to 5
    plain = nn.GroupNorm(4, 16, norm.eps)
    if make is _baselines.naive_group_norm:
        plain.load_state_dict({"weight": model[1].weight, "bias": model[1].bias})
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(norm(x), plain(x))


def test_baselines_keep_aliases() -> None:
    model, x = build("aliased")
    swapped = _baselines.naive_group_norm(model, 4)
    assert swapped.bn1 is swapped.bn2 is swapped.extra["norm"]
    assert not [module for module in swapped.modules() if isinstance(module, nn.BatchNorm2d)]
    assert swapped(x).shape == model(x).shape
