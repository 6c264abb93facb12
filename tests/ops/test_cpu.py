"""The C++ kernels: every instruction set against fp64, their bits, and what happens where they cannot be had."""

from __future__ import annotations

import ctypes
import itertools
import logging
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import Case, full_case, laid_out
from _tolerance import assert_as_good_as, max_error
from torch import Tensor

from gnswap import ops
from gnswap.ops import _cpu_library, _op, _reference
from gnswap.ops._cpu_library import Library, library

KERNELS = library()
needs_kernels = pytest.mark.skipif(isinstance(KERNELS, str), reason=f"no C++ kernels: {KERNELS}")
ISAS = ["generic", "avx2", "avx512"]
ACTS = [None, *ops.ACTIVATIONS]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(2, 12, 7, 7), (1, 64, 14, 14), (3, 6, 5, 3), (2, 20, 9, 2), (1, 33, 7, 7)]
SHAPES += [(2, 6, 3, 4, 5), (2, 12), (3, 12, 17)]
# in channels_last: rows that are worked on side by side, and a sample beyond the cache whose rows follow one another
LONG_ROWS, SHORT_ROWS = (3, 532, 9, 9), (1, 28, 49, 49)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on one instruction set; skips where the machine does not have it."""
    assert isinstance(KERNELS, Library)
    functions = ctypes.CDLL(str(KERNELS.path))
    if not functions.gnswap_cpu_use_isa(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    functions.gnswap_cpu_use_isa(KERNELS.isa.encode())


def every_isa(test: Any) -> Any:
    """Run a test on every instruction set that this machine has."""
    return pytest.mark.usefixtures("isa")(pytest.mark.parametrize("isa", ISAS, indirect=True)(test))


def gradients(case: Case, dy: Tensor) -> dict[str, Tensor]:
    case, leaves = case.leaves()
    return dict(zip(leaves, torch.autograd.grad(case(), list(leaves.values()), dy), strict=True))


def exact_gradients(case: Case, dy: Tensor) -> dict[str, Tensor]:
    case, leaves = case.map(lambda t: t.detach().double()).leaves()
    y = _reference.group_norm(*case.arguments)[0]
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.double()), strict=True))


# ---------------------------------------------------------------- values


@needs_kernels
@every_isa
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    groups = 3 if shape[1] % 3 == 0 else 4
    combinations = itertools.product(["contiguous", "channels_last"], [True, False], [True, False])
    for number, (layout, standardised, residual) in enumerate(combinations):
        case = full_case(shape, groups, ACTS[number % len(ACTS)], seed=number).map(lambda t: t.to(dtype))
        if not residual:
            case = replace(case, residual=None)
        if not standardised:
            case = replace(case, channel_scale=None, channel_shift=None, channel_order=None)
        case = replace(case, x=laid_out(case.x, layout))
        exact = _reference.group_norm(*case.map(Tensor.double).arguments)[0]
        assert_as_good_as(case(), exact)
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        exact_dx = exact_gradients(case, dy)
        for name, gradient in gradients(case, dy).items():
            if name not in ("channel_scale", "channel_shift"):  # ATen's, tested elsewhere
                assert_as_good_as(gradient, exact_dx[name])


@needs_kernels
@every_isa
@pytest.mark.parametrize("act", [None, "relu", "relu6"])
@pytest.mark.parametrize("shape", [LONG_ROWS, SHORT_ROWS], ids=str)
def test_rows_side_by_side_and_one_after_another(shape: tuple[int, ...], act: str | None) -> None:
    for residual in (True, False):
        case = full_case(shape, 4, act)
        case = replace(case, x=laid_out(case.x, "channels_last"), residual=case.residual if residual else None)
        assert_as_good_as(case(), _reference.group_norm(*case.map(Tensor.double).arguments)[0])
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        exact = exact_gradients(case, dy)
        found = gradients(case, dy)
        for name in ("x", "weight", "bias", *(["residual"] if residual else [])):
            assert_as_good_as(found[name], exact[name])


@needs_kernels
@every_isa
@pytest.mark.parametrize("act", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_over_their_whole_range(act: str, dtype: torch.dtype) -> None:
    """With weight 0 the output is act(residual), and the residual's gradient act'(residual)."""
    z = torch.cat([torch.linspace(-12, 12, 4801), torch.linspace(-1e4, 1e4, 200), torch.tensor([3.0, 6.0])])
    z = z[:5000].reshape(1, 5, 1000).to(dtype)
    case = Case(torch.randn_like(z), 1, torch.zeros(5), torch.zeros(5), act=act, residual=z)
    leaf = z.double().requires_grad_()
    exact = getattr(F, act)(leaf)
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    rtol, atol = (2e-6, 1e-6) if dtype == torch.float32 else (1e-14, 1e-15)
    torch.testing.assert_close(case().double(), exact.detach(), rtol=rtol, atol=atol)
    dresidual = gradients(case, torch.ones_like(z))["residual"]
    torch.testing.assert_close(dresidual.double(), slope, rtol=rtol, atol=4 * atol)


@needs_kernels
@every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_of_half_types_are_exact_for_every_value(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 4, 16384)
    x, zeros = torch.randn(every.shape).to(dtype), torch.zeros(4)
    same = ops.group_norm(x, 1, zeros, zeros, residual=every)
    torch.testing.assert_close(same, every, rtol=0, atol=0, equal_nan=True)
    moved = ops.group_norm(x, 1, zeros, torch.full((4,), 1 / 3), residual=every)
    torch.testing.assert_close(moved, (every.float() + 1 / 3).to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_kernels
@every_isa
@pytest.mark.parametrize("act", ["relu", "relu6", "silu", None])
def test_nan_and_infinity_stay_in_their_sample(act: str | None) -> None:
    case = replace(full_case((3, 6, 7, 7), act=act), channel_scale=None, channel_shift=None)
    expected = case()
    for value in (float("nan"), float("inf")):
        x = case.x.clone()
        x[1, 2, 3, 3] = value
        y = replace(case, x=x)()
        assert torch.equal(y[[0, 2]], expected[[0, 2]])
        assert y[1].isnan().any()


@needs_kernels
@every_isa
@pytest.mark.parametrize("mean", [100.0, 1000.0, 1e4])
def test_pitfall_28_a_large_mean_costs_no_digits_in_any_layout(mean: float) -> None:
    x = torch.randn(2, 64, 28, 28, generator=torch.Generator().manual_seed(0)) + mean
    exact = F.group_norm(x.double(), 32)
    contiguous = max_error(ops.group_norm(x, 32), exact)
    channels_last = max_error(ops.group_norm(x.to(memory_format=torch.channels_last), 32), exact)
    assert channels_last <= 2 * contiguous
    assert contiguous <= max_error(F.group_norm(x, 32), exact) / 10


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_border_far_from_the_rest(layout: str) -> None:
    """The sums are taken relative to a few elements; here those at the edge say nothing about the others."""
    x = torch.full((1, 8, 66, 66), -500.0)
    x[..., 1:-1, 1:-1] = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 500
    x[..., 0, 0] = 1e4
    exact = F.group_norm(x.double(), 2)
    assert_as_good_as(ops.group_norm(laid_out(x, layout), 2), exact, F.group_norm(x, 2))


@needs_kernels
def test_gradcheck_through_the_kernels() -> None:
    for layout, act in [("contiguous", "silu"), ("channels_last", "gelu")]:
        case = full_case((2, 4, 3, 2), act=act, dtype=torch.float64)
        leaves = replace(case, x=laid_out(case.x, layout)).leaves()[1]

        def norm(*values: Tensor, case: Case = case, names: tuple[str, ...] = tuple(leaves)) -> Tensor:
            return replace(case, **dict(zip(names, values, strict=True)))()

        assert torch.autograd.gradcheck(norm, tuple(leaves.values()))


# ---------------------------------------------------------------- bits


@needs_kernels
@every_isa
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("shape", "act"), [((3, 16, 65, 65), "silu"), ((3, 16, 65, 65), "relu"), (LONG_ROWS, "relu")])
def test_bits_depend_neither_on_the_batch_nor_on_threads(
    layout: str, groups: int, shape: tuple[int, ...], act: str
) -> None:
    """Large enough that threads share a group (groups=1), and that sums have many pieces."""
    case = full_case(shape, groups, act)
    case = replace(case, x=laid_out(case.x, layout))
    dy = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(0))
    names = ("x", "residual")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y, dx = case(), gradients(case, dy)
        torch.set_num_threads(2)
        for _ in range(3):
            assert torch.equal(case(), y)
        again = gradients(case, dy)
        assert all(torch.equal(again[name], dx[name]) for name in dx)
        for n in range(3):
            sample = case.sample(n)
            assert torch.equal(sample(), y[n : n + 1])
            alone = gradients(sample, dy[n : n + 1])
            assert all(torch.equal(alone[name], dx[name][n : n + 1]) for name in names)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_direct_call_has_the_bits_of_the_op(dtype: torch.dtype) -> None:
    case = full_case((2, 6, 7, 7)).map(lambda t: t.to(dtype))
    assert torch.equal(case(), _op.group_norm_op(*case.arguments)[0])
    dy = torch.randn(case.x.shape).to(dtype)
    direct = gradients(case, dy)
    case, leaves = case.leaves()
    through_op = torch.autograd.grad(_op.group_norm_op(*case.arguments)[0], list(leaves.values()), dy)
    assert all(torch.equal(direct[name], value) for name, value in zip(leaves, through_op, strict=True))


class Norms(torch.utils.data.Dataset[Tensor]):
    """A data set that normalises in the worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return ops.group_norm(torch.full((1, 4, 8), float(index)) + torch.arange(8.0), 2)[0]


