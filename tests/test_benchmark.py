"""benchmark_onnx: what is timed, in turn with what, and whose the time is."""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from _models import randomise_norms, small_cnn
from torch import Tensor, nn

from gnswap import _onnx_profile, _peak_memory, _plain_exports, _timing
from gnswap._apply import apply
from gnswap._benchmark import DEFAULT, FOLDED, GRAPHED, SUBJECT, benchmark_onnx
from gnswap._errors import (
    ArgumentError,
    ExportError,
    MissingDependencyError,
    ProviderError,
    StoreError,
    WrappedModelError,
)
from gnswap._export import export_onnx
from gnswap._onnx_scopes import load
from gnswap._plan import plan
from gnswap._speed import PARTS, Benchmark
from gnswap._timing import compare_speed


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(small_cnn()).eval()


@pytest.fixture(scope="module")
def model(original: nn.Module) -> nn.Module:
    return apply(original, plan(original, groups=4))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, model: nn.Module, inputs: Tensor) -> Path:
    file = tmp_path_factory.mktemp("speed") / "net.onnx"
    export_onnx(model, file, inputs, dynamic_batch=False, dynamic_size=False)
    return file


@pytest.fixture(scope="module")
def measured(
    path: Path, model: nn.Module, original: nn.Module, inputs: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Benchmark, bytes, list[float]]:
    figure, shares = tmp_path_factory.mktemp("figure") / "speed.png", list[float]()
    benchmark = benchmark_onnx(
        path,
        inputs,
        provider="cpu",
        model=model,
        original=original,
        others={"copy": Path(shutil.copy(path, figure.with_name("copy.onnx")))},
        seconds=0.3,
        threads=1,
        figure=figure,
        progress=shares.append,
    )
    return benchmark, figure.read_bytes(), shares


def test_every_file_is_timed_in_every_round(measured: tuple[Benchmark, bytes, list[float]]) -> None:
    benchmark, _, _ = measured
    assert [file.name for file in benchmark.files] == [SUBJECT, FOLDED, DEFAULT, "copy"]
    assert len({file.runs for file in benchmark.files}) == 1
    for file in benchmark.files:
        assert file.runs >= 5
        assert 0 < file.p50_ms <= file.p95_ms
        assert file.low <= file.ratio <= file.high
        assert file.images_per_second == pytest.approx(2e3 / file.p50_ms)
    assert benchmark[SUBJECT].ratio == 1.0
    with pytest.raises(KeyError):
        benchmark["nothing"]
    assert (benchmark.batch, benchmark.input_shapes, benchmark.threads) == (2, ("2x3x24x24",), 1)
    assert Benchmark.from_json(benchmark.to_json()) == benchmark
    assert not benchmark.notes


def test_the_time_has_owners(measured: tuple[Benchmark, bytes, list[float]]) -> None:
    benchmark = measured[0]
    for file in benchmark.files:
        assert tuple(file.parts) == PARTS
        assert sum(file.parts.values()) == pytest.approx(sum(row.ms for row in file.operators))
        assert {row.provider for row in file.operators} == {"CPUExecutionProvider"}
        assert file.parts["convolution"] > 0
    assert benchmark[FOLDED].parts["normalisation"] == 0  # nothing is left of the BatchNorms
    for name in (SUBJECT, DEFAULT):
        assert benchmark[name].parts["normalisation"] > 0
        norms = {row.operator for row in benchmark[name].operators if row.part == "normalisation"}
        assert "InstanceNormalization" in norms
        assert "Reshape" in norms


def test_memory_is_that_of_the_file_alone(measured: tuple[Benchmark, bytes, list[float]]) -> None:
    for file in measured[0].files:
        assert file.peak_mb is not None
        assert 0 < file.peak_mb < 200  # this process holds torch and more


def test_a_larger_batch_needs_more_memory(tmp_path: Path) -> None:
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 1000]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", ends[:1], ends[1:])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(proto, tmp_path / "relu.onnx")
    small, large = (
        _peak_memory.peak_mb(str(tmp_path / "relu.onnx"), [torch.zeros(size, 1000).numpy()], "cpu", 1)
        for size in (2, 10_000)
    )
    assert small is not None
    assert large is not None
    assert 40 < large - small < 200  # the output has 40 MB
    assert _peak_memory.peak_mb(str(tmp_path / "none.onnx"), [], "cpu", 1) is None


