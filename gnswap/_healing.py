"""The records of healing, and its checkpoint: a directory that is always whole.

    DIR/healing.json         what is being done to what, how far it is, and what was measured
    DIR/healing.safetensors  the weights, the best weights so far, the optimizer's state, the first gains

Nothing is pickled. Randomness has no state to store: every step's is derived from the seed and the step's number.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from gnswap import _weights
from gnswap._directory import readable, refuse_foreign, replaced
from gnswap._errors import PlanError, StoreError
from gnswap._record import Record, differences

HEALING_SCHEMA_VERSION = 2
STATE_FILE, TENSOR_FILE = "healing.json", "healing.safetensors"
GROUPS = ("now", "best", "optimizer", "gain")


@dataclasses.dataclass(frozen=True)
class Look(Record):
    """One look at the photos held out.

    Attributes:
        step: optimizer steps done by then.
        loss: mean training loss since the look before; None before the first step.
        distance: mean KL(original ‖ converted) in nats of a classifier, else the squared relative error of the outputs.
        agreement: share of photos with the original's top-1 class; None for no classifier.
        seconds: since the start, of all runs together; without the time that a killed run did not save.
    """

    step: int
    loss: float | None
    distance: float
    agreement: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class HealReport(Record):
    """What healing did.

    Attributes:
        healed: whether the network is closer to its original on the photos held out. Where it is not, it was given
            back bit for bit as it was.
        verdict: the same in words, with figures.
        photos: how many it learned from.
        held_out: how many judged; it did not learn from them.
        steps: optimizer steps done; fewer than asked for where it stopped early.
        best_step: after how many of them the weights were best (of nearly equal ones the last), which are the ones that
            it has now; 0 where it was not healed.
        before, after: the figures on the photos held out, without healing and with the best weights. With
            `softness_end`, both are at that softness.
        looks: all figures on the way.
    """

    healed: bool
    verdict: str
    photos: int
    held_out: int
    steps: int
    best_step: int
    before: Look
    after: Look
    looks: tuple[Look, ...]


@dataclasses.dataclass(frozen=True)
class Job(Record):
    """What tells one healing from another; the number of processes does not.

    Attributes:
        steps, batch_size, lr, softness_end, seed: the options.
        plan, original, photos: checksums.
    """

    steps: int
    batch_size: int
    lr: float
    softness_end: float | None
    seed: int
    plan: str
    original: str
    photos: str


@dataclasses.dataclass(frozen=True)
class Progress(Record):
    """The content of healing.json.

    Attributes:
        job: what is being done.
        weights: checksums of the weights at the start and of the best ones: the network that is handed over to go on
            must have one of the two.
        softness: of each layer at the start, where it is annealed.
        scales: the size of each parameter's layer at the start.
        step: optimizer steps done.
        best_step: after how many of them the weights were best.
        stopped: why there will be no more steps; "" where there will be.
        looks: all figures so far.
        schema_version: of this record; another one is refused.
    """

    job: Job
    weights: tuple[str, ...]
    softness: dict[str, float]
    scales: tuple[float, ...]
    step: int
    best_step: int
    stopped: str
    looks: tuple[Look, ...]
    schema_version: int = HEALING_SCHEMA_VERSION


def write(directory: Path, progress: Progress, groups: dict[str, dict[str, Tensor]]) -> None:
    """Put a checkpoint in the place of the one before, as a whole.

    Args:
        directory: new, empty, or with a checkpoint in it.
        progress: what is no tensor.
        groups: for each of `GROUPS` its tensors by name.

    Raises:
        StoreError: the directory holds something else, or cannot be written.
    """
    with replaced(directory, _foreign) as fresh:
        _weights.write(fresh / TENSOR_FILE, _weights.flat(groups), {"format": "pt"})
        (fresh / STATE_FILE).write_text(progress.to_json() + "\n", encoding="utf-8")


def read(directory: Path, job: Job, weights: str) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """The checkpoint of a job; None where there is none yet.

    Args:
        directory: given to `write`.
        job: what is to be done now.
        weights: checksum of the network's weights as they are.

    Raises:
        StoreError: the directory holds something else, a checkpoint of another job, or one that cannot be read.
    """
    folder = readable(directory)
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    refuse_foreign(folder, _foreign)
    path = folder / STATE_FILE
    try:
        progress = Progress.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, PlanError) as error:
        raise StoreError(
            "the checkpoint cannot be read",
            where=str(path),
            expected="what an earlier call of gnswap.heal wrote",
            found=f"{type(error).__name__}: {error}",
            fix="Remove the directory to start anew.",
        ) from error
    if progress.schema_version != HEALING_SCHEMA_VERSION:
        raise StoreError(
            "unknown schema version",
            where=str(path),
            expected=str(HEALING_SCHEMA_VERSION),
            found=str(progress.schema_version),
        )
    different = differences(progress.job, job)
    if weights not in progress.weights:
        different.append("other weights of the converted network")
    if different:
        raise StoreError(
            "the checkpoint is of another healing",
            where=str(directory),
            found="; ".join(different),
            fix="Call it with what it began with, give another directory, or remove this one to begin anew.",
        )
    return progress, _weights.grouped(_weights.read(folder / TENSOR_FILE)[0], GROUPS)


def _foreign(directory: Path) -> str | None:
    """Why a directory must not be replaced by a checkpoint."""
    others = sorted({entry.name for entry in directory.iterdir()} - {STATE_FILE, TENSOR_FILE})
    return f"it also holds {', '.join(others[:3])}" if others else None
