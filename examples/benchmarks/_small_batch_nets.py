"""The eight ways to fine-tune that `small_batch.py` compares, and one run of one of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _elpv import SHIFTS, Cells, as_input, batches, shifted
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import Tensor, nn

import gnswap
from gnswap import _baselines, _samples

UNLABELLED = 96  # photos of the training part that "healed first" sees, without labels
WEIGHT_DECAY = 0.01
WARM_UP = 0.1  # share of the samples over which the learning rate rises
LIGHT_BATCHES = (2, 16)  # whose networks are looked at under other light: BatchNorm at its worst and at its best
REFERENCE_BATCH = 4  # the batch size that the learning rates are searched at


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs of a table have in common.

    Attributes:
        pixels: side of the photos.
        samples: photos seen in a run, whatever the batch size.
        judges: test photos that are looked at; every third of them also under other light.
        heal_steps: steps of `gnswap.heal` for "healed first".
    """

    pixels: int
    samples: int
    judges: int
    heal_steps: int

    def __str__(self) -> str:
        return f"{self.pixels} px, {self.samples} samples, {self.judges} judges, {self.heal_steps} heal steps"


def converted(model: nn.Module, **options: Any) -> nn.Module:
    """`gnswap.convert`, without the warning that narrow layers cannot have 32 groups."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*another number of groups than was asked for", UserWarning)
        return gnswap.convert(model, **options).model


def healed(model: nn.Module, train: Cells, setting: Setting, folder: Path) -> nn.Module:
    """The network converted with unlabelled photos and healed on them; made once, then read from `folder`."""
    if not folder.exists():
        photos = list(as_input(train.photos[:UNLABELLED]).split(16))
        net = converted(model, calibration=photos)
        gnswap.heal(net, model, photos, steps=setting.heal_steps)
        gnswap.save(net, folder)
    return gnswap.load(folder, model)


# Each makes a network with the ImageNet head; `Bench.network` gives it the new one.
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "BatchNorm": copy.deepcopy,
    "BatchNorm, frozen": copy.deepcopy,
    "naive GroupNorm": _baselines.naive_group_norm,
    "fresh GroupNorm": _baselines.fresh_group_norm,
    "gnswap, pure": lambda model: converted(model, softness=0.0),
    "gnswap": converted,
    "gnswap, annealed": converted,
    "gnswap, healed first": copy.deepcopy,  # `Bench` hands in the network that `healed` made
}
HEALED = "gnswap, healed first"
# Our four share one search, so that a choice among more rates is not what makes them better.
RATE_OF = {method: "gnswap" if method.startswith("gnswap") else method for method in METHODS}


class Bench:
    """The photos and the networks of one setting; everything that a run needs.

    Args:
        setting: what all runs have in common.
        parts: photos to train on, to choose the learning rate on, to test on.
        cache: where the healed network is kept.
        code: the version of the package, which the healed network belongs to.
    """

    def __init__(self, setting: Setting, parts: tuple[Cells, Cells, Cells], cache: Path, code: str) -> None:
        self.setting = setting
        self.train, self.validation, test = parts
        self.test = test[: setting.judges]
        self._folder = cache / f"small-batch-healed-{code}-{setting.pixels}-{setting.heal_steps}"
        self._model = _samples.lite0()
        self._made: dict[str, nn.Module] = {}

    def network(self, method: str, seed: int) -> nn.Module:
        """A copy of the method's network in training mode, with a new head of two classes drawn from the seed."""
        if method not in self._made:
            if method == HEALED:
                self._made[method] = healed(self._model, self.train, self.setting, self._folder)
            else:
                self._made[method] = METHODS[method](self._model)
        net = copy.deepcopy(self._made[method])
        torch.manual_seed(seed)
        net.reset_classifier(2)  # type: ignore[operator]
        net = net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if method == "BatchNorm, frozen":
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()  # statistics stay; gamma and beta are trained
        return net

    def run(self, method: str, batch: int, seed: int, lr: float, judges: Cells) -> tuple[nn.Module, dict[str, Any]]:
        """Fine-tune one network and look at `judges`: the trained network, and what to keep of the run."""
        start, cpu = time.perf_counter(), time.process_time()
        net = self.network(method, seed)
        losses = fine_tune(
            net, self.train, samples=self.setting.samples, batch=batch, lr=lr, seed=seed, anneal="annealed" in method
        )
        trained = time.process_time() - cpu
        tail = max(1, len(losses) // 10)
        row = {
            "lr": lr,
            "losses": [
                round(sum(losses[i : i + tail]) / len(losses[i : i + tail]), 4) for i in range(0, len(losses), tail)
            ],
            "diverged": not all(map(math.isfinite, losses)),
            **judged(scores(net, judges.photos), judges.labels),
            "train_cpu_s": round(trained, 2),
        }
        row |= {"cpu_s": round(time.process_time() - cpu, 2), "seconds": round(time.perf_counter() - start, 2)}
        return net, row

    def under_other_light(self, net: nn.Module) -> dict[str, dict[str, float]]:
        """Accuracy on every third test photo, as it is and changed: by change and strength."""
        judges = self.test[slice(None, None, 3)]
        light: dict[str, dict[str, float]] = {
            "none": {"0": judged(scores(net, judges.photos), judges.labels)["accuracy"]}
        }
        for shift, strengths in SHIFTS.items():
            light[shift] = {
                f"{strength:g}": judged(scores(net, shifted(judges.photos, shift, strength)), judges.labels)["accuracy"]
                for strength in strengths
            }
        return light


def learning_rate(base: float, batch: int) -> float:
    """The square-root rule: `base` is the rate at `REFERENCE_BATCH`, and grows with the root of the batch.

    Adam divides by the size of the gradient, which falls with the root of the batch where noise is most of it: Malladi
    et al., *On the SDEs and Scaling Rules for Adaptive Gradient Algorithms* (2022).
    """
    return base * math.sqrt(batch / REFERENCE_BATCH)


def optimizer_of(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW; convolutions and the head have weight decay, norms and biases do not."""
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def fine_tune(
    net: nn.Module, cells: Cells, *, samples: int, batch: int, lr: float, seed: int, anneal: bool
) -> list[float]:
    """Train in place with AdamW; the loss of every step. Stops at the first loss that is not finite.

    The learning rate rises over the first tenth of the samples and falls as a cosine to 0. With `anneal` softness goes
    to 0 in the first half of the steps.
    """
    steps = -(-samples // batch)
    optimizer = optimizer_of(net, lr)
    schedule = gnswap.SoftnessSchedule(net, 0.0, steps=max(1, steps // 2)) if anneal else None
    losses: list[float] = []
    for step, (x, labels) in enumerate(batches(cells, samples, batch, seed)):
        seen = (step + 0.5) / steps
        share = seen / WARM_UP if seen < WARM_UP else (1 + math.cos(math.pi * (seen - WARM_UP) / (1 - WARM_UP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        loss = nn.functional.cross_entropy(net(x), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return losses


@torch.no_grad()
def scores(net: nn.Module, photos: Tensor) -> Tensor:
    """How much more the network believes in a defect than in none, `[N]`; 0 where it says no number any more."""
    net.eval()
    logits = torch.cat([net(as_input(part)) for part in photos.split(32)])
    return (logits[:, 1] - logits[:, 0]).nan_to_num()


def judged(score: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy, balanced accuracy, area under the ROC curve, and which photos were right (bits, as hex)."""
    hits = (score > 0).long() == labels
    return {
        "photos": len(labels),
        "accuracy": float(hits.double().mean()),
        "balanced_accuracy": float(balanced_accuracy_score(labels, score > 0)),
        "auc": float(roc_auc_score(labels, score)),
        "hits": np.packbits(hits.numpy()).tobytes().hex(),
    }
