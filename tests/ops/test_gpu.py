"""The CUDA kernels on a GPU. Where there is none, that the settings reach every regime is still checked."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import _gpu_checks
import pytest
import torch
from _cases import full_case
from _gpu_checks import SETTINGS, Setting, all_checks

from gnswap.ops._triton._config import Machine, Problem, choose_config

CHECKS = all_checks()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name: str) -> None:
    CHECKS[name]()


def regimes(setting: Setting, machine: Machine) -> set[str]:
    n, c, *sizes = setting.shape
    assert n
    return {
        choose_config(
            Problem(
                setting.num_groups,
                c // setting.num_groups,
                math.prod(sizes),
                itemsize=2,
                channels_last=setting.channels_last,
                ordered=setting.ordered,
                backward=backward,
                act="relu",
                residual=True,
            ),
            machine,
        ).regime
        for backward in (False, True)
    }


@pytest.mark.parametrize("machine", [Machine(108, 80), Machine(132, 90)])
def test_the_settings_reach_every_regime(machine: Machine) -> None:
    reached = {name: regimes(setting, machine) for name, setting in SETTINGS.items()}
    every = {"tile", "flat", "split", "channels_last_tile", "channels_last_split"}
    assert set().union(*reached.values()) == every | ({"cluster"} if machine.arch == 90 else set())
    for name, found in reached.items():
        named = name.split(",")[0].replace(" of 2", "").replace(" of 8", "").replace(" ", "_")
        if named in every:
            assert named in found, name


@pytest.mark.parametrize("name", ["flat, 7x7", "tile, odd sizes, ordered", "channels_last tile, odd D"])
def test_the_checks_themselves_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(_gpu_checks, "DEVICE", "cpu")
    _gpu_checks.is_accurate(SETTINGS[name], torch.float16, mean=10.0)
    _gpu_checks.batch_does_not_matter(SETTINGS[name])


def test_the_checks_ask_for_what_triton_computes() -> None:
    """A gradient of the standardisation is ATen's, and then all the others are too."""
    case, leaves = _gpu_checks._leaves(full_case())
    assert set(leaves) == {"x", "weight", "bias", "residual"}
    assert all(leaf.requires_grad for leaf in leaves.values())
    assert case.channel_scale is not None
    assert case.channel_shift is not None
    assert not case.channel_scale.requires_grad
    assert not case.channel_shift.requires_grad


def test_the_checks_need_no_test_framework() -> None:
    """`gpu.py` runs them on machines that have torch and triton."""
    code = "import sys\nfor name in ('hypothesis', 'pytest'): sys.modules[name] = None\n"
    code += "import _gpu_checks\nassert _gpu_checks.all_checks()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def test_the_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_checks, "DEVICE", "cpu")
    wrong = _gpu_checks.ops.group_norm
    monkeypatch.setattr("gnswap.ops.group_norm", lambda *args, **more: 1.01 * wrong(*args, **more))
    with pytest.raises(AssertionError, match="error"):
        _gpu_checks.is_accurate(SETTINGS["flat, 7x7"], torch.float32)
