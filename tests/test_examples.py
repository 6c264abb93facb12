"""The example scripts, as a reader would start them but with `--smoke`: they run, and what they claim is so."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.models import _registry

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def smoke(name: str) -> Any:
    """What the script's `main` gives back; in this process, since a fresh one would import torch for seconds."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # where timm looks for a model's function
        spec.loader.exec_module(module)
        return module.main(["--smoke"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_how_it_is_started_and_is_tested(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert f"python examples/{name}.py" in text
    assert "--smoke" in text
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert f'"{name}"' in tests or f"{name}.py" in tests, "no test runs this script"


def test_convert_timm(capsys: pytest.CaptureFixture[str]) -> None:
    kept = smoke("convert_timm")
    assert kept["gnswap"] >= kept["naive swap, 32 groups"] + 0.5
    assert kept["parity"] == 1.0
    assert "49 norms swapped, 0 kept" in capsys.readouterr().out


def test_detection() -> None:
    losses = smoke("detection")
    assert losses[-1] < 0.8 * losses[0]


def test_volumes() -> None:
    table = smoke("volumes")
    assert table["gnswap"]["modes"] == 0.0
    assert table["BatchNorm"]["modes"] > 0.3


def test_export_half() -> None:
    rows = smoke("export_half")
    assert all(passed for _, _, passed in rows.values())
    assert rows["fp16"][0] < 0.6 * rows["fp32"][0]


def test_federated() -> None:
    """Averaged statistics fit nobody; a norm without statistics has none to average, nor has a frozen one."""
    accuracy = smoke("federated")
    assert accuracy["BatchNorm, averaged"]["client A"] < 0.5
    assert min(accuracy["gnswap"].values()) > 0.9
    assert min(accuracy["BatchNorm, frozen"].values()) > 0.8


def test_finetune_folder(capsys: pytest.CaptureFixture[str]) -> None:
    report = smoke("finetune_folder")
    assert report.done
    assert (report.classes, report.batch) == (("across", "down"), 2)
    assert report.best.loss < report.before.loss
    assert "others judge" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["own_loop_torch", "own_loop_lightning"])
def test_own_loops(name: str) -> None:
    """Training learns, and the softness arrives where it should."""
    result = smoke(name)
    assert result["last"] < 0.5 * result["first"]
    assert result["softness"] == 0.0


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves pictures open
def test_own_loop_timm(capsys: pytest.CaptureFixture[str]) -> None:
    """It registers a model with timm, which is taken back afterwards: other tests count timm's models."""
    try:
        losses = smoke("own_loop_timm")
    finally:
        _registry._clear_model_entries("converted")
        _registry._model_entrypoints.pop("converted", None)
    assert not timm.is_model("converted")
    assert losses[-1] < 0.5 * losses[0]
    spared, _, of, *_ = capsys.readouterr().out.splitlines()[-1].split()
    assert spared == of != "0"
