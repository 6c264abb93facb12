"""The directory of a fine-tuning: a saved network from the first look on, and what it takes to go on.

    DIR/plan.json, model.safetensors   the best network so far, as `gnswap.save` writes it: load it, export it
    DIR/finetune.json                  the job and its report
    DIR/metrics.jsonl                  the figures, line by line
    DIR/last/, metrics.png             once all steps are done: the last network, and the figures as curves
    DIR/training.safetensors           until all steps are done: weights, optimizer, average, first gains

The directory is replaced as a whole: after a kill at any moment it is one of two that were written. Nothing is pickled.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import Tensor, nn

from gnswap import _weights
from gnswap._directory import readable, refuse_foreign, replaced
from gnswap._errors import FinetuneError, MissingDependencyError, PlanError, StoreError
from gnswap._finetuning import FINETUNING_SCHEMA_VERSION, FinetuneReport, Finetuning, Job, metric_lines
from gnswap._matplotlib import require_figure
from gnswap._record import differences, on_few_lines
from gnswap._saved import ModelSource
from gnswap._store import PLAN_FILE, WEIGHTS_FILE, save

STATE_FILE, TENSOR_FILE, METRICS_FILE, FIGURE_FILE, LAST = (
    "finetune.json",
    "training.safetensors",
    "metrics.jsonl",
    "metrics.png",
    "last",
)
_OURS = {STATE_FILE, TENSOR_FILE, METRICS_FILE, FIGURE_FILE, LAST, PLAN_FILE, WEIGHTS_FILE}
GROUPS = ("now", "average", "optimizer", "gain")


def require_free(directory: Path) -> None:
    """Raise `StoreError` where the directory holds something else than a fine-tuning."""
    refuse_foreign(directory.resolve(), _foreign)


def write(
    directory: Path,
    record: Finetuning,
    *,
    best: nn.Module | None,
    groups: dict[str, dict[str, Tensor]],
    last: nn.Module | None,
    source: ModelSource | None,
) -> None:
    """Put the state of a fine-tuning in the place of the one before, as a whole.

    Args:
        directory: new, empty, or of a fine-tuning.
        record: what is no tensor.
        best: the network to keep; None where it is the one that is there.
        groups: for each of `GROUPS` its tensors by name; empty once it is done.
        last: the last network, once it is done.
        source: how the architecture was built, as for `gnswap.save`.

    Raises:
        StoreError: the directory holds something else, or cannot be written.
    """
    with replaced(directory, _foreign) as fresh:
        if best is not None:
            save(best, fresh, source=source)
        else:
            for name in (PLAN_FILE, WEIGHTS_FILE):
                _link(directory / name, fresh / name)
        if last is not None:
            save(last, fresh / LAST, source=source)
        if groups:
            _weights.write(fresh / TENSOR_FILE, _weights.flat(groups), {"format": "pt"})
        (fresh / STATE_FILE).write_text(on_few_lines(record.to_json()) + "\n", encoding="utf-8")
        (fresh / METRICS_FILE).write_text(metric_lines(record.report), encoding="utf-8")
        if record.report.done and can_draw():
            _draw(record.report, fresh / FIGURE_FILE)


def read(directory: Path, job: Job) -> tuple[Finetuning, dict[str, dict[str, Tensor]]] | None:
    """The state of a job; None where there is none yet.

    Args:
        directory: given to `write`.
        job: what is to be done now.

    Raises:
        StoreError: the directory holds something else, or what cannot be read.
        FinetuneError: it holds another fine-tuning.
    """
    folder = readable(directory)
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    refuse_foreign(folder, _foreign)
    path = folder / STATE_FILE
    try:
        record = Finetuning.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, PlanError) as error:
        raise StoreError(
            "the state of the fine-tuning cannot be read",
            where=str(path),
            expected=f"what gnswap.finetune wrote, schema version {FINETUNING_SCHEMA_VERSION}",
            found=f"{type(error).__name__}: {error}",
            fix="Remove the directory to start anew.",
        ) from error
    different = differences(record.job, job)
    if different:
        raise FinetuneError(
            "the directory holds another fine-tuning",
            where=str(directory),
            found="; ".join(different),
            fix="Call it with what it began with, or give another directory.",
        )
    tensors = {} if record.report.done else _weights.read(folder / TENSOR_FILE)[0]
    return record, _weights.grouped(tensors, GROUPS)


def can_draw() -> bool:
    """Whether there will be a figure."""
    try:
        require_figure()
    except MissingDependencyError:
        return False
    return True


def _foreign(directory: Path) -> str | None:
    names = {entry.name for entry in directory.iterdir()}
    if others := sorted(names - _OURS):
        return f"it also holds {', '.join(others[:3])}"
    return "no fine-tuning (there is no finetune.json)" if names and STATE_FILE not in names else None


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without hard links
        shutil.copy2(old, new)


def _draw(report: FinetuneReport, path: Path) -> None:
    figure = require_figure()(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    if report.curve:
        left.plot([p.step for p in report.curve], [p.loss for p in report.curve], label="training")
    steps = [look.step for look in report.judgements]
    left.plot(steps, [look.loss for look in report.judgements], "o-", markersize=3, label="validation")
    left.set(xlabel="optimizer step", ylabel="loss (nats)")
    left.legend(frameon=False)
    right.plot(steps, [look.accuracy for look in report.judgements], "o-", markersize=3, color="C1")
    right.axvline(report.best.step, linestyle=":", color="grey")
    right.set(xlabel="optimizer step", ylabel="accuracy, validation", title=f"best: {report.best.accuracy:.3f}")
    figure.savefig(path, dpi=110, metadata={"Software": None})
