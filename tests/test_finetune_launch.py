"""`gnswap finetune` under the launchers themselves: torchrun with two processes, and accelerate launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gnswap
from tests.test_finetune import pictures, tiny
from tests.test_finetune_processes import distance

FINETUNE = ("-m", "gnswap", "finetune", "net", "--data", "data", "--size", "32", "--epochs", "1", "--batch-size", "1")
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "accelerate": ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "bf16"),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder, and the report of each launcher; both at once, since most of it is starting Python."""
    folder = tmp_path_factory.mktemp("launched")
    pictures(folder / "data")
    gnswap.save(tiny(), folder / "net")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_CONFIG_FILE": ""}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", *launcher, *FINETUNE, "-o", name, "--json"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, launcher in LAUNCHERS.items()
    }
    reports = {}
    for name, process in started.items():
        output, said = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {said}"
        reports[name] = json.loads(output)
    return folder, reports


def test_torchrun_does_what_one_process_does_in_two_parts(launched: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, reports = launched
    assert (reports["torchrun"]["processes"], reports["torchrun"]["strategy"]) == (2, "DDP")
    model = gnswap.load(folder / "net")
    report = gnswap.finetune(model, folder / "data", folder / "one", size=32, epochs=1, batch_size=1, accumulation=2)
    assert report.steps == reports["torchrun"]["steps"] == 8
    start, one, two = (gnswap.load(folder / name).state_dict() for name in ("net", "one/last", "torchrun/last"))
    assert distance(one, two) < 1e-4
    assert distance(start, one, lambda name: name.endswith("conv1.weight")) > 1e-3, "it has been trained"


def test_accelerate_launch_says_the_precision(launched: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """And starts one process, whatever it was asked for, where there is no accelerator: the help says so."""
    _, reports = launched
    assert (reports["accelerate"]["processes"], reports["accelerate"]["precision"]) == (1, "bf16")
