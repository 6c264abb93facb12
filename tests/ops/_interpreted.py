"""Runs the Triton kernels in triton's interpreter and prints what failed, as JSON by name.

A process of its own, because TRITON_INTERPRET is read when triton is imported, and the rest of the tests compile.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from _cases import Case, full_case
from _tolerance import assert_as_good_as
from _triton_cases import FLAT, LAST_TILE, REGIMES, RUNS, Run
from torch import Tensor

from gnswap import ops
from gnswap._errors import ArgumentError
from gnswap.ops import _reference
from gnswap.ops._backend import Backend
from gnswap.ops._op import group_norm_op
from gnswap.ops._triton import _launch
from gnswap.ops._triton._config import Machine

MACHINE = Machine(sm_count=2, arch=80)


def triton_backward(run: Run, case: Case, mean: Tensor, rstd: Tensor) -> _reference.Gradients:
    x, num_groups, weight, bias, _, act, residual, *channels = case.arguments
    mask = [*run.mask, False, False]
    return _launch.backward(
        run.gradient(), x, mean, rstd, num_groups, weight, bias, act, residual, *channels, mask,
        machine=MACHINE, config=run.config,
    )  # fmt: skip


def is_accurate(run: Run) -> None:
    """Forward and backward against fp64, judged by the reference's own error in the dtype of the run."""
    case, dy = run.case(), run.gradient()
    exact = case.map(Tensor.double)
    limits = {"_FIRST_WIDE": 0} if run.wide else {}
    limits |= {"_MERGED_AT_ONCE": 8, "_SUMMED_AT_ONCE": 2} if run.few_at_once else {}
    with mock.patch.multiple(_launch, **limits) if limits else contextlib.nullcontext():
        y, mean, rstd = _launch.forward(*case.arguments, machine=MACHINE, config=run.config)
        gradients = triton_backward(run, case, mean, rstd)
    for result, truth, plain in zip(
        (y, mean, rstd), _reference.group_norm(*exact.arguments), _reference.group_norm(*case.arguments), strict=True
    ):
        assert_as_good_as(result, truth, plain)
    assert y.dtype == case.x.dtype
    assert y.stride() == torch.empty_like(case.x, memory_format=_reference.memory_format(case.x)).stride()

    truths = _reference.group_norm_backward(dy.double(), *exact.arguments)
    plains = _reference.group_norm_backward(dy, *case.arguments)
    inputs = (case.x, case.weight, case.bias, case.residual)
    for wanted, result, truth, plain, like in zip(run.mask, gradients, truths, plains, inputs, strict=False):
        if truth is None or not wanted:
            assert result is None or like is case.x
            continue
        assert result is not None
        assert (result.dtype, result.shape) == (like.dtype, like.shape)
        assert_as_good_as(result, truth, plain)


def batch_does_not_matter() -> None:
    """A sample has the same bits alone and in a batch, forward and backward."""
    for config in REGIMES:
        run = Run(config, (2, 3, 3, 5), 1)
        case, dy = run.case(), run.gradient()
        y, mean, rstd = _launch.forward(*case.arguments, machine=MACHINE, config=config)
        gradients = triton_backward(run, case, mean, rstd)
        alone = case.sample(1)
        y_alone, mean_alone, rstd_alone = _launch.forward(*alone.arguments, machine=MACHINE, config=config)
        with mock.patch.object(Run, "gradient", lambda _, dy=dy: dy[1:2]):
            gradients_alone = triton_backward(run, alone, mean_alone, rstd_alone)
        assert torch.equal(y[1:2], y_alone), config
        assert torch.equal(mean[1:2], mean_alone), config
        assert torch.equal(gradients.x[1:2], gradients_alone.x), config
        assert torch.equal(gradients.residual[1:2], gradients_alone.residual), config


def nan_stays_in_its_group() -> None:
    for config in REGIMES:
        case = Run(config, (1, 6, 3, 5), act="relu", without=("channel_order",)).case()
        case.x[0, 0, 0, 0] = torch.nan
        y = _launch.forward(*case.arguments, machine=MACHINE, config=config)[0]
        assert y[0, :3].isnan().all(), config
        assert y[0, 3:].isfinite().all(), config


