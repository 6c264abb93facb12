"""Fine-tuning: it learns, resumes exactly, keeps a network that can be used, and says what it cannot do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import gnswap
from gnswap import FusedGroupNorm, _finetuned, _finetuner
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
    @pytest.mark.parametrize("killed_after", [0, 3, 13])
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
