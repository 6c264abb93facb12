"""Speed as data: how long ONNX files take, run in turn on one machine, and what they spend the time on."""

from __future__ import annotations

import dataclasses

from gnswap._record import Record

PARTS = ("convolution", "normalisation", "activation", "layout", "other")
"""What the time of a network goes to; matrix products count as convolutions."""


@dataclasses.dataclass(frozen=True)
class Operator(Record):
    """What all nodes of one operator took, by onnxruntime's profile.

    Attributes:
        operator: its type.
        part: one of `PARTS`.
        provider: where they ran.
        nodes: how many of them.
        ms: of all of them, in one run.
    """

    operator: str
    part: str
    provider: str
    nodes: int
    ms: float


@dataclasses.dataclass(frozen=True)
class FileSpeed(Record):
    """One file.

    Attributes:
        name: what it is.
        path: of the file.
        runs: how many were timed.
        p50_ms, p95_ms: the time of a run in milliseconds that half and 95 % of the runs stay under.
        images_per_second: batch / median time.
        ratio: how many times as long as this file the first one takes: median over the rounds, each with one run of
            every file. 1 for the first itself; above 1 the first is slower than this.
        low, high: quartiles of that ratio.
        parts: milliseconds a run by `PARTS`, from onnxruntime's profile, which itself costs time; empty where the
            file was not profiled.
        operators: the same in detail, slowest first.
        peak_mb: the most memory that loading and three runs needed, in a process of its own (on a GPU: of the GPU's
            memory), in MB; None where it could not be measured.
    """

    name: str
    path: str
    runs: int
    p50_ms: float
    p95_ms: float
    images_per_second: float
    ratio: float
    low: float
    high: float
    parts: dict[str, float]
    operators: tuple[Operator, ...]
    peak_mb: float | None


@dataclasses.dataclass(frozen=True)
class Benchmark(Record):
    """Several ONNX files, run in turn.

    Attributes:
        provider: where; every node ran there.
        input_shapes: of one run.
        batch: size of axis 0 of the first input.
        threads: of the CPU inside one operator; None is onnxruntime's choice.
        files: the file in question first.
        notes: what was left out, and why.
        versions: of torch and onnxruntime, and the device where there is one.
    """

    provider: str
    input_shapes: tuple[str, ...]
    batch: int
    threads: int | None
    files: tuple[FileSpeed, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]

    def __getitem__(self, name: str) -> FileSpeed:
        """A file by its name; raises `KeyError` where there is none."""
        for file in self.files:
            if file.name == name:
                return file
        raise KeyError(name)
