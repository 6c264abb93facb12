r"""refit: new weights for the layers between the norms, in closed form, so that they give what the original's gave.

A conversion's norms disturb what the next convolution or linear layer sees. Layer by layer, in the order in which the
network runs them, its weights become those that give the original's output from the disturbed input:

.. math::
    \min_\Delta \; \sum_{n,s} \lVert y_{ns} - (W + \Delta) \tilde x_{ns} \rVert^2
    + \lambda \sum_{ij} \Delta_{ij}^2 \, \overline{\tilde x_j^2}

with y what the original's layer gives, x̃ what the converted network's layer is given, and the strength λ chosen for
each layer across two halves of the photos. Where a GroupNorm is all that reads the layer, y is given the means and
sizes of groups that the layer reaches: the norm takes them away again (`_taken_away`). Each layer is fitted on what the
layers in front of it give when they have been fitted already (as Frantar et al., *GPTQ*, 2023, do after rounding
weights; Nagel et al., 2019, correct biases so).

Why in closed form beside `heal`: some seconds in place of minutes, and a few dozen photos are enough: no step size, no
noise of batches. Why it is judged at the network's output on photos held out: a fit can lower every layer's error
and still move the answers. Why not by the divergence of the answers alone: see `Jury.prefers`. Why no views of the
photos (`_views`), which `heal` learns from: for statistics of layers they are another kind of picture; on a network of
our own of the MobileNet kind they took all of the gain away.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gnswap import _least_squares
from gnswap._couple import require_couple, singles_of_one_shape
from gnswap._errors import ArgumentError
from gnswap._layer import FusedGroupNorm
from gnswap._lockstep import Walk
from gnswap._progress import counted
from gnswap._record import Record
from gnswap._running import eval_mode, placed
from gnswap._taken_away import equivalent, norms_behind
from gnswap._trial import Jury, answers, parted

_LEAST_GAIN = 0.005  # of a layer's squared error, on the other half of the photos


@dataclasses.dataclass(frozen=True)
class RefitLayer(Record):
    """One layer that was fitted.

    Attributes:
        name: its path.
        error: squared error of its output before, relative to the original's variance, on the photos it is fitted on;
            without what a GroupNorm behind it takes away.
        gain: share of that error that a fit on one half of the photos takes away on the other half.
        strength: λ, relative; None where nothing helped, and the weights stay.
    """

    name: str
    error: float
    gain: float
    strength: float | None


@dataclasses.dataclass(frozen=True)
class RefitReport(Record):
    """What refitting did.

    Attributes:
        refitted: whether the network is closer to its original on the photos held out: by the distance, or where that
            of a classifier changes by less than its standard error, by the squared error of the logits. Where it is
            not, it was given back bit for bit as it was.
        verdict: the same in words, with figures.
        photos: how many the weights were fitted on in the end.
        held_out: how many of them judged a first fit, on the others.
        distance: before and after that first fit, on the photos held out: mean KL(original ‖ converted) in nats of a
            classifier, else the squared relative error of the outputs.
        agreement: before and after: share of them with the original's top-1 class; None for no classifier.
        layers: those that were looked at, in the order in which the network runs them.
    """

    refitted: bool
    verdict: str
    photos: int
    held_out: int
    distance: tuple[float, float]
    agreement: tuple[float, float] | None
    layers: tuple[RefitLayer, ...]


def refit(converted: nn.Module, original: nn.Module, photos: Iterable[Any]) -> RefitReport:
    """Fit the weights of a converted network's convolutions and linear layers to its original, in place.

    No labels and no gradients: least squares, one layer after the other, in one forward pass of each network. First on
    three photos of four: the fourth judges at the network's output. Where that is no nearer to the original's (see
    `RefitReport.refitted`), the network is given back bit for bit; else it is fitted on all. Layers that run more than
    once, share their weight, are parametrized, frozen, or of another kind than torch's own (and timm's Conv2dSame) keep
    their weights.

    Use it between `convert` and `heal`, or alone. Healing is judged on every fourth of its own photos: to have that
    done on photos that nothing was fitted on, give `refit` the others only (`gnswap convert --refit --heal` does).
    `gnswap.save` and `load` work as before; `revert` refuses, as after any training.

    Memory: what both networks hold at their widest place for all photos at once (EfficientNet-Lite0 at 224 pixels: 20
    MB a photo), and a few matrices of the size (inputs times kernel)² of a layer.

    Args:
        converted: what `gnswap.convert` or `apply` made of the original, in fp32 or fp64; changed in place.
        original: the network with its BatchNorms; only read.
        photos: input batches, as for `gnswap.calibrate`; all of one shape, of the kind that the network will see. 64 to
            256 are good.

    Returns:
        What came of it.

    Raises:
        ArgumentError: see `gnswap.heal`; or the networks take different ways through their layers.
        CalibrationError: fewer than 8 photos, of different shapes, or with numbers that are not finite.
        WrappedModelError: a model is wrapped (DDP, FSDP, torch.compile): refit the module inside.

    Example:
        >>> import torch, gnswap
        >>> _ = torch.manual_seed(0)
        >>> parts = [torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3)]
        >>> net = torch.nn.Sequential(*parts).eval()
        >>> converted = gnswap.convert(net, groups=4, softness=0).model
        >>> report = gnswap.refit(converted, net, [torch.rand(32, 3, 9, 9)])
        >>> report.refitted, [layer.name for layer in report.layers if layer.strength is not None]
        (True, ['3'])
    """
    require_couple(converted, original, "refit")
    singles = singles_of_one_shape(photos, "refit")
    x, judging = parted(singles)
    jury = Jury(original, judging)
    with eval_mode(converted, original), torch.no_grad():
        answers_before = answers(converted, jury.photos)
        names = _fittable(converted, x[:1])
        behind = norms_behind(converted, names, placed(x[:1], converted))
        with _given_back_on_error(converted, names) as give_back:
            layers = _fitted(converted, original, names, behind, x)
            answers_after = answers(converted, jury.photos)
            give_back()
            helped, note = jury.prefers(answers_after, answers_before)
            if helped:
                layers = _fitted(converted, original, names, behind, torch.cat(singles))
    before, after = jury.judge(answers_before), jury.judge(answers_after)
    agreement = None
    if before.agreement is not None and after.agreement is not None:
        agreement = (before.agreement, after.agreement)
    changed = sum(layer.strength is not None for layer in layers)
    did = f"refitted {changed} layers:" if helped else "not refitted: it would take"
    return RefitReport(
        refitted=helped,
        verdict=f"{did} {before.change(after)} on {len(jury.photos)} photos held out" + (f" ({note})" if note else ""),
        photos=len(singles),
        held_out=len(jury.photos),
        distance=(before.distance, after.distance),
        agreement=agreement,
        layers=tuple(layers),
    )


@contextlib.contextmanager
def _given_back_on_error(model: nn.Module, names: Iterable[str]) -> Iterator[Callable[[], None]]:
    """What gives the layers the parameters back that they had; done at the end of a block that fails or is stopped."""
    parameters = [parameter for name in names for parameter in model.get_submodule(name).parameters(recurse=False)]
    kept = [parameter.clone() for parameter in parameters]

    def give_back() -> None:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)

    try:
        yield give_back
    except BaseException:
        give_back()
        raise


def _fittable(model: nn.Module, x: Tensor) -> list[str]:
    """Paths of the layers that can be fitted, in the order in which the network runs them."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    known = {
        name: module
        for name, module in model.named_modules()
        if _least_squares.can_fit(module) and all(owners[id(p)] == 1 and p.requires_grad for p in module.parameters())
    }
    called: list[str] = []
    with _hooked(model, known, lambda name, _inputs: called.append(name), after=False):
        model(placed(x, model))
    return [name for name in called if called.count(name) == 1]


