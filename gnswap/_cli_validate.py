"""`gnswap validate`: an exported file in onnxruntime beside the converted network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

import gnswap
from gnswap import _cli_options, _cli_output, _cli_tables
from gnswap._cli_options import AsJson, Directory, InputShape, OnnxFile, Provider, Rebuilt
from gnswap._parity import Parity
from gnswap._photos import PhotoBatches

EXIT_PARITY_FAILED = 4


def validate(
    file: OnnxFile,
    directory: Directory,
    provider: Provider = "cuda",
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="DIR", help="Photos to compare on, at any depth; random numbers where not given."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Use no more than N of the photos.")] = 16,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", min=1, help="Images in one run, for files that take only so many."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare every norm as well and name the first that departs.")
    ] = False,
    original: Annotated[
        bool,
        typer.Option("--original", help="Say how often the top-1 answer is that of the network before its conversion."),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", metavar="X", help="A bound of your own, relative to the largest output."),
    ] = None,
    model: Rebuilt = None,
    input_shape: InputShape = None,
    as_json: AsJson = False,
) -> None:
    """Run an exported file in onnxruntime and compare it with the converted network. Exit code 4 where they differ.

    The truth is the network in fp64; what torch itself loses in the file's precision sets how much the file may.
    Other batches and sizes are tried where the file allows them, and inputs on which careless norms fail.

    **Examples**

        gnswap validate resnet50-gn.onnx resnet50-gn --provider cpu

        gnswap validate resnet50-gn.onnx resnet50-gn --provider tensorrt --images photos/ --layers --json
    """
    network = _cli_options.load(directory, model)
    inputs: Any = _cli_options.example(network, input_shape, batch or 2)
    if images is not None:
        photos = PhotoBatches(images, network, batch_size=batch or min(16, limit), limit=limit, skip_unreadable=True)
        _cli_output.skipped(photos.skipped)
        # a last batch that is not full is nothing for a file of one batch size
        inputs = [photo_batch for photo_batch in photos if batch is None or len(photo_batch) == batch]
    before = gnswap.revert(network) if original else None
    with _cli_output.step(f"running {file} on {provider}"), _cli_output.warnings_as_notes():
        parity = gnswap.validate_onnx(
            file, network, inputs, provider=provider, tolerance=tolerance, layers=layers, original=before
        )
    _cli_output.result(
        {**parity.to_dict(), "passed": parity.passed}, _view(parity, f"{file} against {directory}"), as_json
    )
    if not parity.passed:
        _cli_output.stderr().print("[bold red]parity failed[/]")
        raise typer.Exit(EXIT_PARITY_FAILED)


def _view(parity: Parity, title: str) -> RenderableType:
    columns = ("shape", "error", "torch's own", "allowed", "top-1 as torch", "top-1 as original", "passed")
    rows = [
        (
            escape(f"{row.name}, {row.inputs}"),
            " ".join(row.input_shapes),
            _figure(row.relative_error if row.error is None else row.error),
            _figure(row.torch_error),
            _figure(row.bound),
            _share(row.top1_agreement),
            _share(row.top1_original),
            _verdict(row.passed),
        )
        for row in parity.outputs
    ]
    parts = [_cli_tables.comparison_view(escape(title), columns, rows)]
    if parity.layers:
        shown = sorted(parity.layers, key=lambda layer: layer.bound / layer.error if layer.error else float("inf"))[:8]
        layers = [
            (
                escape(layer.name),
                "x".join(map(str, layer.shape)),
                *map(_figure, (layer.error, layer.torch_error, layer.bound)),
                _verdict(layer.passed),
            )
            for layer in shown
        ]
        head = ("shape", "error", "torch's own", "allowed", "passed")
        parts += ["", _cli_tables.comparison_view(f"{len(shown)} of {len(parity.layers)} norms", head, layers)]
    return Group(*parts, "", *_remarks(parity))


def _remarks(parity: Parity) -> list[str]:
    nodes = sum(placed.nodes for placed in parity.placement)
    lines = [
        f"Errors are relative to the largest output, against torch in fp64. {parity.precision}, {nodes} nodes, "
        f"all on {', '.join(sorted({placed.provider for placed in parity.placement}))}."
    ]
    departure = parity.first_departure
    if departure is not None:
        lines.append(
            f"[bold red]The first norm that departs: {escape(departure.name)}[/], by {departure.error:.1e} "
            f"({departure.bound:.1e} allowed)."
        )
    elif parity.layers:
        lines.append("Every norm that was compared is within its bound.")
    return [*lines, *(f"[yellow]note:[/] {escape(note)}" for note in parity.notes)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _verdict(passed: bool) -> str:
    return "yes" if passed else "[bold red]NO[/]"
