"""The main job from end to end on a real network: what `gnswap demo` runs and the README shows.

Why this network and these photos: EfficientNet-Lite0 with its ImageNet weights and 20 labelled ImageNet photos are
ordinary packages, so every figure can be had again on any machine, without a model hub and without a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from torch import Tensor, nn

from gnswap import _baselines, _cli_tables, _samples
from gnswap._convert import convert
from gnswap._errors import StoreError
from gnswap._export import export_onnx
from gnswap._fidelity import Fidelity, compare
from gnswap._inspect import inspect
from gnswap._onnx_graph import require_onnx
from gnswap._parity import Parity
from gnswap._photos import PhotoBatches
from gnswap._providers import require_onnxruntime
from gnswap._record import Record
from gnswap._report.verb import report as make_report
from gnswap._revert import revert
from gnswap._store import load, save
from gnswap._timing import SpeedRatio, compare_speed
from gnswap._validate import validate_onnx

Step = Callable[[str], contextlib.AbstractContextManager[None]]

_BATCH = 8
_BATCH_SIZES = (1, 8)
_SECONDS = 4.0  # of timing for each batch size


@dataclasses.dataclass(frozen=True)
class Method(Record):
    """One way to swap, and how far the network's answers are from the original's afterwards."""

    name: str
    fidelity: Fidelity


@dataclasses.dataclass(frozen=True)
class DemoReport(Record):
    """What the demo measured.

    Attributes:
        network: timm's name of the network.
        norm_layers, swapped: how many BatchNorms it has, and how many of them are GroupNorms now.
        methods: the ways to swap, side by side.
        bit_equal_after_load: whether the saved and loaded network gives the same bits.
        reverts_exactly: whether `gnswap.revert` on the loaded network gives the original's weights bit for bit.
        parity: onnxruntime against the converted torch network.
        speed: the converted network in turn with the BatchNorm original, exported in the same way.
        files: what was written, by what it is.
        seconds: how long it all took.
    """

    network: str
    norm_layers: int
    swapped: int
    methods: tuple[Method, ...]
    bit_equal_after_load: bool
    reverts_exactly: bool
    parity: Parity
    speed: tuple[SpeedRatio, ...]
    files: dict[str, str]
    seconds: float


def run(out: Path, step: Step) -> DemoReport:
    """Do the whole job.

    Args:
        out: a directory for the files; made if need be, what else is in it stays.
        step: is told what is being done, as a context manager around it.

    Raises:
        MissingDependencyError: one of the packages of `gnswap[demo]` is not installed.
        StoreError: `out` cannot be written.
    """
    start = time.perf_counter()
    require_onnx()  # late is a bad time to learn that it is missing
    require_onnxruntime()
    _make_folder(out)
    saved, exported, original_onnx = out / "lite0-gn", out / "lite0-gn.onnx", out / "lite0-bn.onnx"
    with step("EfficientNet-Lite0 and the photos out of their packages"):
        original = _samples.lite0()
        batches = _labelled_batches(original)
    inventory = inspect(original)
    with step("converting without any data"):
        conversion = convert(original)
    methods = []
    for name, make in _ways(original, conversion.model):
        with step(f"comparing on {sum(len(x) for x, _ in batches)} photos: {name}"):
            methods.append(Method(name, compare(original, make(), batches, layers=False)))
    x = batches[0][0]
    with step("measuring what each lever keeps, for the report"):
        names = [photo.name for photo in _samples.sample_photos()]
        kept = make_report(original, conversion, batches, held_out=True, photo_names=names, command="gnswap demo")
    with step("saving, loading, reverting"):
        save(conversion, saved, report=kept)
        loaded = load(saved)
        with torch.no_grad():
            bit_equal = torch.equal(loaded(x), conversion.model(x))
        reverted = revert(loaded)
    with step("exporting the converted network to ONNX"):
        export_onnx(loaded, exported, x[:2])
    with step("exporting the original in the same way"):
        export_onnx(original, original_onnx, x[:2])
    with step("running it in onnxruntime"):
        parity = validate_onnx(exported, loaded, x, provider="cpu")
    with step("timing both in onnxruntime"):
        speed = tuple(
            compare_speed(exported, original_onnx, x[:size], provider="cpu", seconds=_SECONDS) for size in _BATCH_SIZES
        )
    return DemoReport(
        network="tf_efficientnet_lite0",
        norm_layers=len(inventory.sites),
        swapped=conversion.report.swapped,
        methods=tuple(methods),
        bit_equal_after_load=bit_equal,
        reverts_exactly=_same_state(reverted, original),
        parity=parity,
        speed=speed,
        files={
            "converted network": str(saved),
            "what was kept": str(saved / "report.html"),
            "ONNX": str(exported),
            "original as ONNX": str(original_onnx),
        },
        seconds=round(time.perf_counter() - start, 1),
    )


def view(report: DemoReport) -> RenderableType:
    """The report for a terminal."""
    first, yes = report.methods[0].fidelity, {True: "yes", False: "[red]NO[/]"}
    rows = [
        (
            method.name,
            f"{method.fidelity.agreement or 0:.3f}",
            f"{method.fidelity.agreement_sure or 0:.3f}",
            f"{method.fidelity.kl or 0:.3f}",
            f"{method.fidelity.accuracy_converted or 0:.2f}",
        )
        for method in report.methods
    ]
    columns = ("same top-1", f"where sure ({first.sure})", "KL", f"accuracy ({first.labelled} labelled)")
    speed = [
        (
            f"batch {pair.subject.batch}",
            *(f"{one.p50_ms / one.batch:.1f}" for one in (pair.baseline, pair.subject)),
            f"{pair.ratio:.2f}x",
        )
        for pair in report.speed
    ]
    parity = [
        (
            f"{one.inputs}, {one.input_shapes[0]}",
            *(f"{error or 0:.1e}" for error in (one.error, one.torch_error, one.bound)),
            yes[one.passed],
        )
        for one in report.parity.outputs
    ]
    return Group(
        f"[bold]{report.network}[/], ImageNet weights: {report.swapped} of {report.norm_layers} BatchNorms swapped.\n",
        _cli_tables.comparison_view(f"against the original, {first.photos} real photos", columns, rows),
        f"\nThe original itself: accuracy {first.accuracy_original or 0:.2f}. No data was used, nothing was trained.\n",
        f"Saved, loaded: outputs bit-equal: {yes[report.bit_equal_after_load]}. "
        f"Reverted: the original bit for bit: {yes[report.reverts_exactly]}.\n",
        _cli_tables.comparison_view(
            "parity: relative error against torch in fp64",
            ("onnxruntime (CPU)", "torch fp32", "allowed", "passed"),
            parity,
        ),
        "",
        _cli_tables.comparison_view("ms an image, onnxruntime (CPU)", ("BatchNorm", "GroupNorm", "ratio"), speed),
        "",
        *(f"{name}: [bold]{escape(path)}[/]" for name, path in report.files.items()),
        f"[dim]{report.seconds} s[/]",
    )


def _ways(original: nn.Module, converted: nn.Module) -> list[tuple[str, Callable[[], nn.Module]]]:
    return [
        ("fresh GroupNorm, 32 groups", lambda: _baselines.fresh_group_norm(original, 32)),
        ("naive copy of gamma and beta, 32 groups", lambda: _baselines.naive_group_norm(original, 32)),
        ("gnswap, 32 groups, softness 0", lambda: _quiet(original, groups=32, softness=0.0)),
        ("gnswap, 8 groups, softness 0", lambda: _quiet(original, groups=8, softness=0.0)),
        ("gnswap as it comes", lambda: converted),
    ]


def _quiet(original: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        # 32 groups leave narrow layers too few channels; that they get fewer groups is no news in a comparison
        warnings.filterwarnings("ignore", message=".*another number of groups", category=UserWarning)
        return convert(original, **options).model


def _labelled_batches(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    photos = _samples.sample_photos()
    labels = torch.tensor([-1 if photo.label is None else photo.label for photo in photos])
    batches = PhotoBatches([photo.image for photo in photos], network, batch_size=_BATCH)
    return list(zip(batches, torch.split(labels, _BATCH), strict=True))


def _same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError("the directory cannot be made", where=str(out), found=str(error)) from error