def _fitted(
    converted: nn.Module, original: nn.Module, names: list[str], behind: dict[str, FusedGroupNorm], x: Tensor
) -> list[RefitLayer]:
    """Fit the layers in place, one after the other."""
    layers: list[RefitLayer] = []

    def pass_original(stop: Callable[[Any], None]) -> None:
        with _hooked(original, names, lambda name, found: stop((name, found)), after=True):
            original(placed(x, original))

    walk = Walk(pass_original)
    with counted("refitting", len(names)) as show, contextlib.ExitStack() as end:
        end.callback(walk.give_up)

        def fit(name: str, given: Tensor) -> None:
            found = walk.go_on()
            if found is None or found[0] != name:
                raise ArgumentError(
                    "the two networks take different ways through their layers",
                    where=f"refit, {name}",
                    expected=name,
                    found="the end" if found is None else found[0],
                )
            layer = converted.get_submodule(name)
            assert _least_squares.can_fit(layer)
            layers.append(_fit(name, layer, given, found[1].to(given), behind.get(name)))
            show(len(layers), f"refitting {name}")

        with _hooked(converted, names, fit, after=False):
            converted(placed(x, converted))
    return layers


def _fit(name: str, layer: _least_squares.Layer, x: Tensor, y: Tensor, norm: FusedGroupNorm | None) -> RefitLayer:
    """Fit one layer in place to give y, of the original, from x, of the converted network, for the norm behind it."""
    if norm is not None:
        y = equivalent(norm, y, layer.forward(x))
    # neighbours stay together: where a network cuts photos into windows, these are rows of their own
    halves = zip(x.tensor_split(2), y.tensor_split(2), strict=True)
    fit = _least_squares.best_fit(*(_least_squares.Sums.of(layer, *half) for half in halves))
    if fit.gain < _LEAST_GAIN:
        return RefitLayer(name, fit.error, fit.gain, None)
    _least_squares.add(layer, fit.change)
    return RefitLayer(name, fit.error, fit.gain, fit.strength)


@contextlib.contextmanager
def _hooked(model: nn.Module, names: Iterable[str], meet: Callable[[str, Any], None], *, after: bool) -> Iterator[None]:
    """Within the block, `meet` is given each layer's path with its input, or after it with its output."""
    with contextlib.ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            if after:
                handle = layer.register_forward_hook(lambda _m, _x, output, name=name: meet(name, output))
            else:
                handle = layer.register_forward_pre_hook(lambda _m, inputs, name=name: meet(name, inputs[0]))
            hooks.callback(handle.remove)
        yield