@needs_kernels
def test_it_works_in_forked_workers() -> None:
    here = torch.stack([Norms()[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(Norms(), batch_size=4, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(next(iter(loader)), here)


# ---------------------------------------------------------------- the library


COMPILER = """#!/bin/sh
echo call >> "$(dirname "$0")/calls"
sleep 0.1
while [ $# -gt 1 ]; do shift; done
echo binary > "$1"
"""


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("GNSWAP_CPU_KERNEL", "GNSWAP_CPU_ISA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "gnswap"


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.exists() else []


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/g++", "CXX=/nowhere/g++ is not a program"),
        ("false -x", "false failed with code 1: no output"),
        ("g++ -D'X=a", "CXX is no command: No closing quotation"),
    ],
)
def test_a_compiler_that_does_not_work_is_one_log_line_and_aten(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(_cpu_library, "_state", None)
    with caplog.at_level(logging.WARNING, "gnswap"):
        for _ in range(2):
            y = full_case()()
    assert [record.message for record in caplog.records] == [
        f"GroupNorm runs on ATen, not on the C++ kernels: {reason}"
    ]
    assert leftovers(cache) == []
    report = ops.backend_report()
    assert (report.name, report.reason, report.path, report.isa) == ("aten", reason, None, None)
    assert_as_good_as(y, _reference.group_norm(*full_case().map(Tensor.double).arguments)[0])


@pytest.mark.usefixtures("cache")
def test_the_compilers_message_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = program(
        tmp_path / "cxx", "#!/bin/sh\necho warning: w >&2\necho 'op.cpp:1: error: no header' >&2\nexit 3\n"
    )
    monkeypatch.setenv("CXX", script)
    assert _cpu_library._load() == f"{script} failed with code 3: op.cpp:1: error: no header"


@pytest.mark.usefixtures("cache")
def test_a_compiler_that_no_system_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", script := program(tmp_path / "cxx", "no program"))
    assert _cpu_library._load() == f"{script} cannot be run: [Errno 8] Exec format error: '{script}'"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_cpu_library.Path, "home", home)
    found = _cpu_library._load()
    assert found == "nowhere to keep them, set XDG_CACHE_HOME: Could not determine home directory."


@pytest.mark.usefixtures("cache")
def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert _cpu_library._load() == "no C++ compiler found; install g++ or set CXX"


@pytest.mark.usefixtures("cache")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert "cannot write the cache directory" in str(_cpu_library._load())


def test_a_broken_library_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", program(tmp_path / "cxx", COMPILER))
    found = _cpu_library._load()
    assert isinstance(found, str)
    assert str(cache) in found


@pytest.mark.parametrize("switch", ["0", "off"])
def test_switched_off_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, switch: str
) -> None:
    monkeypatch.setenv("GNSWAP_CPU_KERNEL", switch)
    monkeypatch.setattr(_cpu_library, "_state", None)
    with caplog.at_level(logging.DEBUG, "gnswap"):
        assert ops.backend_report().reason == f"GNSWAP_CPU_KERNEL={switch}"
    assert caplog.records == []


def test_side_by_side_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """File locks hold between open files, so threads show what processes do."""
    monkeypatch.setenv("CXX", program(tmp_path / "cxx", COMPILER))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: _cpu_library._built(), range(4)))
    assert len(paths) == 1
    assert leftovers(cache) == [path.name for path in paths]
    sources_and_link = 1 + len(_cpu_library._ISA_FLAGS) + 1
    assert len((tmp_path / "calls").read_text().splitlines()) <= sources_and_link


@needs_kernels
def test_a_wrong_instruction_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNSWAP_CPU_ISA", "mmx")
    assert _cpu_library._load() == "GNSWAP_CPU_ISA=mmx is not an instruction set of this machine"


@needs_kernels
def test_the_report_says_what_runs() -> None:
    report = ops.backend_report()
    assert (report.device, report.dtype, report.name) == ("cpu", "float32", "cpp")
    assert report.isa in ISAS
    assert report.path is not None
    assert Path(report.path).exists()
    assert report.compiler
    assert report.autograd
    assert ops.BackendReport.from_json(report.to_json()) == report
