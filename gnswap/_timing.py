"""How fast an ONNX file runs, alone and beside another one.

Why two files are timed in turn and not one after the other: clock speed and other processes change during a
measurement, and hit neighbours in time alike. The ratio is the median over pairs of neighbours.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gnswap import _providers
from gnswap._errors import ArgumentError
from gnswap._record import Record


@dataclasses.dataclass(frozen=True)
class Speed(Record):
    """Latency of one file.

    Attributes:
        path, provider: what ran, and where.
        batch: size of axis 0 of the first input.
        runs: how many runs were timed.
        p50_ms: median time of a run in milliseconds.
        p90_ms: time that nine of ten runs stay under.
        images_per_second: batch / median time.
    """

    path: str
    provider: str
    batch: int
    runs: int
    p50_ms: float
    p90_ms: float
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class SpeedRatio(Record):
    """Two files, run in turn.

    Attributes:
        subject, baseline: each by itself.
        ratio: median over the pairs of time(subject) / time(baseline); above 1 the subject is slower.
        low, high: quartiles of that ratio.
    """

    subject: Speed
    baseline: Speed
    ratio: float
    low: float
    high: float


def time_onnx(
    path: str | os.PathLike[str],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    provider: str = "cuda",
    seconds: float = 2.0,
    threads: int | None = None,
) -> Speed:
    """Time an ONNX file, inputs and outputs bound to the device.

    Args:
        path: the file.
        inputs: one batch.
        provider: "cpu", "cuda" or "tensorrt"; every node has to run there.
        seconds: of measuring, after a warm-up of a third of that; at least 5 runs.
        threads: of the CPU inside one operator; None leaves it to onnxruntime.

    Raises:
        ArgumentError: inputs that the file does not take.
        ProviderError: the provider does not run here, or not every node runs on it.
    """
    step, batch = _runner(path, inputs, provider, threads)
    _repeat([step], seconds / 3)
    (times,) = _repeat([step], seconds)
    return _speed(path, provider, batch, times)


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
        inputs, provider, threads: as in `time_onnx`.
        seconds: of measuring for both together.
    """
    subject, batch = _runner(path, inputs, provider, threads)
    other, _ = _runner(baseline, inputs, provider, threads)
    _repeat([subject, other], seconds / 3)
    times, baseline_times = _repeat([subject, other], seconds)
    ratios = [one / two for one, two in zip(times, baseline_times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return SpeedRatio(
        subject=_speed(path, provider, batch, times),
        baseline=_speed(baseline, provider, batch, baseline_times),
        ratio=middle,
        low=low,
        high=high,
    )


def _runner(
    path: str | os.PathLike[str], inputs: Tensor | tuple[Tensor, ...], provider: str, threads: int | None
) -> tuple[Callable[[], Any], int]:
    cases = _providers.as_cases(inputs)
    if len(cases) != 1:
        raise ArgumentError("timing takes one batch", where="inputs", expected="1 batch", found=f"{len(cases)}")
    # idle threads that spin would take the cores from the other session
    session = _providers.open_session(path, provider, threads=threads, spinning=False)
    case = _providers.fitted(session, cases[0])
    device = "cpu" if provider == "cpu" else "cuda"
    binding = session.io_binding()
    for one, value in zip(session.get_inputs(), case, strict=True):
        binding.bind_ortvalue_input(one.name, _providers.ort_value(value, device))
    for one in session.get_outputs():
        binding.bind_output(one.name, device)
    return lambda: session.run_with_iobinding(binding), int(cases[0][0].shape[0])


def _repeat(steps: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Times of each step, one after the other in turn, for that long and at least five times."""
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for step, its_times in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()  # waits for the device
            its_times.append(time.perf_counter() - start)
    return times


def _speed(path: str | os.PathLike[str], provider: str, batch: int, times: list[float]) -> Speed:
    median = statistics.median(times)
    return Speed(
        path=os.fspath(path),
        provider=provider,
        batch=batch,
        runs=len(times),
        p50_ms=1e3 * median,
        p90_ms=1e3 * statistics.quantiles(times, n=10)[-1],
        images_per_second=batch / median,
    )
