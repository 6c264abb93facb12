"""The op where torch's own machinery runs it: data-parallel training, CUDA tensors without a GPU, graph capture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _cases import full_case
from torch._subclasses.fake_tensor import FakeTensorMode

from gnswap.ops._op import group_norm_backward_op, group_norm_op

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 6, 4, 5), torch.contiguous_format),
        ((2, 6, 4, 5), torch.channels_last),
        ((2, 6, 3, 4, 5), torch.channels_last_3d),
    ],
)
def test_fake_cuda_tensors_without_a_gpu(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """What torch.compile and memory estimates do for a GPU that is elsewhere: shapes, dtypes, strides, device."""
    with FakeTensorMode():
        x = torch.empty(shape, device="cuda", dtype=dtype).to(memory_format=memory_format)
        vector = torch.empty(6, device="cuda")
        order = torch.empty(6, device="cuda", dtype=torch.int64)
        channels = (x, vector, vector, order)
        y, mean, rstd = group_norm_op(x, 2, vector, vector, 1e-5, "relu", *channels)
        gradients = group_norm_backward_op(
            y, x, mean, rstd, 2, vector, vector, 1e-5, "relu", *channels, [True, True, False, True, False, False]
        )
    assert {t.device.type for t in (y, mean, rstd, *gradients)} == {"cuda"}
    for t in (y, gradients[0], gradients[3]):
        assert (t.shape, t.dtype, t.stride()) == (x.shape, dtype, x.stride())
        assert t.is_contiguous(memory_format=memory_format)
    assert mean.shape == rstd.shape == (2, 2)
    assert mean.dtype == rstd.dtype == torch.float32
    assert [t.numel() for t in gradients] == [x.numel(), 6, 0, x.numel(), 0, 0]


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from gnswap import FusedGroupNorm

rank, world, store = int(sys.argv[1]), 2, sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), FusedGroupNorm(2, 8, act="silu"), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 2)
)
model[1].channel_scale = torch.rand(8) + 0.5
model[1].channel_order = torch.randperm(8)
batch = torch.randn(4, 3, 8, 8)

alone = torch.autograd.grad(model(batch).square().mean(), list(model.parameters()))
wrapped = DistributedDataParallel(model)
wrapped(batch[rank::world]).square().mean().backward()
for parameter, expected in zip(model.parameters(), alone, strict=True):
    torch.testing.assert_close(parameter.grad, expected)
dist.destroy_process_group()
"""


def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: GroupNorm sees single samples, so the split batch is the whole batch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_cuda_path_reads_nothing_back(memory_format: torch.memory_format) -> None:
    """A CUDA graph forbids waiting for the device; tensors without data forbid looking at a value at all."""
    pytest.importorskip("triton")
    from gnswap.ops._triton import _launch
    from gnswap.ops._triton._config import Machine

    launched: list[str] = []

    def record(kernel: object, programs: int, *_: object) -> None:
        assert programs > 0
        launched.append(kernel.__name__)  # type: ignore[attr-defined]

    machine = Machine(132, 90)
    for side in (7, 28, 224):
        case = full_case((2, 8, side, side)).map(lambda t: t.to("meta"))
        x, num_groups, weight, bias, _, act, residual, scale, shift, order = case.arguments
        channels = (scale, shift, order.to("meta"))
        x = x.to(memory_format=memory_format)
        y, mean, rstd = _launch.forward(
            x, num_groups, weight, bias, 1e-5, act, residual, *channels, machine=machine, run=record
        )
        mask = [True] * 4 + [False] * 2
        gradients = _launch.backward(
            y, x, mean, rstd, num_groups, weight, bias, act, residual, *channels, mask, machine=machine, run=record
        )
        assert gradients.x.stride() == y.stride() == x.stride()
    assert "sum_parts" in launched
    assert len(set(launched)) >= 5


def test_a_look_at_a_value_would_be_seen() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.empty(1, device="meta"))
