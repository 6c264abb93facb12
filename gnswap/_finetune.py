"""finetune: train a converted network on labelled pictures of one's own, at any batch size from 1.

Why here at all, where everybody has a training loop: what a converted network needs is little and easily missed. No
weight decay on gamma and beta, a softness that can be lowered on the way, kept BatchNorms that stay frozen, the plan
saved with the new weights, so that the result still exports. For loops of one's own: `examples/own_loop_*.py`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gnswap import _finetuned
from gnswap._datasets import find_pictures
from gnswap._engine import PRECISIONS, Engine
from gnswap._errors import ArgumentError
from gnswap._finetuner import Finetuner
from gnswap._finetuning import FinetuneReport, Job
from gnswap._head import new_head
from gnswap._photos import data_config
from gnswap._revert import revert
from gnswap._saved import ModelSource
from gnswap._sites import applied, digest, require_plain

_LR, _LR_BATCH = 5e-4, 16
_INPUT = ("input_size", "mean", "std", "interpolation", "crop_pct")


def finetune(
    model: nn.Module,
    data: str | Path,
    output: str | Path,
    *,
    val: str | Path | float = 0.2,
    epochs: float = 10,
    batch_size: int = 8,
    accumulation: int = 1,
    lr: float | None = None,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    label_smoothing: float = 0.1,
    freeze: str = "none",
    softness_end: float | None = None,
    ema: float | None = None,
    distill: float = 0.0,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    augment: str = "light",
    head: Literal["new", "keep"] = "new",
    size: int | None = None,
    config: Mapping[str, Any] | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    workers: int = 0,
    seed: int = 0,
    source: ModelSource | None = None,
) -> FinetuneReport:
    """Fine-tune a converted network on labelled pictures, in place, and keep the best weights in a directory.

    AdamW, a learning rate that rises over the first tenth of the steps and then falls as a cosine, cross-entropy. The
    network is judged on the validation pictures after every epoch. `output` is a directory as `gnswap.save` writes it
    (best network so far; `gnswap.load`, `gnswap export`), with `last/`, `finetune.json`, `metrics.jsonl` and
    `metrics.png` beside. It is replaced as a whole after every epoch, and every two minutes inside one. Called again
    with the same arguments after a kill, fine-tuning goes on there and, on one process on the CPU, ends with the same
    bits as without the kill.

    Started by `torchrun` or `accelerate launch` (which on CPUs starts one process, whatever it is asked for), every
    process is given the same arguments and takes its share of every batch; DDP, or FSDP2 where accelerate is configured
    for it. One process with `accumulation=2` and two processes do
    the same up to rounding: no norm looks at more than its own sample. `output` must be seen by all of them.

    Args:
        model: what `gnswap.convert`, `apply` or `load` returned; it gets a new head and, during and after training,
            the best weights. fp32 or fp64.
        data: a folder with a subfolder for each class, or with `train` and `val` subfolders of this kind; or a CSV file
            with the columns `path` (relative to the file) and `label`.
        output: a new or empty directory, or the one to go on in.
        val: pictures that judge: a folder or file as for `data`, or the share of each class that is held out. Folders
            `train` and `val` inside `data` go before a share.
        epochs: passes over the training pictures.
        batch_size: pictures in one forward pass of one process.
        accumulation: forward passes of each process in an optimizer step.
        lr: the highest learning rate; by default 5e-4 · sqrt(pictures in a step / 16).
        weight_decay: of weights with two dimensions or more; never of gamma, beta, biases.
        layer_decay: factor of the learning rate from a layer to the one before it; 0.7 to 0.9 spares early layers.
        label_smoothing: share of each label that is spread over all classes.
        freeze: "none"; "norms"; "backbone", all but the head; or a module's path: it and all before it.
        softness_end: a softness that every layer is taken to in the first half of the steps; 0 ends with pure
            GroupNorm. By default the softness stays.
        ema: decay of a moving average of the weights (such as 0.999), which is then what is judged and kept.
        distill: weight of what the original network answered, with its own head, on the same pictures (Li & Hoiem,
            *Learning without Forgetting*, 2016).
        precision: of the forward and backward pass; weights stay as they are. fp16 on a GPU only. By default what
            `accelerate launch` was told, else fp32.
        augment: "none", "light" (crops, mirror images, a little colour), or a policy of timm's ("rand-m9-mstd0.5").
        head: "new", random and for the classes of the data; "keep", where the network has a fitting one.
        size: height and width of the inputs; by default the network's own.
        config: timm's data configuration, for networks that have no `pretrained_cfg`.
        unreadable: what to do about pictures that cannot be read: "refuse", or "skip" and count them.
        workers: processes that prepare pictures, beside the training.
        seed: of the split, the order, the views, the new head and dropout.
        source: how the architecture was built, as for `gnswap.save`.

    Returns:
        What came of it; the same is in `output/finetune.json`.

    Raises:
        FinetuneError: the data is not fit to learn from (an empty class, a wrong label, an unreadable picture); a loss
            or gradient is no longer finite; another process has ended; `output` holds another fine-tuning.
        ArgumentError: the model was not converted, or an option is out of range.
        CalibrationError: it is not known how pictures are prepared: give `config`.
        RevertError: with `distill`, where the model has been trained since its conversion.
        StoreError: `output` holds something else, or cannot be written.
        MissingDependencyError: accelerate is not installed.
        WrappedModelError: the model is wrapped (DDP, FSDP, torch.compile).

    Example:
        >>> import gnswap, timm
        >>> from PIL import Image
        >>> for shade in range(12):
        ...     folder = Path("photos", "dark" if shade < 6 else "bright")
        ...     folder.mkdir(parents=True, exist_ok=True)
        ...     Image.new("RGB", (32, 32), (20 * shade, 20 * shade, 99)).save(folder / f"{shade}.png")
        >>> model = gnswap.convert(timm.create_model("resnet10t")).model
        >>> report = gnswap.finetune(model, "photos", "tuned", epochs=2, batch_size=2, size=32)
        >>> report.classes, report.photos, report.held_out, report.steps
        (('bright', 'dark'), 10, 2, 10)
        >>> gnswap.load("tuned").num_classes
        2
    """
    _require_options(locals())
    _require_network(model)
    _finetuned.require_free(Path(output))
    engine = Engine(precision)
    try:
        prepared = data_config(model if config is None else config)
        inputs = {key: _plain(prepared[key]) for key in _INPUT}
        if size is not None:
            inputs["input_size"] = [inputs["input_size"][0], size, size]
        pictures = find_pictures(data, val, inputs, seed=seed, unreadable=unreadable)
        batch = batch_size * accumulation * engine.processes.count
        job = Job(
            model=f"{zlib.crc32(repr(digest(model)).encode()):08x}",
            data=pictures.key,
            epochs=float(epochs),
            batch=batch,
            batch_size=batch_size,
            lr=lr if lr is not None else _LR * math.sqrt(batch / _LR_BATCH),
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            label_smoothing=label_smoothing,
            freeze=freeze,
            softness_end=None if softness_end is None else float(softness_end),
            ema=ema,
            distill=distill,
            precision=engine.precision,
            augment=augment,
            head=head,
            input=inputs,
            seed=seed,
        )
        original = revert(model) if distill else None
        if head == "new":
            new_head(model, len(pictures.classes), seed)
            if source is not None:
                source = dataclasses.replace(source, options={**source.options, "num_classes": len(pictures.classes)})
        run = Finetuner(model, original, pictures, job, accumulation, engine, Path(output), source, workers)
        run.start()
        run.go_on()
        return run.report()
    finally:
        engine.close()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _require_network(model: nn.Module) -> None:
    require_plain(model)
    if applied(model) is None:
        raise ArgumentError(
            "this model was not converted by gnswap",
            where="finetune.model",
            expected="what gnswap.apply, convert or load returned, as a whole",
            found=type(model).__qualname__,
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(
                "half precision is too coarse to train in",
                where=f"finetune, {name}",
                found=str(parameter.dtype),
                fix="Call model.float() first, and say precision='bf16'.",
            )


def _require_options(given: dict[str, Any]) -> None:
    for name in ("epochs", "lr"):
        value = given[name]
        _require(value is None or 0 < value < math.inf, name, "above 0, finite", value)
    for name, least in (("batch_size", 1), ("accumulation", 1), ("size", 1), ("workers", 0)):
        _require(given[name] is None or given[name] >= least, name, f"{least} or more", given[name])
    for name in ("weight_decay", "distill"):
        _require(0 <= given[name] < math.inf, name, "0 or more, finite", given[name])
    _require(0 <= given["label_smoothing"] < 1, "label_smoothing", "0 or more and below 1", given["label_smoothing"])
    _require(0 < given["layer_decay"] <= 1, "layer_decay", "above 0 and up to 1", given["layer_decay"])
    _require(given["ema"] is None or 0 < given["ema"] < 1, "ema", "above 0 and below 1", given["ema"])
    for name, choices in (
        ("precision", (None, *PRECISIONS)),
        ("head", ("new", "keep")),
        ("unreadable", ("refuse", "skip")),
    ):
        _require(given[name] in choices, name, ", ".join(map(str, choices)), given[name])


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ArgumentError(f"{name} is out of range", where=f"finetune.{name}", expected=expected, found=repr(found))
