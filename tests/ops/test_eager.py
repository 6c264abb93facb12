"""The compiled way in for eager calls: the op's bits, autograd's promises, and everything watched goes another way."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _cases import Case, full_case, laid_out
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gnswap import ops
from gnswap.ops import _cpu_library, _direct

KERNELS = _cpu_library.library()
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
needs_eager = pytest.mark.skipif(
    isinstance(KERNELS, str) or isinstance(KERNELS.eager, str), reason="csrc/eager.cpp could not be compiled"
)


def gradients(case: Case, dy: Tensor) -> dict[str, Tensor]:
    case, leaves = case.leaves()
    return dict(zip(leaves, torch.autograd.grad(case(), list(leaves.values()), dy), strict=True))


def full_cases() -> Iterator[tuple[Case, Tensor]]:
    for seed, (dtype, act, layout) in enumerate(
        itertools.product(FLOATS, ["gelu", "relu", None], ["contiguous", "channels_last", "sliced"])
    ):
        case = full_case((2, 6, 5, 7), act=act, seed=seed).map(lambda t, dtype=dtype: t.to(dtype))
        for given in ((), ("weight", "channel_order"), ("bias", "residual", "channel_scale")):
            left_out = replace(case, x=laid_out(case.x, layout), **dict.fromkeys(given))
            yield left_out, torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_eager
def test_without_the_extension_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = [(case(), gradients(case, dy)) for case, dy in full_cases()]
    monkeypatch.setattr(_direct, "_eager", lambda: None)
    for (case, dy), (y, expected) in zip(full_cases(), with_it, strict=True):
        assert torch.equal(case(), y)
        found = gradients(case, dy)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert all(found[name].dtype == expected[name].dtype for name in found)


@needs_eager
def test_plain_calls_have_their_autograd_in_cpp() -> None:
    case, _ = full_case().leaves()
    assert "GnswapGroupNorm" in case().grad_fn.name()
    assert "GnswapGroupNorm" in replace(case, act="".join(["si", "lu"]))().grad_fn.name()  # equal, not the same


@needs_eager
def test_watched_calls_go_through_the_op() -> None:
    class Subclass(Tensor):
        pass

    class Names(TorchFunctionMode):
        def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    case, _ = full_case().leaves()
    with Names():
        through_mode = case()
    assert any("gnswap" in name for name in names)
    assert "GnswapGroupNorm" not in through_mode.grad_fn.name()
    subclass = replace(case, x=case.x.detach().as_subclass(Subclass))()
    assert type(subclass) is Subclass
    assert torch.equal(subclass.as_subclass(Tensor), case())


THREADS = """
import os
import torch
from gnswap import ops

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
x = torch.frombuffer(bytearray(4 * 64 * 112 * 112), dtype=torch.float32).reshape(1, 64, 112, 112)
assert "GnswapGroupNorm" in ops.group_norm(torch.ones(1, 2, 2, requires_grad=True), 1).grad_fn.name()
before = threads()
with torch.no_grad():
    ops.group_norm(x, 32)
print(threads() - before)
"""


@needs_eager
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux shows a process's threads")
def test_a_large_input_is_shared_by_threads() -> None:
    """torch starts its second thread with the first loop that has work for one."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True, env=environment)
    assert int(found.stdout) == 1, found.stderr


@needs_eager
def test_the_profiler_sees_both_directions() -> None:
    case, leaves = full_case().leaves()
    with torch.profiler.profile() as profile:
        torch.autograd.grad(case().sum(), list(leaves.values())[:3])
    names = {event.name for event in profile.events()}
    assert {"gnswap_cpu::forward", "gnswap_cpu::backward"} <= names


@needs_eager
def test_what_autograd_promises() -> None:
    case = Case(torch.randn(2, 6, 5, requires_grad=True), 2, torch.ones(6, requires_grad=True), act="relu")
    # saved tensors pass the hooks, and come back through them
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1, lambda i: packed[i]):
        y = case()
    (dx,) = torch.autograd.grad(y.sum(), case.x)
    assert any(t is case.x or torch.equal(t, case.x) for t in packed if t.shape == case.x.shape)
    # in-place work on the result is fine, on what was saved it is an error
    (again,) = torch.autograd.grad(case().mul_(1).sum(), case.x)
    assert torch.equal(again, dx)
    x = case.x * 1
    y = replace(case, x=x)()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    # a second backward needs the graph to be kept
    y = case()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@needs_eager
def test_an_unused_result_has_no_gradient() -> None:
    case, leaves = full_case().leaves()
    y = case()
    found = torch.autograd.grad((y.detach() * 2).sum() + case.x.sum(), list(leaves.values()), allow_unused=True)
    assert [gradient is None for gradient in found] == [False] + [True] * (len(leaves) - 1)


def test_an_extension_that_cannot_be_compiled_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    if isinstance(KERNELS, str):
        pytest.skip("no kernels to connect to")
    monkeypatch.setattr(_cpu_library, "_EAGER_FLAGS", ["-no-such-flag"])
    monkeypatch.setattr(_cpu_library, "_state", None)
    before = set(KERNELS.path.parent.glob("gnswap_eager*.so"))
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'error: no Python.h' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.INFO, "gnswap"):
        y = full_case()()
    assert "small GroupNorm calls are slower than they could be" in caplog.records[-1].message
    report = ops.backend_report()
    assert (report.name, report.isa) == ("cpp", KERNELS.isa)
    assert report.autograd is not None
    assert report.autograd.endswith("error: no Python.h")
    assert set(KERNELS.path.parent.glob("gnswap_eager*.so")) == before
    monkeypatch.setattr(_cpu_library, "_state", KERNELS)
    assert torch.equal(full_case()(), y)
