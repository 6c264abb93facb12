"""benchmark_onnx: how fast a file is, beside what one would have without gnswap."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gnswap import (
    _matplotlib,
    _onnx_profile,
    _peak_memory,
    _plain_exports,
    _providers,
    _references,
    _sites,
    _speed_figure,
    _timing,
)
from gnswap._errors import ArgumentError, ExportError
from gnswap._speed import PARTS, Benchmark, FileSpeed, Operator

SUBJECT, GRAPHED = "this file", "this file, CUDA graph"
FOLDED, DEFAULT = "original, BatchNorm folded", "GroupNorm as torch exports it"


def benchmark_onnx(
    path: str | os.PathLike[str],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    provider: str = "cuda",
    model: nn.Module | None = None,
    original: nn.Module | None = None,
    others: Mapping[str, str | os.PathLike[str]] | None = None,
    seconds: float = 10.0,
    threads: int | None = None,
    details: bool = True,
    figure: str | os.PathLike[str] | None = None,
    progress: Callable[[float], object] | None = None,
) -> Benchmark:
    """Time an ONNX file in turn with the alternatives to it, and say what the time goes to.

    All files run in one process, one run of each in every round, in an order drawn anew for every round; inputs and
    outputs are bound to the device. On CUDA the file runs a second time with its kernels recorded as a CUDA graph.

    Args:
        path: the file in question.
        inputs: one batch.
        provider: "cpu", "cuda" or "tensorrt"; every node has to run there.
        model: the network that the file was exported from. Adds torch's own export of it with plain GroupNorms.
        original: the network before its conversion. Adds torch's own export of it, the BatchNorms of which
            onnxruntime folds into the convolutions.
        others: more files by name, such as the same network in fp16. fp32 inputs are rounded to what a file takes.
        seconds: of measuring for all files together, after a warm-up of a third of that; at least 5 rounds.
            Exports, profiles and memory come on top.
        threads: of the CPU inside one operator; None leaves it to onnxruntime.
        details: whether to profile the files (a dozen runs each) and measure their memory (a process each).
        figure: a PNG file to draw the result to.
        progress: is told which share of the measuring is done.

    Returns:
        the figures of every file.

    Raises:
        ArgumentError: inputs that a file does not take, several batches, or seconds that are not positive.
        ProviderError: the provider does not run here, or not every node of every file runs on it.
        ValidationError: onnxruntime cannot run a file.
        MissingDependencyError: onnxruntime, onnx or (for the figure) matplotlib is missing.

    Example:
        >>> import tempfile, torch, gnswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), gnswap.FusedGroupNorm(2, 8))
        >>> x = torch.randn(2, 3, 16, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = gnswap.export_onnx(model, f"{folder}/net.onnx", x)
        ...     speed = gnswap.benchmark_onnx(report.path, x, provider="cpu", seconds=0.1, details=False)
        >>> speed.files[0].p50_ms <= speed.files[0].p95_ms
        True
    """
    if not 0 < seconds < float("inf"):
        raise ArgumentError("seconds out of range", where="seconds", expected="more than 0", found=repr(seconds))
    for one in (model, original):
        if one is not None:
            _sites.require_plain(one)
    if figure is not None:
        _matplotlib.require_place(figure)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {SUBJECT: os.fspath(path)}
        subject = _timing.runner(path, inputs, provider, threads=threads)
        for name, network in (
            (FOLDED, original),
            (DEFAULT, None if model is None else _plain_exports.with_plain_norms(model)),
        ):
            if network is None:
                continue
            file = Path(folder) / f"{len(files)}.onnx"
            try:
                _plain_exports.export_by_torch(network, file, subject.case)
                files[name] = str(file)
            except ExportError as error:
                notes.append(f"{name}: {error}")
        files |= {name: os.fspath(other) for name, other in (others or {}).items()}
        runners = {SUBJECT: subject} | {
            name: _timing.runner(file, inputs, provider, threads=threads)
            for name, file in files.items()
            if name != SUBJECT
        }
        if provider == "cuda":
            runners[GRAPHED] = _timing.runner(path, inputs, provider, threads=threads, cuda_graph=True)
        times = dict(zip(runners, _timing.in_turn(list(runners.values()), seconds, progress), strict=True))
        norms = () if model is None else [one for paths in _references.norm_paths(model).values() for one in paths]
        measured = tuple(
            _measured(name, runner, times, threads=threads, norms=norms, details=details and name != GRAPHED)
            for name, runner in runners.items()
        )
    benchmark = Benchmark(
        provider=provider,
        input_shapes=tuple("x".join(map(str, value.shape)) for value in subject.case),
        batch=subject.batch,
        threads=threads,
        files=measured,
        notes=tuple(notes),
        versions=_providers.versions(provider),
    )
    if figure is not None:
        _speed_figure.draw(benchmark, figure)
    return benchmark


def _measured(
    name: str,
    runner: _timing.Runner,
    times: Mapping[str, list[float]],
    *,
    threads: int | None,
    norms: tuple[str, ...] | list[str],
    details: bool,
) -> FileSpeed:
    operators: tuple[Operator, ...] = ()
    peak = None
    if details:
        operators = _onnx_profile.operators(runner.path, runner.case, runner.provider, threads=threads, norms=norms)
        if all(value.dtype != torch.bfloat16 for value in runner.case):  # numpy does not know it
            arrays = [value.cpu().numpy() for value in runner.case]
            peak = _peak_memory.peak_mb(runner.path, arrays, runner.provider, threads)
    p50, p95 = _timing.p50_p95(times[name])
    low, ratio, high = _timing.ratios(times[SUBJECT], times[name])
    return FileSpeed(
        name=name,
        path=runner.path,
        runs=len(times[name]),
        p50_ms=p50,
        p95_ms=p95,
        images_per_second=1e3 * runner.batch / p50,
        ratio=ratio,
        low=low,
        high=high,
        parts={part: sum(row.ms for row in operators if row.part == part) for part in PARTS} if operators else {},
        operators=operators,
        peak_mb=peak,
    )
