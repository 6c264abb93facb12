"""One fine-tuning, step by step: what trains, what judges, and what is kept.

Why every draw of random numbers (order, views, dropout) has a seed of its own, from the job's seed and a number: a run
that goes on from a checkpoint has nothing to restore but tensors, and takes the very steps that it would have taken.
"""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap import _finetuned
from gnswap._batches import Batches, seed_of
from gnswap._datasets import Pictures, seeded
from gnswap._engine import Engine, lost_process
from gnswap._errors import ArgumentError, FinetuneError
from gnswap._finetuning import FinetuneReport, Finetuning, Job, Judgement, TrainingPoint
from gnswap._forgetting import Memory
from gnswap._head import head_path
from gnswap._layer import FusedGroupNorm
from gnswap._norms import is_norm_like
from gnswap._param_groups import cosine, freeze, param_groups
from gnswap._progress import counted
from gnswap._revert import revert
from gnswap._running import eval_mode
from gnswap._saved import ModelSource
from gnswap._schedule import SoftnessSchedule
from gnswap._store import load

_SAVE_SECONDS = 120.0  # between two checkpoints inside an epoch
_POINTS = 200  # of the training curve
_NAMED = 4  # pictures that an error names


class Finetuner:
    """One fine-tuning: the networks, the pictures, and how far it is.

    Args:
        target: the network with its new head; it is given the best weights, again and again. A copy of it trains.
        original: the network before its conversion, where its answers are to be remembered.
        pictures: what there is to learn from.
        job: what is to be done.
        accumulation: parts of a process's share of a batch.
        engine: the processes.
        directory: where everything is written.
        source: how the architecture was built.
        workers: processes that prepare pictures.
    """

    def __init__(
        self,
        target: nn.Module,
        original: nn.Module | None,
        pictures: Pictures,
        job: Job,
        accumulation: int,
        engine: Engine,
        directory: Path,
        source: ModelSource | None,
        workers: int,
    ) -> None:
        self.target, self.pictures, self.job, self.engine = target, pictures, job, engine
        self.directory, self.source = directory, source
        self.accumulation, self.processes = accumulation, engine.processes
        self.steps = max(math.ceil(job.epochs * len(pictures.train) / job.batch), 1)
        network = copy.deepcopy(target).to(engine.device)
        network.requires_grad_(True)
        head = head_path(network) if job.freeze == "backbone" or original is not None else ""
        self.trained = freeze(network, job.freeze, head)
        self.dtype = next(p.dtype for p in network.parameters() if p.requires_grad)
        self.average = self._average_of(network)
        self.schedule: SoftnessSchedule | None = None
        if job.softness_end is not None:
            self.schedule = SoftnessSchedule(network, job.softness_end, steps=max(self.steps // 2, 1))
        optimizer = torch.optim.AdamW(param_groups(network, job.lr, job.weight_decay, job.layer_decay))
        self.rates = cosine(optimizer, self.steps)
        engine.prepare(network, optimizer)
        self.memory = None if original is None else Memory(original.to(engine.device), network, head)
        is_cuda = engine.device.type == "cuda"
        self.batches = Batches(pictures, job, self.processes.rank, self.processes.count, accumulation, workers, is_cuda)
        self.step = 0
        self.judgements: list[Judgement] = []
        self.curve: list[TrainingPoint] = []
        self.pending = [0.0, 0.0, 0.0, 0.0]
        self.best: Judgement | None = None
        self.is_kept = False  # whether the directory has the best network
        self.since, self.spent = time.perf_counter(), 0.0
        self.saved_at, self.saved_step = self.since, 0

    def _average_of(self, network: nn.Module) -> Any:
        if self.job.ema is None:
            return None
        from timm.utils.model_ema import ModelEmaV3

        if self.engine.is_sharded:
            raise ArgumentError("an average of sharded weights is not supported", where="finetune.ema", found="FSDP2")
        return ModelEmaV3(network, decay=self.job.ema, use_warmup=True, exclude_buffers=True)

    def start(self) -> None:
        """From the checkpoint where there is one, else with a first look."""
        self.processes.wait()
        if not self.processes.agree(zlib.crc32(self.job.to_json().encode())):
            raise ArgumentError(
                "the processes do not do the same",
                where="finetune",
                expected="the same network, data and options in each of them",
                fix="Do not shard the data: each process takes its share of every batch by itself.",
            )
        found = _finetuned.read(self.directory, self.job)
        self.processes.wait()  # nobody writes before all have read
        if found is None:
            self._look()
            self._save()
        else:
            self._resume(*found)

    def go_on(self) -> None:
        """Until all steps are done."""
        if self.step == self.steps:
            return
        batches = self.batches.training(self.step, self.steps)
        shown = counted("fine-tuning", self.steps, self.step, hidden=self.processes.rank > 0)
        where = lambda: f"step {self.step + 1} of {self.steps}, {self.directory} has step {self.saved_step}"  # noqa: E731
        with shown as show, lost_process(where):
            while self.step < self.steps:
                wants_save = self._one_step(batches)
                self.step += 1
                if self.schedule is not None:
                    self.schedule.step()
                if self.average is not None:
                    self.average.update(self.engine.network, step=self.step)
                if self._ends_an_epoch():
                    self._look()
                if self.judgements[-1].step == self.step or wants_save:
                    self._save()
                best = self.best.accuracy if self.best else math.nan
                show(self.step, f"fine-tuning, epoch {self._epoch():.1f}, best accuracy {best:.3f}")

    def _one_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """An optimizer step; gives whether it is time to save."""
        self.rates.step_update(self.step + 1)
        self.engine.optimizer.zero_grad()
        figures = [0.0, float(self._is_time())]
        for part in range(self.accumulation):
            x, labels = next(batches)
            x, labels = x.to(self.engine.device, self.dtype), labels.to(self.engine.device)
            number = self.processes.rank * self.accumulation + part
            with (
                self.engine.not_yet(is_last=part == self.accumulation - 1),
                seeded(seed_of(self.job, "forward", self.step, number), (self.engine.device,)),
            ):
                losses = self._losses(x, labels)
                # processes average their gradients; each has its share of the batch only
                self.engine.backward(losses.sum() * (self.processes.count / self.job.batch))
            figures[0] += float(losses.detach().double().sum()) / self.job.batch
        loss, wants_save = self.processes.sums(figures)
        norm = self.engine.grad_norm()
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.engine.precision == "fp16"):
            self._refuse_to_go_on("the loss" if not math.isfinite(loss) else "the gradient")
        self.engine.optimizer.step()
        self._note(loss, norm)
        return wants_save > 0

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of each picture of a part, `[N]`."""
        answers = self.engine.model(x)
        _require_answers(answers, len(x), len(self.pictures.classes))
        losses = F.cross_entropy(answers, labels, reduction="none", label_smoothing=self.job.label_smoothing)
        return losses if self.memory is None else losses + self.job.distill * self.memory.loss(x)

    def _note(self, loss: float, norm: float) -> None:
        counts = math.isfinite(norm)
        for place, value in enumerate((1.0, loss, float(counts), norm if counts else 0.0)):
            self.pending[place] += value
        done = self.step + 1
        if done % max(self.steps // _POINTS, 1) == 0 or done == self.steps:
            count, losses, norms, total = self.pending
            rate = max(group["lr"] for group in self.engine.optimizer.param_groups)
            self.curve.append(TrainingPoint(done, losses / count, total / norms if norms else None, rate))
            self.pending = [0.0, 0.0, 0.0, 0.0]

    def _refuse_to_go_on(self, what: str) -> None:
        rows = [row for _, row in self.batches.rows(self.step)]
        names = [self.pictures.train[row].name for row in rows[:_NAMED]]
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        raise FinetuneError(
            f"{what} is no longer finite",
            where=f"step {self.step + 1} of {self.steps}, pictures {', '.join(names)}{more}",
            fix=f"{self.directory} keeps the last good state, of step {self.saved_step}, and the best network so far. "
            "Try a lower lr in another directory.",
        )

    def _epoch(self) -> float:
        return self.step * self.job.batch / len(self.pictures.train)

    def _ends_an_epoch(self) -> bool:
        before = (self.step - 1) * self.job.batch // len(self.pictures.train)
        return math.floor(self._epoch()) > before or self.step == self.steps

    def _is_time(self) -> bool:
        return time.perf_counter() - self.saved_at > _SAVE_SECONDS

    def _look(self) -> None:
        """Judge the network as it is, and keep it where it is the best."""
        judged = self.engine.network if self.average is None else self.average.module
        _match(self.engine.network, judged)
        correct, loss = self._judge(self.engine.model if self.engine.is_sharded else judged)
        if not math.isfinite(loss):
            self._refuse_to_go_on("the loss on the validation pictures")
        count = len(self.pictures.val)
        seconds = round(self.spent + time.perf_counter() - self.since, 3)
        softness = max((layer.softness for layer in _layers(judged)), default=0.0)
        look = Judgement(self.step, self._epoch(), correct / count, loss / count, softness, seconds)
        self.judgements.append(look)
        if self.best is None or self._rank(look) > self._rank(self.best):
            self.best, self.is_kept = look, False
            weights = self.engine.weights() if self.average is None else judged.state_dict()
            self.target.load_state_dict(weights)
            _match(judged, self.target)

    def _rank(self, look: Judgement) -> tuple[float, ...]:
        """Softer networks do not count where a softness is asked for; the latest of them is kept until one does."""
        if self.schedule is not None and look.step < self.schedule.steps:
            return (0.0, look.step)
        return (1.0, look.accuracy, -look.loss)

    def _judge(self, network: nn.Module) -> tuple[float, float]:
        """How many answers are right, and the sum of the losses, over all validation pictures and processes."""
        correct, loss = 0.0, 0.0
        with eval_mode(network), torch.no_grad():
            for x, labels, counts in self.batches.judging():
                answers = network(x.to(self.engine.device, self.dtype))
                _require_answers(answers, len(x), len(self.pictures.classes))
                answers, labels = answers[:counts].double().cpu(), labels[:counts]
                correct += float((answers.argmax(1) == labels).sum())
                loss += float(F.cross_entropy(answers, labels, reduction="sum"))
        self._train()
        correct, loss = self.processes.sums([correct, loss])
        return correct, loss

    def _train(self) -> None:
        """Training mode, but for BatchNorms that the plan kept: their statistics stay, since batches may be of one."""
        self.engine.model.train()
        for module in self.engine.network.modules():
            if is_norm_like(module):
                module.eval()

    def _save(self) -> None:
        weights, moments = self.engine.state()
        self.saved_at, self.saved_step = time.perf_counter(), self.step
        done = self.step == self.steps
        if self.processes.rank == 0:
            schedule = None if self.schedule is None else self.schedule.state_dict()
            state = Finetuning(
                job=self.job,
                report=self.report(),
                softness={} if schedule is None else schedule["softness"],
                scaler=self.engine.scaler,
                pending=tuple(self.pending),
            )
            groups = {
                "now": weights,
                "average": {} if self.average is None else self.average.module.state_dict(),
                "optimizer": {f"{name}.{key}": value for name, kept in moments.items() for key, value in kept.items()},
                "gain": {} if schedule is None else schedule["gain"],
            }
            _finetuned.write(
                self.directory,
                state,
                best=None if self.is_kept else self.target,
                groups={} if done else groups,
                last=self._last(groups["average"] or weights) if done else None,
                source=self.source,
            )
        self.is_kept = True
        self.processes.wait()

    def _last(self, weights: dict[str, Tensor]) -> nn.Module:
        last = copy.deepcopy(self.target)
        last.load_state_dict(weights)
        _match(self.engine.network, last)
        return last

    def _resume(self, record: Finetuning, groups: dict[str, dict[str, Tensor]]) -> None:
        then = record.report
        self.step, self.best, self.is_kept = then.steps, then.best, True
        self.saved_step = self.step
        self.judgements, self.curve = list(then.judgements), list(then.curve)
        self.pending, self.spent = list(record.pending), then.judgements[-1].seconds
        best = load(self.directory, revert(self.target, force=True))
        self.target.load_state_dict(best.state_dict())
        _match(best, self.target)
        if then.done:
            return
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            parameter, _, key = name.rpartition(".")
            moments.setdefault(parameter, {})[key] = tensor
        self.engine.load(groups["now"], moments)
        self.engine.scaler = record.scaler
        if self.average is not None:
            self.average.module.load_state_dict(groups["average"])
        if self.schedule is not None:
            begun = {"softness": record.softness, "gain": groups["gain"], "last_step": self.step}
            self.schedule.load_state_dict({**self.schedule.state_dict(), **begun})
        self._train()

    def report(self) -> FinetuneReport:
        """How far it is."""
        before, best, last = self.judgements[0], self.best or self.judgements[0], self.judgements[-1]
        notes = list(self.pictures.notes)
        if kept := sum(is_norm_like(module) for module in self.target.modules()):
            notes.append(f"{kept} norms that the plan kept have their statistics frozen")
        if not _finetuned.can_draw():
            notes.append("no metrics.png: matplotlib is not installed (pip install 'gnswap[report]')")
        return FinetuneReport(
            verdict=f"accuracy {best.accuracy:.3f} after step {best.step} on {len(self.pictures.val)} pictures held "
            f"out ({before.accuracy:.3f} before, {last.accuracy:.3f} after step {last.step} of {self.steps})",
            done=self.step == self.steps,
            classes=self.pictures.classes,
            photos=len(self.pictures.train),
            held_out=len(self.pictures.val),
            skipped=self.pictures.skipped,
            input=self.job.input,
            trained=self.trained,
            parameters=sum(parameter.numel() for parameter in self.target.parameters()),
            batch=self.job.batch,
            lr=self.job.lr,
            precision=self.engine.precision,
            processes=self.processes.count,
            strategy=self.engine.strategy,
            steps=self.step,
            of_steps=self.steps,
            before=before,
            best=best,
            last=last,
            judgements=tuple(self.judgements),
            curve=tuple(self.curve),
            notes=tuple(notes),
        )


def _layers(network: nn.Module) -> list[FusedGroupNorm]:
    return [module for module in network.modules() if isinstance(module, FusedGroupNorm)]


def _match(network: nn.Module, other: nn.Module) -> None:
    """Give another network's layers the same softness; their gains, which are buffers, are copied elsewhere."""
    for layer, copied in zip(_layers(network), _layers(other), strict=True):
        copied._softness = layer.softness  # the property would correct the gain


def _require_answers(answers: Any, count: int, classes: int) -> None:
    shape = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
    if shape != (count, classes):
        raise ArgumentError(
            "the network does not give a number for each class",
            where="finetune.model",
            expected=f"an output of shape {(count, classes)}",
            found=str(shape),
            fix="Fine-tune a classifier, with head='new' or a head for as many classes as the data has.",
        )
