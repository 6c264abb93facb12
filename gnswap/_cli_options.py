"""Arguments and options that several commands of the command line share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn

from gnswap import _cli_models, _cli_output, _store
from gnswap._errors import ArgumentError, CalibrationError
from gnswap._head import new_head

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name such as resnet50 or tf_efficientnet_lite0.in1k, or package.module:factory, a function that "
        "returns the network; the current directory can be imported from.",
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Fetch timm's pretrained weights.")]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Load these: safetensors, or a PyTorch state dict (read without running code from it).",
    ),
]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that gnswap convert wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Rebuilt = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="The original network, as given to convert. Needed where it is no timm model: code that a file names is "
        "never run by itself.",
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option("--input", metavar="CxHxW", help="Shape of one input, such as 3x224x224. timm models know theirs."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, help="Of the CPU; onnxruntime's choice if not given. A file for 1 is another."
    ),
]
OnnxFile = Annotated[Path, typer.Argument(metavar="FILE.onnx", help="What gnswap export wrote.")]
Provider = Annotated[
    Literal["cpu", "cuda", "tensorrt"],
    typer.Option("--provider", help="Where onnxruntime runs it; a fallback to the CPU is an error."),
]


def build(name: str, *, pretrained: bool, weights: Path | None) -> nn.Module:
    """The network that MODEL names, with the weights that were asked for; says so where they are random."""
    if pretrained and weights is not None:
        raise typer.BadParameter("give --pretrained or --weights, not both")
    with _cli_output.step(f"building {name}" + (" with its pretrained weights" if pretrained else "")):
        network = _cli_models.build_model(name, pretrained=pretrained)
    if weights is not None:
        for note in _cli_models.load_weights(network, weights):
            _cli_output.note(note)
    elif not pretrained and not _cli_models.is_factory(name):
        _cli_output.note("the weights are random: give --pretrained or --weights for a network that knows something")
    _cli_models.require_finite(network, name)
    return network


def load(directory: Path, model: str | None) -> nn.Module:
    """The network of a saved conversion, in eval mode. Raises `ArgumentError` where `--model` is missing."""
    with _cli_output.step(f"loading {directory}"):
        source = _store.saved_source(directory)
        if model is None and source is not None and source.kind == "factory":
            raise ArgumentError(
                "code that a file names is not run by itself",
                where=str(directory),
                found=f"built by {source}",
                fix=f"Say that it is fine: --model {source.name}",
            )
        built = None if model is None else _cli_models.build_model(model)
        if built is not None and source is not None and source.kind == "factory" and "num_classes" in source.options:
            new_head(built, source.options["num_classes"], seed=0)  # it was fine-tuned
        network = _store.load(directory, built)
    return network.eval()


def example(network: nn.Module, shape: str | None, batch: int = 2) -> Tensor:
    """Random inputs of the shape that `--input` or the network itself names."""
    if shape is not None:
        if not all(part.isdecimal() and int(part) for part in shape.split("x")):
            raise typer.BadParameter(f"{shape!r} is no shape such as 3x224x224", param_hint="--input")
        size = tuple(map(int, shape.split("x")))
    else:
        config = getattr(network, "pretrained_cfg", None) or {}
        if "input_size" not in config:
            raise CalibrationError("it is not known what inputs this network takes", fix="Give --input, as 3x224x224.")
        size = tuple(config["input_size"])
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
