"""`gnswap bench`: how fast an exported file is, beside what one would have without gnswap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.markup import escape

import gnswap
from gnswap import _cli_options, _cli_output, _cli_tables
from gnswap._cli_options import AsJson, Directory, InputShape, OnnxFile, Provider, Rebuilt, Threads
from gnswap._speed import PARTS, Benchmark


def bench(
    file: OnnxFile,
    directory: Directory,
    provider: Provider = "cuda",
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Images in one run.")] = 1,
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.1, help="Seconds of measuring, for all files together.")
    ] = 10.0,
    other: Annotated[
        list[Path] | None,
        typer.Option("--other", metavar="FILE.onnx", help="Time this file as well, such as an fp16 one. Repeatable."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", metavar="FILE.png", help="Draw the result (needs matplotlib: gnswap[report])."),
    ] = None,
    model: Rebuilt = None,
    input_shape: InputShape = None,
    as_json: AsJson = False,
) -> None:
    """Time an exported file in onnxruntime, in turn with the alternatives.

    These are the original with its BatchNorms folded into the convolutions, and the same network with plain
    GroupNorms as torch exports it. Says what the time goes to and how much memory each file needs.

    **Examples**

        gnswap bench resnet50-gn.onnx resnet50-gn --provider cpu --threads 2

        gnswap bench resnet50-gn.onnx resnet50-gn --batch 8 --other resnet50-gn-fp16.onnx --figure speed.png
    """
    network = _cli_options.load(directory, model)
    inputs = _cli_options.example(network, input_shape, batch)
    with _cli_output.step(f"timing {file} on {provider}"), _cli_output.warnings_as_notes():  # noqa: SIM117
        with _cli_output.bar("measuring") as progress:
            benchmark = gnswap.benchmark_onnx(
                file,
                inputs,
                provider=provider,
                model=network,
                original=gnswap.revert(network, force=True),  # only its speed counts
                others={str(path): path for path in other or ()},
                seconds=seconds,
                threads=threads,
                figure=figure,
                progress=progress,
            )
    _cli_output.result(benchmark.to_dict(), _view(benchmark, str(file)), as_json)


def _view(benchmark: Benchmark, title: str) -> RenderableType:
    columns = ("ms a run", "95 %", "images/s", "this file takes", "quartiles", "peak MB")
    rows = [
        (
            escape(file.name),
            f"{file.p50_ms:.3g}",
            f"{file.p95_ms:.3g}",
            f"{file.images_per_second:.4g}",
            f"{file.ratio:.2f}x",
            f"{file.low:.2f}-{file.high:.2f}",
            "-" if file.peak_mb is None else f"{file.peak_mb:.0f}",
        )
        for file in benchmark.files
    ]
    parts = [
        (
            escape(file.name),
            *(f"{file.parts[part]:.2f} ({file.parts[part] / sum(file.parts.values()):.0%})" for part in PARTS),
        )
        for file in benchmark.files
        if file.parts
    ]
    threads = "" if benchmark.threads is None else f", {benchmark.threads} thread{'s' * (benchmark.threads > 1)}"
    where = f"{benchmark.provider}{threads}, input {', '.join(benchmark.input_shapes)}"
    return Group(
        _cli_tables.comparison_view(escape(title), columns, rows),
        "",
        _cli_tables.comparison_view("where the time goes, ms a run by the profile", PARTS, parts),
        "",
        f"{where}; {benchmark.files[0].runs} rounds of one run of every file.",
        *(f"[yellow]note:[/] {escape(note)}" for note in benchmark.notes),
    )
