"""The command line: `gnswap VERB`. Results go to stdout, progress and messages to stderr.

Why so thin: every verb is a function of the package first. Here is only what a terminal needs: names for models,
tables for records, exit codes for errors.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperGroup

import gnswap
from gnswap import (
    _cli_bench,
    _cli_explain,
    _cli_export,
    _cli_finetune,
    _cli_models,
    _cli_options,
    _cli_output,
    _cli_tables,
    _cli_validate,
)
from gnswap._cli_options import AsJson, ModelName, Pretrained, Weights
from gnswap._convert import taught
from gnswap._errors import GnswapError, NothingToSwapError
from gnswap._photos import PhotoBatches
from gnswap._store import require_free, saved_source

EXIT_ERROR, EXIT_NOTHING_TO_SWAP = 1, 3
_EXIT_CODES = (
    "Exit codes: 0 fine, 1 an error of gnswap's, 2 wrong usage, 3 nothing to swap, 4 parity failed. "
    "Results go to stdout, progress and messages to stderr."
)


class _Group(TyperGroup):
    """Turns the package's errors into one message and an exit code; anything else is a bug and shows as such."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = shlex.join(["gnswap", *args])  # for the report, which says how it came about
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GnswapError as error:
            _cli_output.stderr().print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            code = EXIT_NOTHING_TO_SWAP if isinstance(error, NothingToSwapError) else EXIT_ERROR
            raise typer.Exit(code) from None


app = typer.Typer(
    cls=_Group,
    name="gnswap",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Swap BatchNorm for GroupNorm in pretrained networks and keep what they know.\n\n"
    "The way through: inspect → convert → export → validate. The fastest look at all of it: **gnswap demo**.\n\n"
    + _EXIT_CODES,
)


def main() -> None:
    """The console script: as `app`, and a terminated process cleans up like an interrupted one."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(signum: int, frame: object) -> NoReturn:  # noqa: ARG001
    sys.exit(128 + signum)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gnswap {gnswap.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(model: ModelName, as_json: AsJson = False) -> None:
    """List every normalisation layer of a network, and why it could not be swapped where that is so.

    No weights are needed or fetched.

    **Examples**

        gnswap inspect resnet50

        gnswap inspect mypackage.models:build --json
    """
    with _cli_output.step(f"building {model}"):
        network = _cli_models.build_model(model)
    inventory = gnswap.inspect(network)
    _cli_output.result(inventory.to_dict(), _cli_tables.inventory_view(inventory), as_json)
    if not inventory.swappable:
        raise typer.Exit(EXIT_NOTHING_TO_SWAP)


app.command()(_cli_explain.explain)


@app.command()
def convert(
    ctx: typer.Context,
    model: ModelName,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Where to save; a conversion that is there is replaced."),
    ],
    pretrained: Pretrained = False,
    weights: Weights = None,
    groups: Annotated[
        str,
        typer.Option(
            "--groups",
            metavar="auto|N",
            help="Number of groups in every layer; where N does not fit a layer, the nearest that does.",
        ),
    ] = "auto",
    group_size: Annotated[
        int | None, typer.Option("--group-size", metavar="D", min=1, help="Channels in a group, instead of --groups.")
    ] = None,
    softness: Annotated[
        str,
        typer.Option(
            "--softness",
            metavar="auto|X",
            help="From 0, pure GroupNorm, towards frozen BatchNorm; 1 halves the fluctuation that GroupNorm adds.",
        ),
    ] = "auto",
    max_softness: Annotated[
        float, typer.Option("--max-softness", metavar="X", min=0.0, help="The most that --softness auto may choose.")
    ] = 1.0,
    order: Annotated[
        Literal["auto", "natural"],
        typer.Option(
            "--order",
            help="Which channels share a group: auto chooses them on the photos of --calib; natural are neighbours.",
        ),
    ] = "auto",
    fidelity: Annotated[
        float | None,
        typer.Option(
            "--fidelity",
            metavar="X",
            min=0.0,
            max=1.0,
            help="Instead of a softness: the share of photos of --calib that should keep their answer.",
        ),
    ] = None,
    absorb: Annotated[
        bool, typer.Option("--absorb", help="Let a norm compute the activation module behind it, in one pass.")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="GLOB", help="Swap only layers whose path fits. May be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="GLOB", help="Keep layers whose path fits. May be repeated."),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            "--calib",
            metavar="IMAGE_DIR",
            help="Unlabelled photos, at any depth, on which the plan is chosen and measured; 64 to 256 are enough.",
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Then give the convolutions and linear layers new weights in closed form, on the photos of --calib, "
            "without labels. A quarter of them judges.",
        ),
    ] = False,
    heal: Annotated[
        int | None,
        typer.Option(
            "--heal",
            metavar="STEPS",
            min=1,
            help="Then train the converted network for so many steps to answer as the original does, on the photos of "
            "--calib, without labels. A quarter of them judges; 1000 are a good number. The same command, called again "
            "after a kill, goes on where healing was.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Use no more than N of the photos.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Swap the BatchNorms of a network and save the result.

    Prints the decision on every layer and, with --calib, how far the converted network's answers are from the
    original's. The directory holds model.safetensors, plan.json and report.html, a page to look at (with report.json
    and figures as PNG), and appears only when it is complete.

    **Examples**

        gnswap convert resnet50 --pretrained -o resnet50-gn

        gnswap convert resnet50 --weights mine.pth --group-size 32 --calib photos/ -o resnet50-gn

        gnswap convert resnet50 --pretrained --softness 0 --calib photos/ --refit --heal 1000 -o resnet50-gn

        gnswap convert mypackage.models:build -o out --groups 8 --softness 0 --exclude 'head.*' --json
    """
    if limit is not None and calib is None:
        raise typer.BadParameter("--limit is for the photos of --calib, which is not given")
    if heal is not None and calib is None:
        raise typer.BadParameter("--heal learns from the photos of --calib, which is not given")
    if refit and calib is None:
        raise typer.BadParameter("--refit fits to the photos of --calib, which is not given")
    if fidelity is not None and calib is None:
        raise typer.BadParameter("--fidelity is judged on the photos of --calib, which is not given")
    options: dict[str, Any] = {
        "groups": _number("--groups", groups, int),
        "group_size": group_size,
        "softness": _number("--softness", softness, float),
        "max_softness": max_softness,
        "fidelity": fidelity,
        "order": order,
        "absorb": absorb,
        "include": include or None,
        "exclude": exclude or None,
    }
    require_free(output)
    network = _cli_options.build(model, pretrained=pretrained, weights=weights)
    names: tuple[str, ...] = ()
    if calib is not None:
        photos = PhotoBatches(calib, network, limit=limit, skip_unreadable=True)
        _cli_output.skipped(photos.skipped)
        options["calibration"] = _cli_output.Watched(photos, f"{photos.photos} photos")
        names = photos.names
    with _cli_output.step("converting"), _cli_output.warnings_as_notes():
        conversion = gnswap.convert(network, **options)
    if teaching := ["refitting"] * refit + [f"healing, {heal} steps"] * (heal is not None):
        with _cli_output.step(" and ".join(teaching)):
            conversion = taught(
                conversion,
                network,
                options["calibration"],
                refitting=refit,
                steps=heal,
                checkpoint=_checkpoint(output, ctx.obj),
            )
    with _cli_output.step("reporting"):
        kept = gnswap.report(
            network, conversion, options.get("calibration"), held_out=False, photo_names=names, command=ctx.obj
        )
    with _cli_output.step(f"saving to {output}"), _cli_output.warnings_as_notes():
        gnswap.save(conversion, output, source=_cli_models.source_of(model), report=kept)
    shutil.rmtree(_checkpoint(output, ctx.obj), ignore_errors=True)
    source = saved_source(output)
    data = {
        "model": model,
        "directory": str(output),
        "source": None if source is None else source.to_dict(),
        "plan": conversion.plan.to_dict(),
        "report": conversion.report.to_dict(),
    }
    views = [_cli_tables.plan_view(conversion.plan)]
    if conversion.report.fidelity is not None:
        views.append(_cli_tables.fidelity_view(conversion.report.fidelity))
    for title, done in (("Refit", conversion.report.refitting), ("Healing", conversion.report.healing)):
        if done is not None:
            views.append(f"[bold]{title}:[/] {escape(done.verdict)}.")
    seen = f"Saved to [bold]{escape(str(output))}[/]; what was kept: [bold]{escape(str(output / 'report.html'))}[/]."
    _cli_output.result(data, [*views, seen], as_json)