def test_it_is_drawn_and_progress_is_told(measured: tuple[Benchmark, bytes, list[float]]) -> None:
    _, figure, shares = measured
    assert figure.startswith(b"\x89PNG")
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_without_matplotlib(path: Path, inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"matplotlib is not installed.*pip install 'gnswap\[report\]'"):
        benchmark_onnx(path, inputs, provider="cpu", seconds=0.01, details=False, figure=tmp_path / "a.png")


def test_the_file_alone(path: Path, inputs: Tensor) -> None:
    benchmark = benchmark_onnx(path, inputs.half(), provider="cpu", seconds=0.05, threads=1, details=False)
    (file,) = benchmark.files
    assert (file.parts, file.operators, file.peak_mb) == ({}, (), None)


def test_a_network_that_torch_cannot_export_is_noted(
    path: Path, inputs: Tensor, original: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any) -> None:
        raise ExportError("no")

    monkeypatch.setattr(_plain_exports, "export_by_torch", fail)
    benchmark = benchmark_onnx(path, inputs, provider="cpu", original=original, seconds=0.01, details=False)
    assert benchmark.notes == (f"{FOLDED}: no",)
    assert [file.name for file in benchmark.files] == [SUBJECT]


def test_torch_says_why_it_cannot_export(tmp_path: Path, original: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("No ONNX function found") from ValueError("aten.odd")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"torch's own exporter cannot write.*Sequential.*found aten.odd"):
        _plain_exports.export_by_torch(original, tmp_path / "odd.onnx", (torch.ones(1, 3, 8, 8),))


def test_arguments(path: Path, inputs: Tensor, original: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=r"timing takes one batch.*found 2"):
        benchmark_onnx(path, [inputs, inputs], provider="cpu")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="seconds out of range"):
        benchmark_onnx(path, inputs, provider="cpu", seconds=0.0)
    with pytest.raises(ArgumentError, match="does not take this shape"):
        benchmark_onnx(path, inputs[:1], provider="cpu")
    with pytest.raises(WrappedModelError, match="DataParallel"):
        benchmark_onnx(path, inputs, provider="cpu", model=nn.DataParallel(original))