def zero_variance_gives_the_bias() -> None:
    for config in REGIMES:
        case = full_case((1, 6, 3, 5), act=None)
        case = replace(case, x=torch.full_like(case.x, 3.0), residual=None, channel_scale=None, channel_shift=None)
        case = replace(case, channel_order=None if config in (FLAT, LAST_TILE) else case.channel_order)
        if "channels_last" in config.regime:
            case = replace(case, x=case.x.to(memory_format=torch.channels_last))
        y = _launch.forward(*case.arguments, machine=MACHINE, config=config)[0]
        assert torch.allclose(y, case.bias[None, :, None, None].expand_as(y), atol=1e-4), config


@contextlib.contextmanager
def cpu_as_cuda() -> Any:
    """Lets the op take its CUDA path on CPU tensors."""
    with (
        mock.patch("gnswap.ops._op.choose_backend", return_value=Backend("triton", "a test")),
        mock.patch("torch.cuda.device", return_value=contextlib.nullcontext()),
        mock.patch.object(_launch, "machine_of", return_value=MACHINE),
    ):
        yield


def the_op_and_the_direct_call_take_this_path() -> None:
    """Forward and backward through autograd, with the gradients that only ATen has, by the op and past it."""
    for frozen in (("channel_scale", "channel_shift"), ()):
        case, leaves = full_case((1, 4, 2, 3)).leaves()
        wanted = {name: leaf for name, leaf in leaves.items() if name not in frozen}
        for name in frozen:
            leaves[name].requires_grad_(False)
        dy = torch.randn_like(case.x)
        truth = _reference.group_norm(*case.arguments)[0]
        truths = torch.autograd.grad(truth, list(wanted.values()), dy)
        for call in (case, lambda case=case: group_norm_op(*case.arguments)[0]):
            with cpu_as_cuda():
                y = call()
                gradients = torch.autograd.grad(y, list(wanted.values()), dy)
            assert torch.allclose(y, truth, atol=1e-5)
            assert not torch.equal(y, truth), "bit for bit the reference: the kernels were not used"
            for name, gradient, expected in zip(wanted, gradients, truths, strict=True):
                assert torch.allclose(gradient, expected, atol=1e-4), name
    with cpu_as_cuda(), torch.no_grad():
        assert torch.equal(case(), y)


def wrong_arguments_reach_no_kernel() -> None:
    with (
        cpu_as_cuda(),
        mock.patch.object(_launch, "forward", side_effect=AssertionError("launched")),
        pytest.raises(ArgumentError, match="weight does not fit"),
    ):
        replace(full_case(), weight=torch.ones(3))()


def an_empty_batch_takes_no_kernel() -> None:
    with cpu_as_cuda():
        assert ops.group_norm(torch.empty(0, 4, 2, 2), 2).shape == (0, 4, 2, 2)


def a_wrong_result_is_seen() -> None:
    """The judge of all others: another eps has to fail."""
    case = RUNS["tile"].case()
    exact = _reference.group_norm(*case.map(Tensor.double).arguments)[0]
    y = _launch.forward(*replace(case, eps=1e-3).arguments, machine=MACHINE, config=RUNS["tile"].config)[0]
    try:
        assert_as_good_as(y, exact, _reference.group_norm(*case.arguments)[0])
    except AssertionError:
        return
    raise AssertionError("an error of 1e-3 in eps went unseen")


OTHERS = {
    function.__name__: function
    for function in (
        batch_does_not_matter,
        nan_stays_in_its_group,
        zero_variance_gives_the_bias,
        the_op_and_the_direct_call_take_this_path,
        wrong_arguments_reach_no_kernel,
        an_empty_batch_takes_no_kernel,
        a_wrong_result_is_seen,
    )
}


def failure(check: Any, *args: Any) -> str | None:
    try:
        check(*args)
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    # the maximum over a group of NaN
    warnings.filterwarnings("ignore", message="All-NaN slice encountered", module="triton.runtime.interpreter")
    results = {name: failure(is_accurate, run) for name, run in RUNS.items()}
    results |= {name: failure(check) for name, check in OTHERS.items()}
    json.dump(results, sys.stdout)
