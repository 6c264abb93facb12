"""What the eight scripts share: one command line, one look of tables and figures, and real features of real photos."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from gnswap import _samples
from gnswap._cli_output import result
from gnswap._cli_tables import comparison_view
from gnswap._matplotlib import require_figure
from gnswap._photos import PhotoBatches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FIGURES = Path(__file__).parent / "figures"

# Okabe and Ito's colours, which every kind of colour blindness tells apart; the same thing has the same one everywhere.
BATCHNORM, NAIVE, GNSWAP, OTHER, BLACK = "#d55e00", "#cc79a7", "#0072b2", "#009e73", "#222222"
YELLOW = "#e69f00"


class Table(NamedTuple):
    """A small table: title of the first column, the other columns, rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, ...]]


def main(principle: ModuleType, arguments: Sequence[str] | None = None) -> None:
    """Measure, print, draw, and only then check, so that a claim that fails can be looked at.

    Args:
        principle: a script with `measure(smoke)`, `table(found)`, `draw(found, figure)` and `check(found)`, and `SIZE`,
            the figure's in inches.
        arguments: of the command line.
    """
    name = Path(str(principle.__file__)).stem
    parser = argparse.ArgumentParser(description=principle.__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a faster run on less data; draws only with --out")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help=f"the figure; default figures/{name}.png")
    options = parser.parse_args(arguments)
    out = options.out or (None if options.smoke else FIGURES / f"{name}.png")
    torch.manual_seed(0)
    print(str(principle.__doc__).strip(), "\n")
    found: Any = principle.measure(options.smoke)
    result({}, comparison_view(*principle.table(found)), as_json=False)
    if out is not None:
        figure = require_figure()(figsize=principle.SIZE, dpi=100, layout="constrained")
        principle.draw(found, figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2)
        save(figure, out)
        print("\nfigure:", out)
    principle.check(found)
    print("\nThe claim holds.")


def run(name: str) -> None:
    """Run the script that is `__main__`, under its own name."""
    main(sys.modules[name])


def save(figure: Figure, out: Path) -> None:
    """Write a figure as a small PNG: it has few colours, so a palette of them holds it at a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    fresh = out.with_name(f".{out.name}.{os.getpid()}")  # a kill leaves the old figure
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(fresh, "png", optimize=True)
    fresh.replace(out)


# cached, since the tests run all scripts in one process
_lite0, _sample_photos = functools.cache(_samples.lite0), functools.cache(_samples.sample_photos)


def photos(count: int) -> tuple[nn.Module, Tensor]:
    """EfficientNet-Lite0 with its ImageNet weights, and real photos for it, fp32 `[count, 3, 224, 224]`.

    The network is shared, so it has to be left as it is. The first few are spread over the packages' photos, so that
    they are not all of one kind.
    """
    network = _lite0()
    images = [photo.image for photo in _sample_photos(size=256)]
    chosen = [image for start in range(4) for image in images[start::4]][:count]
    return network, torch.cat(list(PhotoBatches(chosen, network)))


def input_of(network: nn.Module, layer: str, x: Tensor) -> Tensor:
    """What a layer of the network is given when the network sees x, without running what comes behind it."""

    class Reached(Exception):  # noqa: N818 - no error
        pass

    seen: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise Reached

    hook = network.get_submodule(layer).register_forward_pre_hook(stop)
    with torch.no_grad(), hook, contextlib.suppress(Reached):
        network(x)
    return seen[0]


def plain_norm(norm: nn.Module) -> nn.BatchNorm2d:
    """A norm of timm's, which holds its activation, as a BatchNorm2d alone, in eval mode."""
    plain = nn.BatchNorm2d(int(norm.num_features), float(norm.eps))  # type: ignore[arg-type]
    plain.load_state_dict(norm.state_dict())
    return plain.eval()


def relative(error: Tensor, size: Tensor) -> float:
    """Root mean square of one over that of the other."""
    return float(error.detach().double().square().mean().sqrt() / size.detach().double().square().mean().sqrt())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y ~ x^p, by least squares on the logarithms."""
    a, b = (torch.tensor([math.log(value) for value in values]).double() for values in (x, y))
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


def powers_of_two(axes: Axes, values: Sequence[int], label: str) -> None:
    """A logarithmic axis with a tick at every measured value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_xlabel(label)


def round_numbers(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers: powers of ten, and 2 and 5 times them where there are few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Below all panels, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="small")
