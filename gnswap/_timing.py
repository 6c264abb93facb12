"""How fast ONNX files run, beside each other.

Why in turn and not one after the other: clock speed and other processes change during a measurement, and hit
neighbours in time alike. Each round runs every file once, in an order drawn anew, and ratios are taken within rounds.
Why waiting threads sleep between runs: those of one session would spin on the cores that the next one needs.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gnswap import _providers
from gnswap._errors import ArgumentError
from gnswap._record import Record

Tick = Callable[[float], object]

_LEAST_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Speed(Record):
    """Latency of one file.

    Attributes:
        path, provider: what ran, and where.
        batch: size of axis 0 of the first input.
        runs: how many runs were timed.
        p50_ms: median time of a run in milliseconds.
        p95_ms: time that 95 % of the runs stay under.
        images_per_second: batch / median time.
    """

    path: str
    provider: str
    batch: int
    runs: int
    p50_ms: float
    p95_ms: float
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class SpeedRatio(Record):
    """Two files, run in turn.

    Attributes:
        subject, baseline: each by itself.
        ratio: median over the rounds of time(subject) / time(baseline); above 1 the subject is slower.
        low, high: quartiles of that ratio.
    """

    subject: Speed
    baseline: Speed
    ratio: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Runner:
    """A session with its inputs and outputs on the device, ready to run.

    Attributes:
        path, provider: what runs, and where.
        session: onnxruntime's.
        case: the inputs as the file takes them.
        step: one run; returns when the outputs are there.
    """

    path: str
    provider: str
    session: Any
    case: tuple[Tensor, ...]
    step: Callable[[], Any]

    @property
    def batch(self) -> int:
        """Size of axis 0 of the first input."""
        return int(self.case[0].shape[0])


def compare_speed(
    path: str | os.PathLike[str],
    baseline: str | os.PathLike[str],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    provider: str = "cuda",
    seconds: float = 4.0,
    threads: int | None = None,
) -> SpeedRatio:
    """Time two ONNX files in turn, such as the converted network and the original.

    Args:
        path: the file in question.
        baseline: what it is compared with.
        inputs: one batch.
        provider: "cpu", "cuda" or "tensorrt"; every node has to run there.
        seconds: of measuring for both together, after a warm-up of a third of that; at least 5 runs of each.
        threads: of the CPU inside one operator; None leaves it to onnxruntime.

    Raises:
        ArgumentError: inputs that a file does not take.
        ProviderError: the provider does not run here, or not every node runs on it.
    """
    runners = [runner(one, inputs, provider, threads=threads) for one in (path, baseline)]
    times = in_turn(runners, seconds)
    low, middle, high = ratios(*times)
    subject, other = (_speed(one, its_times) for one, its_times in zip(runners, times, strict=True))
    return SpeedRatio(subject=subject, baseline=other, ratio=middle, low=low, high=high)


def runner(
    path: str | os.PathLike[str],
    inputs: Tensor | tuple[Tensor, ...],
    provider: str,
    *,
    threads: int | None = None,
    cuda_graph: bool = False,
    profile: Path | None = None,
) -> Runner:
    """Open a file for timing, its inputs and outputs bound to the device.

    Args:
        path: the file.
        inputs: one batch.
        provider, threads: as in `_providers.open_session`. TF32, which CUDA uses unless told otherwise, is left on.
        cuda_graph: record all kernels of a run once and replay them, which spares the launches ("cuda" only).
        profile: where onnxruntime writes its profile; `session.end_profiling()` ends it and names the file.

    Raises:
        ArgumentError: inputs that the file does not take, or several batches.
        ProviderError: the provider does not run here, or not every node runs on it.
    """
    cases = _providers.as_cases(inputs)
    if len(cases) != 1:
        raise ArgumentError("timing takes one batch", where="inputs", expected="1 batch", found=f"{len(cases)}")
    options = {"enable_cuda_graph": "1"} if cuda_graph else {}
    if provider == "cuda":
        options["use_tf32"] = "1"
    session = _providers.open_session(
        path, provider, threads=threads, shared_cores=True, provider_options=options, profile=profile
    )
    case = _providers.fitted(session, cases[0])
    device = "cpu" if provider == "cpu" else "cuda"
    binding = session.io_binding()
    for one, value in zip(session.get_inputs(), case, strict=True):
        binding.bind_ortvalue_input(one.name, _providers.ort_value(value, device))
    for one in session.get_outputs():
        binding.bind_output(one.name, device)
    if cuda_graph:  # a graph writes to the addresses that it was recorded with
        session.run_with_iobinding(binding)
        for one, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(one.name, value)
    return Runner(os.fspath(path), provider, session, case, lambda: session.run_with_iobinding(binding))


def in_turn(runners: Sequence[Runner], seconds: float, tick: Tick | None = None) -> list[list[float]]:
    """Seconds of each run of each file: rounds of one run of every file, in an order drawn anew for each round.

    Args:
        runners: what to run.
        seconds: of measuring, after a warm-up of a third of that; at least 5 rounds.
        tick: is told after each round which share of the whole time has passed.
    """
    shuffle, begin = random.Random(0), time.perf_counter()
    kept: list[list[float]] = []
    for phase in (seconds / 3, seconds):
        kept = [[] for _ in runners]
        end = time.perf_counter() + phase
        while time.perf_counter() < end or len(kept[0]) < _LEAST_ROUNDS:
            for index in shuffle.sample(range(len(runners)), len(runners)):
                start = time.perf_counter()
                runners[index].step()
                kept[index].append(time.perf_counter() - start)
            if tick is not None:
                tick(min((time.perf_counter() - begin) / (seconds * 4 / 3), 1.0))
    return kept


def ratios(times: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of time / other over the rounds."""
    low, middle, high = statistics.quantiles([one / two for one, two in zip(times, others, strict=True)], n=4)
    return low, middle, high


def p50_p95(times: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile in milliseconds of times in seconds."""
    return 1e3 * statistics.median(times), 1e3 * statistics.quantiles(times, n=20, method="inclusive")[-1]


def _speed(runner: Runner, times: Sequence[float]) -> Speed:
    p50, p95 = p50_p95(times)
    return Speed(
        path=runner.path,
        provider=runner.provider,
        batch=runner.batch,
        runs=len(times),
        p50_ms=p50,
        p95_ms=p95,
        images_per_second=1e3 * runner.batch / p50,
    )
