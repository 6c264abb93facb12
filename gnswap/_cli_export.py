"""`gnswap export`: a converted network as one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

import gnswap
from gnswap import _cli_options, _cli_output, _cli_tables
from gnswap._cli_options import AsJson, Directory, InputShape, Rebuilt, Threads

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.onnx", help="The file to write.")],
    target: Annotated[
        Literal["portable", "cpu", "cuda", "tensorrt"],
        typer.Option("--target", help="Where it should be fastest; the operators are standard ones in any case."),
    ] = "portable",
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"] | None,
        typer.Option(
            "--dtype", help="Of weights, inputs and outputs; statistics stay in fp32. Default: the network's."
        ),
    ] = None,
    autotune: Annotated[
        bool, typer.Option("--autotune", help="Time every form of the norms on this machine and keep the fastest.")
    ] = False,
    threads: Threads = None,
    fixed_batch: Annotated[
        int | None,
        typer.Option("--fixed-batch", metavar="N", min=1, help="Only for batches of N, at the network's own size."),
    ] = None,
    fixed_size: Annotated[
        bool, typer.Option("--fixed-size", help="Only for the network's own size (or that of --input), any batch.")
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option("--opset", metavar="N", help="Of the operators, for an older or newer runtime: 18 to 24."),
    ] = None,
    model: Rebuilt = None,
    input_shape: InputShape = None,
    as_json: AsJson = False,
) -> None:
    """Write a converted network as ONNX, with dynamic batch, height and width, checked by onnx's own checker.

    **Examples**

        gnswap export resnet50-gn -o resnet50-gn.onnx

        gnswap export resnet50-gn -o resnet50-gn.onnx --target cpu --autotune

        gnswap export out -o out.onnx --model mypackage.models:build --input 3x64x64
    """
    network = _cli_options.load(directory, model)
    example = _cli_options.example(network, input_shape, fixed_batch or 2)
    with _cli_output.step(f"exporting to {output}"), _cli_output.warnings_as_notes():
        report = gnswap.export_onnx(
            network,
            output,
            example,
            target=target,
            dtype=None if dtype is None else _DTYPES[dtype],
            dynamic_batch=fixed_batch is None,
            dynamic_size=fixed_batch is None and not fixed_size,
            opset=opset,
            autotune=autotune,
            threads=threads,
        )
    _cli_output.result(report.to_dict(), _cli_tables.record_view(report, f"exported {output}"), as_json)