app.command()(_cli_export.export)
app.command()(_cli_finetune.finetune)
app.command()(_cli_validate.validate)
app.command()(_cli_bench.bench)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the converted network and the ONNX files go.")
    ] = Path("gnswap-demo"),
    as_json: AsJson = False,
) -> None:
    """The whole way on a real network: EfficientNet-Lite0, real photos, about two minutes on two cores.

    Inspects, converts without any data, compares with the two swaps that everybody tries first, saves, loads,
    exports, runs in onnxruntime, and prints parity and speed. Needs: pip install 'gnswap[demo]'

    **Examples**

        gnswap demo

        gnswap demo --out demo --json
    """
    from gnswap import _demo

    with _cli_output.warnings_as_notes():
        report = _demo.run(out, _cli_output.step)
    _cli_output.result(report.to_dict(), _demo.view(report), as_json)
    if not report.parity.passed:
        raise typer.Exit(_cli_validate.EXIT_PARITY_FAILED)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what computes the norms on this machine, which execution providers run, and why the others do not.

    **Examples**

        gnswap doctor

        gnswap doctor --json
    """
    from gnswap import _doctor

    with _cli_output.step("looking at kernels and execution providers"):
        report = _doctor.examine()
    _cli_output.result(report.to_dict(), _cli_tables.record_view(report, "this machine"), as_json)


for _command in app.registered_commands:  # every verb's help is whole by itself
    _command.epilog = _EXIT_CODES


def _checkpoint(output: Path, command: str) -> Path:
    """Where the healing of one command keeps its state until all is saved: the same command goes on from there."""
    output = output.resolve()
    return output.with_name(f".{output.name}.{zlib.crc32(command.encode()):08x}.healing")


def _number(option: str, text: str, kind: type[int] | type[float]) -> int | float | str:
    if text == "auto":
        return text
    try:
        return kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise typer.BadParameter(f"{text!r} is neither auto nor {word}", param_hint=option) from None
