"""The passes over a graph, in their order, and what is said about each norm afterwards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from gnswap._onnx import fold, norm, order, targets
from gnswap._onnx.edit import remove_unused, take_over
from gnswap._onnx.lowering import Lowering
from gnswap._record import Record

Norms = list[norm.Norm]
Choice = Callable[[norm.Norm], tuple[Lowering, str]]


@dataclasses.dataclass(frozen=True)
class NormExport(Record):
    """How one GroupNorm was written.

    Attributes:
        path: of the module it comes from; a module that runs twice is there twice.
        num_channels, num_groups: C and G.
        lowering: name of the form.
        reason: why this form.
        standardisation: "none", "folded into CONV" (the layer in front computes it), or "in the norm".
        affine: gamma and beta: "none", "folded into CONV" (the layer behind multiplies by them), or "in the norm".
        channel_order: "natural", "in the neighbours' weights", "1 Gather" or "2 Gathers".
    """

    path: str
    num_channels: int
    num_groups: int
    lowering: str
    reason: str
    standardisation: str
    affine: str
    channel_order: str


def prepare(graph: Any, exact: fold.Exact) -> Norms:
    """Give the neighbours what they can take; the norms that are left have their groups side by side.

    Args:
        graph: an `onnx_ir.Graph`, changed in place.
        exact: initializers by name, as they were before a cast to a half type.
    """
    norms = norm.find(graph)
    fold.fold(graph, norms, exact)
    order.settle(graph, norms)
    return norms


def lower(graph: Any, norms: Norms, choice: Choice) -> tuple[NormExport, ...]:
    """Write every norm in the form that `choice` names; no node of ours is left then."""
    cache: dict[Any, Any] = {}
    rows = []
    for one in norms:
        lowering, reason = choice(one)
        rows.append(_row(one, lowering, reason))
        take_over(one.y, lowering.write(norm.Writer(graph, one, cache), one.x))
        graph.remove(one.node, safe=True)
    graph.opset_imports.pop(norm.DOMAIN, None)
    remove_unused(graph)
    return tuple(rows)


def copied(model: Any, norms: Sequence[norm.Norm]) -> tuple[Any, Norms]:
    """A copy of an `onnx_ir.Model` after `prepare`, to write its norms in another form; weights are shared."""
    twin = model.clone()
    nodes = [one.node for one in norm.find(twin.graph)]
    return twin, [dataclasses.replace(one, node=node) for one, node in zip(norms, nodes, strict=True)]


def layouts(norms: Norms) -> dict[str, str]:
    """What the file says of norms whose output is stored in another order of channels (see `_onnx_scopes.layouts`)."""
    found: dict[str, list[list[int] | None]] = {}
    for one in norms:
        found.setdefault(one.path, []).append(None if one.layout is None else one.layout.tolist())
    moved = {path: calls for path, calls in found.items() if any(calls)}
    return {"gnswap.channel_layouts": json.dumps(moved, separators=(",", ":"))} if moved else {}


def affine_behind(norms: Norms) -> dict[str, str]:
    """What the file says of norms whose gamma and beta are in the next layer (see `_onnx_scopes.affine_behind`)."""
    found: dict[str, list[bool]] = {}
    for one in norms:
        found.setdefault(one.path, []).append(one.behind is not None)
    moved = {path: calls for path, calls in found.items() if any(calls)}
    return {"gnswap.affine_behind": json.dumps(moved, separators=(",", ":"))} if moved else {}


def by_target(target: targets.Target) -> Choice:
    """The choice that needs no measurement."""
    return lambda one: targets.choose(one, target)


def _row(one: norm.Norm, lowering: Lowering, reason: str) -> NormExport:
    standardised = one.scale is not None or one.shift is not None
    mapped = one.weight is not None or one.bias is not None
    ordered = "in the neighbours' weights" if one.ordered else "natural"
    gathers = f"{one.gathers} Gather{'s' * (one.gathers > 1)}"
    return NormExport(
        path=one.path or "(root)",
        num_channels=one.channels,
        num_groups=one.num_groups,
        lowering=lowering.name,
        reason=reason,
        standardisation=_place(standardised, one.folded),
        affine=_place(mapped, one.behind),
        channel_order=gathers if one.gathers else ordered,
    )


def _place(is_here: bool, layer: str | None) -> str:
    if is_here:
        return "in the norm"
    return "none" if layer is None else f"folded into {layer}"
