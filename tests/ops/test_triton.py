"""The Triton kernels in triton's interpreter, against fp64; how the work is cut; and when they are used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _triton_cases import RUNS
from hypothesis import given
from hypothesis import strategies as st

from gnswap.ops import _backend
from gnswap.ops._triton._config import Config, Machine, Problem, choose_config

HERE = Path(__file__).parent
A100, H100 = Machine(108, 80), Machine(132, 90)
pytest.importorskip("triton", reason="triton is where torch for CUDA is")

OTHER_CHECKS = (
    "batch_does_not_matter",
    "nan_stays_in_its_group",
    "zero_variance_gives_the_bias",
    "the_op_and_the_direct_call_take_this_path",
    "wrong_arguments_reach_no_kernel",
    "an_empty_batch_takes_no_kernel",
    "a_wrong_result_is_seen",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """What failed in the interpreter, by name; None where nothing did."""
    path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, HERE / "_interpreted.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, str | None] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("name", [*RUNS, *OTHER_CHECKS])
def test_in_the_interpreter(interpreted: dict[str, str | None], name: str) -> None:
    assert interpreted.pop(name) is None


def test_every_check_of_the_interpreter_is_looked_at(interpreted: dict[str, str | None]) -> None:
    assert not set(interpreted) - {*RUNS, *OTHER_CHECKS}


problems = st.builds(
    Problem,
    num_groups=st.integers(1, 64),
    channels_per_group=st.integers(1, 300),
    positions=st.integers(1, 400).map(lambda n: n * n) | st.integers(1, 10**7),
    itemsize=st.sampled_from([2, 4]),
    channels_last=st.booleans(),
    ordered=st.booleans(),
    backward=st.booleans(),
    act=st.sampled_from([None, "relu", "gelu"]),
    residual=st.booleans(),
)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@given(problems, st.sampled_from([A100, H100, Machine(2, 86), Machine(148, 100)]))
def test_every_problem_has_a_cut_that_covers_it(problem: Problem, machine: Machine) -> None:
    config = choose_config(problem, machine)
    assert config == choose_config(problem, machine)
    assert all(map(is_power_of_two, (config.rows, config.columns, config.num_warps, config.num_ctas)))
    assert config.num_warps <= 16
    assert config.num_ctas == 1 or machine.arch == 90, "clusters are compiled and checked for sm_90 only"
    d, s = problem.channels_per_group, problem.positions
    if config.regime in ("tile", "cluster"):
        assert config.rows >= d
        assert config.columns >= s
    elif config.regime == "flat":
        assert config.columns >= d * s
        assert not problem.ordered, "consecutive elements of a group are consecutive channels only in natural order"
    elif config.regime == "channels_last_tile":
        assert config.rows >= s
        assert config.columns % d == 0 or config.columns >= d
        assert not problem.ordered
    else:
        step = config.rows if problem.channels_last else config.columns
        assert config.chunk % step == 0
        assert is_power_of_two(config.chunk)
    elements = config.rows * config.columns
    assert elements <= (2048 * 2 if config.chunk else 32768 * config.num_ctas)
    assert elements // (config.num_warps * config.num_ctas * 32) <= 64, "more than a thread has registers for"


@given(problems, st.sampled_from([A100, H100]))
def test_a_split_fills_the_machine_at_batch_1(problem: Problem, machine: Machine) -> None:
    config = choose_config(problem, machine)
    if not config.chunk:
        return
    along = -(-problem.positions // config.chunk)
    if problem.channels_last:
        programs = along * -(-problem.channels // config.columns)
        most = -(-problem.positions // config.rows) * -(-problem.channels // config.columns)
        assert along <= 128, "what one program merges"
    else:
        down = -(-problem.channels_per_group // config.rows)
        programs = problem.num_groups * down * along
        most = problem.num_groups * problem.group_size // 4096
        assert down * along <= 4096, "what one program merges"
    assert programs >= min(machine.sm_count, most) // 3, "powers of two lose a part"


@pytest.mark.parametrize("machine", [A100, H100])
@pytest.mark.parametrize(
    ("channels", "side"),
    [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)],
)
def test_resnet50_is_read_once(channels: int, side: int, machine: Machine) -> None:
    """Forward, contiguous, in half precision, every norm at 224 px."""
    problem = Problem(32, channels // 32, side * side, itemsize=2, act="relu", residual=True)
    assert choose_config(problem, machine).one_read


def test_regimes_by_size_and_machine() -> None:
    big = Problem(32, 16, 64 * 64, itemsize=2)
    assert choose_config(big, H100) == Config("cluster", 16, 4096, num_warps=16, num_ctas=2)
    assert choose_config(big, A100).regime == "split"
    assert choose_config(Problem(32, 32, 196, itemsize=2), H100).regime == "flat"
    assert choose_config(Problem(32, 32, 196, itemsize=4), H100).regime == "tile", "196 * 4 bytes are aligned rows"
    assert choose_config(Problem(32, 32, 196, itemsize=2, ordered=True), H100).regime == "tile"
    last = Problem(32, 32, 196, itemsize=2, channels_last=True)
    assert choose_config(last, H100).regime == "channels_last_tile"
    assert (
        choose_config(Problem(32, 32, 196, 2, channels_last=True, ordered=True), H100).regime == "channels_last_split"
    )


class Driver:
    """A GPU as far as the choice of code can see one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.delenv("GNSWAP_CUDA_KERNEL", raising=False)
        monkeypatch.setenv("CC", "gcc")
        monkeypatch.setattr("torch.version.cuda", "13.0")
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
        _backend._no_triton.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> object:
    """No test leaves its answer behind."""
    yield
    _backend._no_triton.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_where_it_runs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    Driver(monkeypatch)
    name, reason = _backend.choose_backend("cuda", dtype)
    assert name == "triton"
    assert str(dtype) in reason


def test_fp64_is_left_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    assert _backend.choose_backend("cuda", torch.float64) == ("aten", "the Triton kernels compute in fp32")


def test_the_environment_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    monkeypatch.setenv("GNSWAP_CUDA_KERNEL", "off")
    assert _backend.choose_backend("cuda", torch.float32) == ("aten", "GNSWAP_CUDA_KERNEL=off")


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        ("torch.version.cuda", None, "no CUDA"),
        ("torch.cuda.is_available", lambda: False, "no CUDA device"),
        ("importlib.util.find_spec", lambda _: None, "triton is not installed"),
        ("torch.cuda.get_device_capability", lambda: (7, 5), "this is sm_75"),
        ("shutil.which", lambda _: None, "needs a C compiler"),
    ],
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, target: str, value: object, reason: str) -> None:
    Driver(monkeypatch)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(target, value)
    name, found = _backend.choose_backend("cuda", torch.float16)
    assert name == "aten"
    assert reason in found


def test_choosing_does_not_import_triton() -> None:
    code = (
        "import sys, torch, gnswap.ops; from gnswap.ops._triton import _config; "
        "gnswap.ops._backend.choose_backend('cuda', torch.float16); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parent.parent, check=True)