def test_a_figure_without_a_place_is_refused_before_anything_is_measured(
    path: Path, inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gnswap._timing.runner", None)
    with pytest.raises(StoreError, match=r"there is no .*nowhere"):
        benchmark_onnx(path, inputs, provider="cpu", figure=tmp_path / "nowhere" / "speed.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a CUDA device")
def test_no_provider_no_figures(path: Path, inputs: Tensor) -> None:
    with pytest.raises(ProviderError, match="'cuda' does not run on this machine"):
        benchmark_onnx(path, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(path: Path, model: nn.Module, original: nn.Module, inputs: Tensor, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    export_onnx(model, half, inputs, target="cuda", dtype=torch.float16, dynamic_batch=False, dynamic_size=False)
    benchmark = benchmark_onnx(path, inputs, model=model, original=original, others={"fp16": half}, seconds=1.0)
    assert {file.name for file in benchmark.files} == {SUBJECT, FOLDED, DEFAULT, GRAPHED, "fp16"}
    assert {row.provider for file in benchmark.files for row in file.operators} == {"CUDAExecutionProvider"}
    assert all(file.peak_mb is not None for file in benchmark.files if file.name != GRAPHED)


# the clock


def test_a_file_is_as_fast_as_its_copy(path: Path, inputs: Tensor, tmp_path: Path) -> None:
    twin = Path(shutil.copy(path, tmp_path / "twin.onnx"))
    ratios = [compare_speed(path, twin, inputs, provider="cpu", seconds=0.2, threads=1) for _ in range(3)]
    assert all(one.low <= one.ratio <= one.high for one in ratios)
    assert all(one.subject.p50_ms <= one.subject.p95_ms for one in ratios)
    assert 0.5 < statistics.median(one.ratio for one in ratios) < 2


def runner(step: Callable[[], Any]) -> _timing.Runner:
    return _timing.Runner("", "cpu", None, (torch.ones(1),), step)


def test_each_round_runs_every_file_once_in_changing_order() -> None:
    calls: list[int] = []
    times = _timing.in_turn([runner(lambda n=n: calls.append(n)) for n in range(3)], 0.005)  # type: ignore[misc]
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert len(set(rounds)) > 2
    assert len({len(each) for each in times}) == 1
    assert len(times[0]) >= 5


def test_a_slower_file_is_seen() -> None:
    def busy(count: int) -> Callable[[], Any]:
        return lambda: sum(range(count))

    slow, fast = _timing.in_turn([runner(busy(60_000)), runner(busy(20_000))], 0.1)
    low, middle, high = _timing.ratios(slow, fast)
    assert 2 < middle < 4.5
    assert low <= middle <= high


def test_percentiles() -> None:
    p50, p95 = _timing.p50_p95([n / 1e3 for n in range(101)])
    assert (p50, p95) == pytest.approx((50, 95))


# the profile


def event(name: str, operator: str, provider: str = "CPUExecutionProvider", dur: int = 1000) -> dict[str, Any]:
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "dur": dur,
        "args": {"op_name": operator, "provider": provider},
    }


def parts(graph: Any, *events: dict[str, Any]) -> dict[str, float]:
    rows = _onnx_profile.summarise(list(events), graph, "CPUExecutionProvider", ())
    return {part: total for part in PARTS if (total := sum(row.ms for row in rows if row.part == part))}


def test_a_node_on_another_provider_is_an_error(path: Path) -> None:
    stray = event("1/Reshape", "Reshape", "CUDAExecutionProvider")
    with pytest.raises(ProviderError, match=r"1 nodes ran elsewhere.*1/Reshape \(Reshape\) on CUDAExecutionProvider"):
        parts(load(path).graph, stray)


def test_a_copy_between_devices_is_an_error(path: Path) -> None:
    copied = event("Memcpy_token_1", "MemcpyFromHost")
    with pytest.raises(ProviderError, match=r"1 nodes ran elsewhere.*MemcpyFromHost"):
        parts(load(path).graph, copied)


def test_warm_up_is_left_out(path: Path) -> None:
    runs = [event("0/Conv", "Conv", dur=duration) for duration in (90_000, 80_000, 70_000, 1000, 3000, 2000)]
    assert parts(load(path).graph, *runs) == {"convolution": 2.0}


def test_fused_nodes_find_their_owner() -> None:
    """A Conv is the norm's only where it is the norm's own depthwise 1x1 Conv, whatever it was fused with."""
    node, array = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="0/Conv"),
        node("Mul", ["a", "s"], ["b"], name="1/Mul"),
        node("LayerNormalization", ["b", "one"], ["c"], name="1/LayerNormalization"),
        node("Conv", ["c", "g"], ["d"], name="1/Conv", group=4),
        node("Relu", ["d"], ["e"], name="2/Relu"),
        node("Add", ["e", "x"], ["y"], name="/Add"),
    ]
    weights = [array(torch.zeros(4, 4, 3, 3).numpy(), "w"), array(torch.zeros(4, 1, 1, 1).numpy(), "g")]
    graph = onnx.helper.make_graph(nodes, "g", [], [], weights)
    found = {
        name: parts(graph, event(name, operator))
        for name, operator in (
            ("b_nchwc", "Conv"),
            ("e_nchwc", "FusedConv"),
            ("ReorderOutput_token_3", "ReorderOutput"),
            ("1/LayerNormalization", "LayerNormalization"),
            ("/Add", "Add"),
            ("QuickGelu_7", "QuickGelu"),
            ("Mul_9", "Mul"),
        )
    }
    expected = ("convolution", "normalisation", "layout", "normalisation", "other", "activation", "other")
    assert [next(iter(owner)) for owner in found.values()] == list(expected)
    graph.node[2].op_type = "GroupNormalization"  # onnxruntime takes it apart into nodes without names
    assert list(parts(graph, event("Mul_9", "Mul"))) == ["normalisation"]
    assert not math.isnan(sum(parts(graph, event("Mul_9", "Mul")).values()))
