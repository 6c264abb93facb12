"""One healing, step by step: what trains, what judges, and what is kept.

Why every draw of random numbers has a seed of its own, from the job's and the step's number: a healing that goes on
from a checkpoint then has nothing to restore but tensors, and takes the very steps that it would have taken.
"""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gnswap import _healing
from gnswap._distill import Distillation
from gnswap._errors import ArgumentError, HealingError
from gnswap._healing import HealReport, Job, Look, Progress
from gnswap._processes import Processes
from gnswap._progress import counted
from gnswap._schedule import SoftnessSchedule
from gnswap._sites import checksum
from gnswap._trial import Jury, Score, answers, parted
from gnswap._views import views

# weight of the features beside the answers; EfficientNet-Lite0, 600 steps, KL on photos of neither: .143 with 2, .109
# with 10, .106 with 30, .105 with 100
_FEATURES = 30.0
_MOST_FEATURES = 16  # layers that are listened to
_BETAS = (0.9, 0.99)
_LEAST_SCALE = 1e-3  # of a layer whose weight is 0
_WARMUP = 0.1  # share of the steps in which the learning rate rises
_LOOKS = 10  # at the photos held out
_PATIENCE = 3  # looks without a better one before it stops
_ENERGY_SAMPLES = 16
# Times the least distance so far: later weights that are no further off are taken, for they have learned more and the
# falling rate leaves less noise in them, while 2 % on a few dozen photos is chance. In 12 trials on EfficientNet-Lite0
# they were as near or nearer to the original on photos of neither (by up to 12 %).
_AS_GOOD = 1.02


