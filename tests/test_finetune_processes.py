"""Fine-tuning on two processes over gloo: the same as on one, which BatchNorm cannot do; and one process is lost.

Started as accelerate and torchrun start them, with variables of the environment; forked from one process that has
imported everything, as four fresh interpreters would import torch four times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gnswap
from gnswap import _finetuned, _finetuner
from tests.test_finetune import QUICK, network, original, pictures

ONE_EACH: dict[str, Any] = {**QUICK, "batch_size": 1, "ema": None, "lr": 1e-3}
LOST_AT = 11


def begin(task: Callable[[Path, int], None], folder: Path, environment: dict[str, str], output: Path) -> None:
    """What one of the processes does first, and then the task."""
    os.environ.update(environment)
    written = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(written, 1)
    os.dup2(written, 2)
    torch.set_num_threads(1)
    task(folder, int(environment["RANK"]))


def run(task: Callable[[Path, int], None], folder: Path) -> list[tuple[int, str]]:
    """Two processes that call a function of this file with a folder and their rank: exit codes and what they print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "accelerate", "torch.distributed.fsdp"])
    outputs = [folder / f"{task.__name__}{rank}.txt" for rank in "01"]
    started = [
        context.Process(target=begin, args=(task, folder, {**common, "RANK": rank, "LOCAL_RANK": rank}, output))
        for rank, output in zip("01", outputs, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=300)
    return [(process.exitcode, output.read_text()) for process, output in zip(started, outputs, strict=True)]


def two_steps(model: nn.Module, x: Tensor, labels: Tensor, batches: list[slice]) -> dict[str, Tensor]:
    """Two steps of SGD in training mode on the same samples, forward passes over `batches` of them; the state after.

    With several processes in a group, each takes one of the batches, and gradients are averaged (DDP).
    """
    wrapped: nn.Module = model.train()
    if torch.distributed.is_initialized():
        wrapped = nn.parallel.DistributedDataParallel(model)
        batches = batches[torch.distributed.get_rank() :][:1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for rows in batches:
            F.cross_entropy(wrapped(x[rows]), labels[rows]).div(len(batches)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def samples() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


EACH = [slice(0, 1), slice(1, 2)]
TOGETHER = [slice(0, 2)]


def work(folder: Path, rank: int) -> None:
    """What two processes do: fine-tune, twice two steps, and fine-tune until one of them is killed."""
    _finetuned.can_draw = lambda: False
    report = gnswap.finetune(network(), folder / "data", folder / "two", **ONE_EACH)
    states = [two_steps(without_dropout(model), *samples(), EACH) for model in (network(), original())]
    torch.save((report.strategy, states), folder / f"states{rank}")
    one_step = _finetuner.Finetuner._one_step

    def lost(self: _finetuner.Finetuner, batches: Any) -> bool:
        if rank == 1 and self.step == LOST_AT:
            os.kill(os.getpid(), 9)
        return one_step(self, batches)

    _finetuner.Finetuner._one_step = lost  # type: ignore[method-assign]
    gnswap.finetune(network(), folder / "data", folder / "lost", **ONE_EACH)


def shard(folder: Path, rank: int) -> None:
    """Go on after the loss; then the same job on weights sharded over both processes (FSDP2).

    accelerate 1.15 offers FSDP on accelerators only (`AcceleratorState.__init__` asks for MULTI_GPU and its kind), so
    on the CPU its state has to be set by hand; torch's `fully_shard` underneath runs over gloo.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    _finetuned.can_draw = lambda: False
    gnswap.finetune(network(), folder / "data", folder / "lost", **ONE_EACH)
    try:
        gnswap.finetune(network(), folder / "data", folder / f"other{rank}", **{**ONE_EACH, "seed": rank})
    except gnswap.ArgumentError as error:
        print(error)  # noqa: T201
    Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    report = gnswap.finetune(network(), folder / "data", folder / "sharded", **ONE_EACH)
    assert report.strategy == "FSDP2"


def last(folder: Path) -> dict[str, Tensor]:
    return gnswap.load(folder / "last", original(2)).state_dict()


def distance(one: dict[str, Tensor], two: dict[str, Tensor], names: Any = lambda _name: True) -> float:
    """The largest difference of any weight, relative to the largest of its tensor."""
    found = [
        float((one[name].double() - two[name].double()).abs().max() / one[name].double().abs().max().clamp(min=1e-9))
        for name in one
        if names(name)
    ]
    return max(found)


def is_statistic(name: str) -> bool:
    return "running" in name


def is_weight(name: str) -> bool:
    return not is_statistic(name) and "tracked" not in name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    pictures(root / "data")
    return root


@pytest.fixture(scope="module")
def worked(folder: Path) -> list[tuple[int, str]]:
    return run(work, folder)


def test_two_processes_do_what_one_does_in_two_parts(folder: Path, worked: list[tuple[int, str]]) -> None:
    assert worked[1][0] == -9, worked[1][1]
    strategy, _ = torch.load(folder / "states0", weights_only=True)
    assert strategy == "DDP"
    report = gnswap.finetune(network(), folder / "data", folder / "one", **ONE_EACH, accumulation=2)
    assert report.steps == 16
    assert distance(last(folder / "one"), last(folder / "two")) < 1e-4
    assert distance(last(folder / "one"), network_start(folder)) > 1e-2, "it has been trained"


def network_start(folder: Path) -> dict[str, Tensor]:
    """The network as it was before the first step: with the new head, untrained."""
    model = network()
    gnswap.finetune(model, folder / "data", folder / "start", **{**ONE_EACH, "epochs": 0.1, "lr": 1e-30})
    return model.state_dict()


def test_batchnorm_cannot_do_that(folder: Path, worked: list[tuple[int, str]]) -> None:  # noqa: ARG001
    """The same two samples, together, one after the other, and on two processes: one result, or three."""
    _, (ours, batchnorm) = torch.load(folder / "states0", weights_only=True)
    _, (_, batchnorm_of_other) = torch.load(folder / "states1", weights_only=True)
    apart = two_steps(without_dropout(network()), *samples(), EACH)
    together = two_steps(without_dropout(network()), *samples(), TOGETHER)
    assert distance(apart, ours) < 1e-5
    assert distance(apart, together) < 1e-5
    bn_apart = two_steps(without_dropout(original()), *samples(), EACH)
    bn_together = two_steps(without_dropout(original()), *samples(), TOGETHER)
    assert distance(bn_apart, bn_together, is_weight) > 0.01
    assert distance(bn_apart, batchnorm, is_statistic) > 0.01
    assert distance(batchnorm, batchnorm_of_other, is_statistic) > 1e-3, "each process has statistics of its own"


def test_a_lost_process_ends_the_job_and_it_goes_on(folder: Path, worked: list[tuple[int, str]]) -> None:
    code, output = worked[0]
    assert code == 1
    assert "FinetuneError: another process of this job has ended (at step 12 of 16" in output
    assert "has step 8)" in output
    assert "Start the job again with the same command" in output
    assert json.loads((folder / "lost" / "finetune.json").read_text())["report"]["steps"] == 8
    for code, output in (sharded := run(shard, folder)):
        assert code == 0, output
    assert all("the processes do not do the same" in output for _, output in sharded)
    for name, bound in (("lost", 0.0), ("sharded", 1e-4)):
        assert distance(last(folder / "two"), last(folder / name)) <= bound, name
