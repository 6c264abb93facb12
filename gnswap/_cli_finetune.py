"""`gnswap finetune`: a saved converted network on labelled pictures of one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

import gnswap
from gnswap import _cli_options, _cli_output, _cli_tables
from gnswap._cli_options import AsJson, Directory, Rebuilt
from gnswap._finetuning import FinetuneReport
from gnswap._store import saved_source


def finetune(
    directory: Directory,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DATA",
            help="A folder with a subfolder for each class, or with train and val subfolders of this kind; or a CSV "
            "file with the columns path (relative to the file) and label.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="A new directory, or the one to go on in.")
    ],
    val: Annotated[
        str, typer.Option("--val", metavar="DATA|SHARE", help="What judges: as --data, or a share split off.")
    ] = "0.2",
    epochs: Annotated[
        float, typer.Option("--epochs", metavar="N", help="Passes over the pictures; may be a fraction.")
    ] = 10,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures in a forward pass of one process.")
    ] = 8,
    accumulation: Annotated[
        int, typer.Option("--accumulation", metavar="N", min=1, help="Forward passes in an optimizer step.")
    ] = 1,
    lr: Annotated[
        float | None,
        typer.Option("--lr", metavar="X", help="Highest learning rate. Default: 5e-4 sqrt(pictures in a step / 16)."),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", metavar="X", help="Of the weights; never of gamma, beta and biases.")
    ] = 0.05,
    layer_decay: Annotated[
        float,
        typer.Option("--layer-decay", metavar="X", help="Factor of the rate from a layer to the one before."),
    ] = 1.0,
    label_smoothing: Annotated[
        float, typer.Option("--label-smoothing", metavar="X", help="Share of each label spread over all classes.")
    ] = 0.1,
    freeze: Annotated[
        str,
        typer.Option(
            "--freeze",
            metavar="none|norms|backbone|PATH",
            help="What is not trained: backbone is all but the head, PATH a module and all before it.",
        ),
    ] = "none",
    softness_end: Annotated[
        float | None,
        typer.Option("--softness-end", metavar="X", help="Take the softness there on the way; 0 is pure GroupNorm."),
    ] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", metavar="DECAY", help="Judge and keep a moving average, such as 0.999.")
    ] = None,
    distill: Annotated[
        float,
        typer.Option(
            "--distill",
            metavar="WEIGHT",
            help="Weight, in the loss, of what the original answered on the same pictures.",
        ),
    ] = 0.0,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(
            "--precision",
            help="Of the forward and backward pass. Default: what accelerate launch was told, else fp32.",
        ),
    ] = None,
    augment: Annotated[
        str,
        typer.Option(
            "--augment",
            metavar="none|light|POLICY",
            help="How pictures are varied; POLICY is timm's, as rand-m9-mstd0.5.",
        ),
    ] = "light",
    head: Annotated[
        Literal["new", "keep"],
        typer.Option("--head", help="new: random, for the classes of DATA; keep: the network's own, where it fits."),
    ] = "new",
    size: Annotated[
        int | None,
        typer.Option(
            "--size", metavar="PIXELS", min=1, help="Height and width of the inputs. Default: the network's own."
        ),
    ] = None,
    unreadable: Annotated[
        Literal["refuse", "skip"],
        typer.Option("--unreadable", help="Pictures that cannot be read are an error, or left out and counted."),
    ] = "refuse",
    workers: Annotated[
        int,
        typer.Option(
            "--workers", metavar="N", min=0, help="Processes that prepare pictures; a GPU waits without them."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of split, order, views, new head and dropout.")] = 0,
    model: Rebuilt = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a converted network on labelled pictures, at any batch size from 1.

    OUT is a directory as convert writes it, with the best network so far: export and validate take it. Beside it stand
    last/, finetune.json (the report), metrics.jsonl and metrics.png. Give the same command again after a kill, and it
    goes on. Several processes: torchrun, or accelerate launch, which starts only one where there are no GPUs.

    **Examples**

        gnswap finetune resnet50-gn --data photos/ -o tuned --batch-size 2 --epochs 20

        gnswap finetune resnet50-gn --data list.csv --val val.csv -o tuned --softness-end 0 --ema 0.999

        torchrun --nproc-per-node 2 -m gnswap finetune resnet50-gn --data photos/ -o tuned --batch-size 1
    """
    is_first = os.environ.get("RANK", "0") == "0"
    network = _cli_options.load(directory, model)
    with _cli_output.step(f"fine-tuning on {data}"), _cli_output.warnings_as_notes():
        report = gnswap.finetune(
            network,
            data,
            output,
            val=_path_or_share(val),
            epochs=epochs,
            batch_size=batch_size,
            accumulation=accumulation,
            lr=lr,
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            label_smoothing=label_smoothing,
            freeze=freeze,
            softness_end=softness_end,
            ema=ema,
            distill=distill,
            precision=precision,
            augment=augment,
            head=head,
            size=size,
            unreadable=unreadable,
            workers=workers,
            seed=seed,
            source=saved_source(directory),
        )
    if is_first:
        _cli_output.result(report.to_dict(), _view(report, output), as_json)


def _path_or_share(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _view(report: FinetuneReport, output: Path) -> RenderableType:
    rows = [
        (f"epoch {look.epoch:g}", str(look.step), f"{look.accuracy:.3f}", f"{look.loss:.3f}", f"{look.seconds:.0f}")
        for look in report.judgements
    ]
    head = ("step", "accuracy", "loss", "seconds")
    notes = [*report.notes, *(f"skipped: {skipped}" for skipped in report.skipped)]
    return Group(
        _cli_tables.comparison_view(f"{report.photos} pictures of {len(report.classes)} classes", head, rows),
        *(f"[yellow]note:[/] {escape(note)}" for note in notes),
        f"[bold]Fine-tuned:[/] {escape(report.verdict)}.",
        f"Saved to [bold]{escape(str(output))}[/].",
    )
