"""torch.export with dynamic batch and, where the network allows it, dynamic height and width.

Why traced here and not by `torch.onnx.export` itself: that tries several strategies one after the other and reports
the last failure, and it accepts a size as dynamic without asking whether the graph is right for another size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._errors import ExportError

SIZE_NAMES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}

_SAME_PADDING = (
    "its padding depends on the size through nested Max and ceil, on which torch.export spends minutes or more"
)


@dataclasses.dataclass(frozen=True)
class Traced:
    """An exported program, and for each input its dynamic axes by number."""

    program: torch.export.ExportedProgram
    axes: list[dict[int, str]]
    notes: tuple[str, ...]


def trace(model: nn.Module, inputs: Sequence[Tensor], *, dynamic_batch: bool, dynamic_size: bool) -> Traced:
    """Export a model in eval mode; sizes fall back to the example's where they cannot be dynamic, with a note.

    Args:
        model: plain torch operators only.
        inputs: positional inputs; where one has a batch of 1 all are doubled, since torch.export fixes sizes 0 and 1.
        dynamic_batch: axis 0 of every input that has the first input's batch size.
        dynamic_size: the axes after C of every input of 3 to 5 dimensions.

    Raises:
        ExportError: the model cannot be traced, or not with a dynamic batch.
    """
    batch = inputs[0].shape[0] if inputs[0].dim() else 0
    batched = [value.dim() > 0 and value.shape[0] == batch for value in inputs]
    if dynamic_batch and batch == 1:
        inputs = [
            torch.cat([value, value]) if is_batched else value
            for value, is_batched in zip(inputs, batched, strict=True)
        ]
    batch_axes = [{0: "batch"} if dynamic_batch and is_batched else {} for is_batched in batched]
    size_axes = [axes | sizes for axes, sizes in zip(batch_axes, _size_axes(inputs), strict=True)]
    notes: tuple[str, ...] = ()
    if dynamic_size and size_axes != batch_axes:
        reason = _known_obstacle(model)
        if reason is None:
            try:
                program = _export(model, inputs, size_axes)
                reason = _wrong_at_other_sizes(model, program, inputs, size_axes)
            except ExportError as error:
                reason = error.found or error.problem
            if reason is None:
                return Traced(program, size_axes, ())
        sizes = ", ".join("x".join(map(str, value.shape[2:])) for value in inputs if value.dim() in SIZE_NAMES)
        notes = (f"height and width are fixed at {sizes}: {reason}",)
    return Traced(_export(model, inputs, batch_axes), batch_axes, notes)


def _size_axes(inputs: Sequence[Tensor]) -> list[dict[int, str]]:
    """Names of the axes after C. Axes of one name have one length in every run, so another length has another name."""
    lengths: dict[str, list[int]] = {}
    named: list[dict[int, str]] = []
    for value in inputs:
        names = {}
        for axis, name in enumerate(SIZE_NAMES.get(value.dim(), ()), start=2):
            seen = lengths.setdefault(name, [])
            if value.shape[axis] not in seen:
                seen.append(value.shape[axis])
            place = seen.index(value.shape[axis])
            names[axis] = f"{name}_{place + 1}" if place else name
        named.append(names)
    return named


def _known_obstacle(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("timm.layers.") and kind.__name__.endswith("Same"):
            return f"{name} is a {kind.__name__}: {_SAME_PADDING}"
    return None


def _export(model: nn.Module, inputs: Sequence[Tensor], axes: list[dict[int, str]]) -> torch.export.ExportedProgram:
    # DYNAMIC refuses a size that becomes a constant, but not one that is merely bounded, as every network bounds it
    shapes = [dict.fromkeys(one, torch.export.Dim.DYNAMIC) for one in axes]
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, tuple(inputs), dynamic_shapes=_by_argument(model, shapes), strict=False)
    except Exception as error:  # torch.export raises a dozen unrelated classes, user code any other
        raise ExportError(
            "torch.export cannot trace the model",
            where=type(model).__name__,
            found=" ".join(str(error).split())[:400] or type(error).__name__,
            fix="A batch size written into the model's forward is the usual reason: read it from the input instead, or "
            "export for one batch size, dynamic_batch=False (--fixed-batch N).",
        ) from error


def _by_argument(model: nn.Module, shapes: list[Any]) -> Any:
    """The shapes in the nesting of forward's signature: `*args` wants one tuple of them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    for number, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL and number < len(shapes):
            return (*shapes[:number], tuple(shapes[number:]))
    return tuple(shapes)


def _wrong_at_other_sizes(
    model: nn.Module, program: torch.export.ExportedProgram, inputs: Sequence[Tensor], axes: list[dict[int, str]]
) -> str | None:
    """Why the traced graph is not right at sizes it was not traced at; None where it is."""
    tried = 0
    for height, width in ((1, 0), (0, 1), (32, 32), (33, 65)):
        grow = {"height": height, "width": width, "length": height + width, "depth": height % 32}
        others = [
            _grown(value, [(axis, grow.get(name.partition("_")[0], 0)) for axis, name in one.items()])
            for value, one in zip(inputs, axes, strict=True)
        ]
        with torch.no_grad():
            try:
                expected = model(*others)
            except Exception:  # the network itself does not run at this size, so the file need not
                continue
            tried += 1
            size = "x".join(map(str, others[0].shape[2:]))
            try:
                found = program.module()(*others)
            except Exception as error:
                return f"the traced graph refuses size {size}: {' '.join(str(error).split())[:200]}"
        if not all(_close(one, other) for one, other in zip(tensors(found), tensors(expected), strict=True)):
            return f"the traced graph gives other answers than the network at size {size}"
    return None if tried else "the network runs at no other size that was tried"


def _grown(value: Tensor, growth: list[tuple[int, int]]) -> Tensor:
    for axis, extra in growth:
        indices = torch.arange(value.shape[axis] + extra, device=value.device) % value.shape[axis]
        value = value.index_select(axis, indices) if extra else value
    return value


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    scale = float(expected.abs().amax()) if expected.numel() else 0.0
    return torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-4 * scale, equal_nan=True)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output in torch's flattening order, which is that of the ONNX file's outputs."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings of torch's exporter about its own internals, and no others."""
    with warnings.catch_warnings():
        # copyreg-based tree specs inside torch.export and onnxscript; nothing a user can act on
        warnings.filterwarnings(
            "ignore", message=r".*(isinstance\(treespec, LeafSpec\)|LeafSpec).*", category=FutureWarning
        )
        yield
