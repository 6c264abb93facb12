"""The records of fine-tuning: the job, what was measured on the way, and the report."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from gnswap._record import Record

FINETUNING_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TrainingPoint(Record):
    """The training of a stretch of steps.

    Attributes:
        step: optimizer steps done by then; the figures are means over those since the point before.
        loss: mean loss of a picture.
        grad_norm: of the step's gradient; None where fp16 skipped every step.
        lr: of the last step, at the head.
    """

    step: int
    loss: float
    grad_norm: float | None
    lr: float


@dataclasses.dataclass(frozen=True)
class Judgement(Record):
    """One look at the validation pictures.

    Attributes:
        step, epoch: how far training was.
        accuracy: share of pictures whose class is the network's first answer.
        loss: mean cross-entropy, nats, without label smoothing.
        softness: the largest of the network's layers at that time.
        seconds: since the start, of all runs together; without the time that a killed run did not save.
    """

    step: int
    epoch: float
    accuracy: float
    loss: float
    softness: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class FinetuneReport(Record):
    """What fine-tuning did.

    Attributes:
        verdict: in words, with figures.
        done: whether all steps are done; what is written on the way says no.
        classes: names of the network's outputs, in their order.
        photos: how many it learns from.
        held_out: how many judge.
        skipped: pictures that cannot be read, with the reason.
        input: how pictures are prepared: size, mean, std, interpolation, crop.
        trained: parameters that were trained, of `parameters` in all.
        batch: pictures in an optimizer step.
        lr: the highest learning rate.
        precision: fp32, bf16 or fp16.
        processes: how many worked on it (in the last run); `strategy` says how.
        steps: optimizer steps done, of `of_steps`.
        before: the network with its new head before the first step.
        best, last: the figures of the network that is kept, and of the last one. With a softness that is annealed,
            only networks that have arrived there can be the best.
        judgements, curve: all figures on the way.
        notes: what the user should know.
    """

    verdict: str
    done: bool
    classes: tuple[str, ...]
    photos: int
    held_out: int
    skipped: tuple[str, ...]
    input: dict[str, Any]
    trained: int
    parameters: int
    batch: int
    lr: float
    precision: str
    processes: int
    strategy: str
    steps: int
    of_steps: int
    before: Judgement
    best: Judgement
    last: Judgement
    judgements: tuple[Judgement, ...]
    curve: tuple[TrainingPoint, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job(Record):
    """What tells one fine-tuning from another; the number of processes does not, as long as `batch` is the same.

    Attributes:
        model, data: checksums.
        batch: pictures in an optimizer step, over all processes and parts.
        The others: see `gnswap.finetune`.
    """

    model: str
    data: str
    epochs: float
    batch: int
    batch_size: int
    lr: float
    weight_decay: float
    layer_decay: float
    label_smoothing: float
    freeze: str
    softness_end: float | None
    ema: float | None
    distill: float
    precision: str
    augment: str
    head: str
    input: dict[str, Any]
    seed: int


@dataclasses.dataclass(frozen=True)
class Finetuning(Record):
    """The content of finetune.json.

    Attributes:
        job: what is being done.
        report: how far it is.
        softness: of each layer at the start, where it is annealed.
        scaler: the state of the gradient scaler of fp16.
        pending: sums of the training figures since the last point: steps, loss, counted norms, norm.
        schema_version: of this record; another one is refused.
    """

    job: Job
    report: FinetuneReport
    softness: dict[str, float]
    scaler: dict[str, float]
    pending: tuple[float, ...]
    schema_version: int = FINETUNING_SCHEMA_VERSION


def metric_lines(report: FinetuneReport) -> str:
    """The figures as JSON lines in order of their step: kind "train" or "val" and the fields of the record."""
    rows: list[tuple[int, int, str, Record]] = [(point.step, 0, "train", point) for point in report.curve]
    rows += [(look.step, 1, "val", look) for look in report.judgements]
    ordered = sorted(rows, key=lambda row: row[:2])
    return "".join(json.dumps({"kind": kind, **record.to_dict()}) + "\n" for _, _, kind, record in ordered)
