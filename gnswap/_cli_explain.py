"""`gnswap explain`: where copying gamma and beta would squash a network, and what is done instead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

import gnswap
from gnswap import _cli_options, _cli_output, _cli_tables, _sites
from gnswap._cli_options import AsJson, Pretrained, Rebuilt, Weights
from gnswap._errors import ArgumentError
from gnswap._explanation import SQUASHED, Explanation, LayerSquash
from gnswap._photos import PhotoBatches
from gnswap._store import PLAN_FILE

_WORST = 12  # layers in the table of a whole network; --json has all


def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A timm name, package.module:factory, or a directory that gnswap convert wrote: then of its original, "
            "with its own plan.",
        ),
    ],
    layer: Annotated[
        str | None, typer.Argument(metavar="[LAYER]", help="Path or glob of the layers to look at, such as 'layer4.*'.")
    ] = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    groups: Annotated[
        int, typer.Option("--groups", metavar="N", min=1, help="Number of groups that the naive swap would take.")
    ] = 32,
    calib: Annotated[
        Path | None,
        typer.Option("--calib", metavar="IMAGE_DIR", help="Photos, at any depth: the figures are then for these."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", metavar="FILE.png", help="Draw the result (needs matplotlib: gnswap[report])."),
    ] = None,
    rebuilt: Rebuilt = None,
    as_json: AsJson = False,
) -> None:
    """Say where copying gamma and beta into GroupNorm would squash a network's channels, and what gnswap does instead.

    Without LAYER, the worst layers; with it, the groups of that layer: which channel is loud, which one quiet, and how
    much of what BatchNorm gives it the quiet one would keep. By the running statistics alone, or on photos.

    **Examples**

        gnswap explain resnet50 --pretrained

        gnswap explain resnet50 layer4.0.bn2 --weights mine.pth --figure layer.png

        gnswap explain resnet50-gn --calib photos/ --json
    """
    plan = None
    if (Path(model) / PLAN_FILE).is_file():
        if pretrained or weights is not None:
            raise typer.BadParameter("a saved conversion has its weights: leave --pretrained and --weights out")
        converted = _cli_options.load(Path(model), rebuilt)
        record = _sites.applied(converted)
        plan = None if record is None else record.plan
        network = gnswap.revert(converted, force=True)
    elif rebuilt is not None:
        raise ArgumentError("--model is for a saved conversion", where=model, fix="Leave it out.")
    else:
        network = _cli_options.build(model, pretrained=pretrained, weights=weights)
    photos = None if calib is None else PhotoBatches(calib, network, skip_unreadable=True)
    _cli_output.skipped(photos.skipped if photos is not None else ())
    with _cli_output.step("explaining"), _cli_output.warnings_as_notes():
        explanation = gnswap.explain(
            network,
            layer,
            groups=groups,
            plan=plan,
            calibration=None if photos is None else _cli_output.Watched(photos, f"{photos.photos} photos"),
            figure=figure,
        )
    _cli_output.result(explanation.to_dict(), _view(explanation), as_json)


def _view(explanation: Explanation) -> RenderableType:
    single = explanation.layers[0] if len(explanation.layers) == 1 else None
    table = _network_table(explanation) if single is None else _layer_table(single)
    return Group(
        table,
        "",
        *(_summary(explanation) if single is None else _layer_summary(single, explanation.samples)),
        *(f"[dim]not seen:[/] {escape(other)}" for other in explanation.unseen),
        *(f"[yellow]note:[/] {escape(note)}" for note in explanation.notes),
    )


def _network_table(explanation: Explanation) -> RenderableType:
    columns = ("C", "G", "error", "squashed", "quiet channel keeps", "beside loud", "ratio", "with gnswap: error")
    rows = []
    for layer in explanation.ranked[:_WORST]:
        worst = layer.worst
        rows.append(
            (
                escape(layer.name),
                str(layer.num_channels),
                str(layer.num_groups),
                f"{layer.error:.2f}",
                f"{layer.squashed:.0%}",
                "-" if worst is None else f"{worst.quietest}: {layer.factor[worst.quietest or 0]:.3f}",
                "-" if worst is None else str(worst.loudest),
                "-" if worst is None or worst.ratio is None else f"{worst.ratio:.0f}x",
                f"{layer.error_after:.2f}",
            )
        )
    title = f"gamma, beta into GroupNorm({explanation.groups}): worst layers"
    return _cli_tables.comparison_view(title, columns, rows)


def _summary(explanation: Explanation) -> list[str]:
    layers = explanation.layers
    off = sum(layer.error > SQUASHED for layer in layers)
    live = sum(len(layer.live) for layer in layers)
    squashed = round(sum(layer.squashed * len(layer.live) for layer in layers))
    return [
        f"The naive swap changes the output of {off} of {len(layers)} layers by more than half of its size; "
        f"{squashed} of {live} live channels keep less than half of what BatchNorm gives them.",
        *_basis(explanation.samples),
        "error: of a layer's output, root mean square, relative to what BatchNorm computes. "
        "ratio: how far the loud channel lies from the group's mean, over how far the quiet one varies.",
    ]


def _layer_table(layer: LayerSquash) -> RenderableType:
    columns = ("divided by", "loud", "its part", "by its mean", "quiet", "deviation", "ratio", "keeps", "with gnswap")
    rows = []
    for number, group in enumerate(layer.groups):
        first, last = group.channels[0], group.channels[-1]
        quiet = group.quietest
        rows.append(
            (
                f"{number}: channels {first} to {last}" if last > first else f"{number}: channel {first}",
                f"{group.deviation:.3g}",
                str(group.loudest),
                f"{group.part:.0%}",
                f"{group.by_mean:.0%}",
                *(
                    ("none alive", "-", "-", "-", "-")
                    if quiet is None or group.ratio is None
                    else (
                        str(quiet),
                        f"{layer.deviation[quiet]:.3g}",
                        f"{group.ratio:.1f}x",
                        f"{layer.factor[quiet]:.3f}",
                        f"{layer.factor_after[quiet]:.3f}",
                    )
                ),
            )
        )
    return _cli_tables.comparison_view(f"{escape(layer.name)}, naive groups", columns, rows)


def _layer_summary(layer: LayerSquash, samples: int) -> list[str]:
    return [
        f"Copied into GroupNorm({layer.num_groups}): error {layer.error:.2f} of what BatchNorm computes; "
        f"{layer.squashed:.0%} of {len(layer.live)} live channels keep less than half.",
        f"gnswap: {escape(layer.remedy)}; error {layer.error_after:.2f}.",
        *_basis(samples),
        "its part: of the group's variance that is the loud channel's; by its mean: as far as its mean makes it loud, "
        "not its variation. keeps: of what BatchNorm gives the channel; 1 is all.",
    ]


def _basis(samples: int) -> list[str]:
    if samples:
        return [f"On {samples} photos, each norm by itself on what the original network feeds it."]
    return [
        "By the running statistics: for a sample like the training set's average, on which a standardised layer "
        "makes no error. How photos differ from it shows with --calib IMAGE_DIR."
    ]