class Healer:
    """One healing: the networks, the photos, and how far it is.

    Args:
        converted, original: the networks, in eval mode as long as this is used.
        names: paths of the swapped layers.
        photos: single samples `[1, ...]` of one shape.
        job: what is to be done.
        accumulation: parts of this process's share of a batch.
        checkpoint: a directory, or None.
    """

    def __init__(
        self,
        converted: nn.Module,
        original: nn.Module,
        names: Sequence[str],
        photos: Sequence[Tensor],
        job: Job,
        accumulation: int,
        checkpoint: str | Path | None,
    ) -> None:
        self.converted, self.job = converted, job
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.parameters = {name: p for name, p in converted.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.dtype = max((p.dtype for p in self.parameters.values()), key=lambda dtype: dtype.itemsize)
        self.processes = Processes(self.device)
        self.parts = accumulation * self.processes.count
        self.own_parts = range(self.processes.rank * accumulation, (self.processes.rank + 1) * accumulation)
        self.photos, judging = parted(photos)
        self.jury = Jury(original, judging)
        sample = self.photos[:: -(-len(self.photos) // _ENERGY_SAMPLES)]
        self.distillation = Distillation(
            original, converted, _some(names), sample, is_classifier=self.jury.is_classifier, features=_FEATURES
        )
        groups = [{"params": [p], "scale": _scale(converted, name)} for name, p in self.parameters.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=_BETAS, weight_decay=0.0)
        self.schedule: SoftnessSchedule | None = None
        if job.softness_end is not None:
            self.schedule = SoftnessSchedule(converted, job.softness_end, steps=max(job.steps // 2, 1))
        self.best = self._snapshot()
        self.start_weights = _crc_of(self.best)
        self.step, self.best_step, self.stopped = 0, 0, ""
        self.looks: list[Look] = []
        self.since, self.spent = time.perf_counter(), 0.0

    def start(self) -> None:
        """From the checkpoint where there is one, else with a first look."""
        with torch.no_grad():
            self.distillation.loss(self.photos[:1])  # refuses networks that do not correspond
        self.processes.wait()
        task = crc(self.job.to_json() + self.start_weights)
        if not self.processes.agree(int(task, 16)):
            raise ArgumentError(
                "the processes do not do the same",
                where="heal",
                expected="the same networks, photos and options in each of them",
                fix="Do not shard the photos: each process takes its share of every batch by itself.",
            )
        found = None if self.checkpoint is None else _healing.read(self.checkpoint, self.job, self.start_weights)
        if found is not None:
            self._resume(*found)
            return
        with self._at_the_end():
            self._look(None)
        self._save()

    def go_on(self) -> None:
        """Until all steps are done, or it got no better for a while."""
        every = max(self.job.steps // _LOOKS, 1)
        losses: list[float] = []
        with counted("healing", self.job.steps, self.step, hidden=self.processes.rank > 0) as show:
            while self.step < self.job.steps and not self.stopped:
                losses.append(self._one_step())
                self.step += 1
                if self.schedule is not None:
                    self.schedule.step()
                if self.step % every == 0 or self.step == self.job.steps:
                    self._look(sum(losses) / len(losses))
                    losses.clear()
                    if self.step < self.job.steps and self._gets_no_better(every):
                        self.stopped = f"no better since step {self.best_step}"
                    self._save()
                show(self.step, f"healing, held out {self.looks[0].distance:.3g} to {self._best_distance():.3g}")

    def report(self) -> HealReport:
        """What came of it."""
        before, after = self.looks[0], next(look for look in self.looks if look.step == self.best_step)
        figures = Score(before.distance, before.agreement).change(Score(after.distance, after.agreement))
        judged = f"on {len(self.jury.photos)} photos held out, after {self.step} steps"
        verdict = f"healed: {figures} {judged}" if self.best_step else f"not healed: nothing was better {judged}"
        return HealReport(
            healed=self.best_step > 0,
            verdict=verdict + (f" ({self.stopped})" if self.stopped else ""),
            photos=len(self.photos),
            held_out=len(self.jury.photos),
            steps=self.step,
            best_step=self.best_step,
            before=before,
            after=after,
            looks=tuple(self.looks),
        )

    def restore_best(self) -> None:
        """The best weights, at the softness that they are meant for."""
        self._put(self.best)
        if self.schedule is not None:
            self.schedule.go_to(self.schedule.steps if self.best_step else 0)

    def _one_step(self) -> float:
        """An optimizer step; gives the mean loss over the batch."""
        rate = _rate(self.step, self.job.steps) * self.job.lr
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = views(self.photos[self._rows()], self._generator(1, self.step))
        if batch.ndim == 4:  # a step of EfficientNet-Lite0 takes .25 s so on two cores, .42 s contiguous
            batch = batch.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device, dtype=self.dtype)
        for number, part in enumerate(batch.tensor_split(self.parts)):
            if number in self.own_parts and len(part):
                loss = self.distillation.loss(part) / self.job.batch_size
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach().to(total)
        mean = float(self._summed(total))
        if not math.isfinite(mean):
            raise HealingError(
                "the loss is no longer finite",
                where=f"step {self.step + 1} of {self.job.steps}",
                found=str(mean),
                fix="Try a lower lr. The network has the best weights so far.",
            )
        self.optimizer.step()
        return mean

    def _summed(self, loss: Tensor) -> Tensor:
        """Adds up the gradients and the loss over all processes."""
        if self.processes.count == 1:
            return loss
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        whole = self.processes.total(torch.cat([loss.view(1), *(grad.flatten().to(loss.dtype) for grad in grads)]))
        for grad, value in zip(grads, torch.split(whole[1:], [grad.numel() for grad in grads]), strict=True):
            grad.copy_(value.view_as(grad))
        return whole[0]

    def _rows(self) -> Tensor:
        """Which photos this step takes: every epoch goes through all of them in another order."""
        count = len(self.photos)
        first = self.step * self.job.batch_size
        epochs = range(first // count, (first + self.job.batch_size - 1) // count + 1)
        order = torch.cat([torch.randperm(count, generator=self._generator(0, epoch)) for epoch in epochs])
        skipped = first - epochs[0] * count
        return order[skipped : skipped + self.job.batch_size]

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.job.seed} {purpose} {number}".encode()))

    def _look(self, loss: float | None) -> None:
        """Judge the network as it is; keep its weights where they are the best."""
        score = self.jury.judge(answers(self.converted, self.jury.photos))
        distance, agreement = self.processes.mean([score.distance, score.agreement or 0.0])
        seconds = self.spent + time.perf_counter() - self.since
        look = Look(self.step, loss, distance, None if score.agreement is None else agreement, round(seconds, 3))
        least = min((earlier.distance for earlier in self.looks if self._counts(earlier.step)), default=math.inf)
        if self._counts(self.step) and distance < min(self.looks[0].distance, _AS_GOOD * least):
            self.best, self.best_step = self._snapshot(), self.step
        self.looks.append(look)

    def _best_distance(self) -> float:
        return next(look.distance for look in self.looks if look.step == self.best_step)

    def _counts(self, step: int) -> bool:
        """Whether the layers have the softness that is asked for after so many steps: softer ones only look better."""
        return step >= (1 if self.schedule is None else self.schedule.steps)

    def _gets_no_better(self, every: int) -> bool:
        # not before the half: while the learning rate is high, what the weights have learned hides behind its noise
        return self.step - max(self.best_step, self.job.steps // 2) >= _PATIENCE * every

    @contextlib.contextmanager
    def _at_the_end(self) -> Iterator[None]:
        """Within the block, the layers have the softness that is asked for."""
        if self.schedule is not None:
            self.schedule.go_to(self.schedule.steps)
        try:
            yield
        finally:
            if self.schedule is not None:
                self.schedule.go_to(0)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
                parameter.grad = None

    def _save(self) -> None:
        if self.checkpoint is None or self.processes.rank:
            return
        state = None if self.schedule is None else self.schedule.state_dict()
        progress = Progress(
            job=self.job,
            weights=(self.start_weights, _crc_of(self.best)),
            softness={} if state is None else state["softness"],
            scales=tuple(group["scale"] for group in self.optimizer.param_groups),
            step=self.step,
            best_step=self.best_step,
            stopped=self.stopped,
            looks=tuple(self.looks),
        )
        moments = self.optimizer.state_dict()["state"]
        groups = {
            "now": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "best": self.best,
            "optimizer": {f"{i}.{key}": tensor for i, held in moments.items() for key, tensor in held.items()},
            "gain": {} if state is None else state["gain"],
        }
        _healing.write(self.checkpoint, progress, groups)

    def _resume(self, progress: Progress, groups: dict[str, dict[str, Tensor]]) -> None:
        self._put(groups["now"])
        self.best = {name: groups["best"][name].to(parameter) for name, parameter in self.parameters.items()}
        self.start_weights = progress.weights[0]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        for group, scale in zip(self.optimizer.param_groups, progress.scales, strict=True):
            group["scale"] = scale
        self.step, self.best_step, self.stopped = progress.step, progress.best_step, progress.stopped
        self.looks, self.spent = list(progress.looks), progress.looks[-1].seconds
        if self.schedule is not None:  # the first softness, which the network has no longer where it was healed before
            begun = {"softness": progress.softness, "gain": groups["gain"], "last_step": self.step}
            self.schedule.load_state_dict({**self.schedule.state_dict(), **begun})


def _some(names: Sequence[str]) -> list[str]:
    """Every k-th layer, the last one among them.

    Why not all: on EfficientNet-Lite0 the gradient with every 4th of 49 layers has a cosine of 0.989 with that of all
    (gradients of two batches have 0.20 with each other), and a step takes two thirds of the time.
    """
    every = -(-len(names) // _MOST_FEATURES)
    return list(names[::-1][::every][::-1])


def _scale(model: nn.Module, name: str) -> float:
    """How large a parameter's layer is: the root mean square of its weight, or of the parameter where it has none.

    Why steps are measured in it: pretrained layers differ in size a hundredfold (EfficientNet-Lite0's gammas are about
    4, its last convolutions .06), and AdamW moves each by the same. In shares of their sizes, as Shazeer and Stern
    (*Adafactor*, 2018) take them, the first layers learn too: KL to the original, .197 before, comes to .123 or .109.
    """
    layer = model.get_submodule(name.rpartition(".")[0])
    weight = getattr(layer, "weight", None)
    size = (weight if isinstance(weight, Tensor) else model.get_parameter(name)).detach().square().mean().sqrt()
    return float(size) or _LEAST_SCALE


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate: linear up to 1, then as a cosine towards 0."""
    rise = max(round(_WARMUP * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1))) / 2


def crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _crc_of(weights: dict[str, Tensor]) -> str:
    return crc(str({name: checksum(tensor) for name, tensor in weights.items()}))
