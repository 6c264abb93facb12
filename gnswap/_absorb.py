"""Activations that follow a norm as modules of their own: which of them the norm may compute, as the graph proves it.

Why a proof: whether `self.relu` runs after `self.bn1` and nowhere else stands in no module, only in what forward does.
torch.fx runs forward on symbols, in training and in eval mode, and refuses where control flow depends on data. Then the
modules are taken out of a copy and it runs again: a module that is also reached in another way shows up there.

Why not by default: the norm's own output is then the activated one, which whoever taps `model.bn1` would notice.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import fx, nn

from gnswap._carry import HOOKS
from gnswap._errors import ModelError, PlanMismatchError
from gnswap._layer import has_hooks
from gnswap._norms import read_norm
from gnswap._records import Decision
from gnswap._sites import find_norms, get, replace, skeleton, walk
from gnswap.ops import activation_name

# nodes of one traced graph by the id of the module that they call
_Calls = dict[int, list[fx.Node]]


def with_absorbed(model: nn.Module, decisions: Sequence[Decision]) -> tuple[list[Decision], list[str]]:
    """Let every swapped norm compute the activation module behind it, where that changes nothing else.

    Args:
        model: only looked at, on a copy without data.
        decisions: of a plan for it.

    Returns:
        The decisions, some with `absorbs`, and notes on the activations that stay where they are.
    """
    try:
        copy = skeleton(model)
        tracer = _Tracer(copy)
        before = _traced(copy, tracer)
        found, reasons = _found(copy, decisions, [_calls(copy, graph) for graph in before])
        for paths in found.values():
            replace(copy, paths, nn.Identity())
        if [str(graph) for graph in _traced(copy, tracer)] != [str(graph) for graph in before]:
            return list(decisions), ["no activation absorbed: forward does something else where one is missing"]
    except Exception as error:  # forward is anybody's code, and fx raises what it likes
        text = (str(error).splitlines() or [""])[0]
        return list(decisions), [
            f"no activation absorbed: torch.fx cannot follow it ({type(error).__name__}: {text:.120})"
        ]
    absorbing = [
        dataclasses.replace(
            decision,
            absorbs=found[decision.paths],
            reason=f"{decision.reason}; computes {found[decision.paths][0]} as well",
        )
        if decision.paths in found
        else decision
        for decision in decisions
    ]
    return absorbing, [_note(reason, names) for reason, names in reasons.items()]


def require_absorbable(model: nn.Module, decision: Decision) -> None:
    """Refuse a plan whose activation is not there as planned, before anything is touched.

    Raises:
        PlanMismatchError: no such module, another kind of module, one with hooks, or one with further names.
    """
    paths = decision.absorbs or ()
    try:
        modules = [get(model, path) for path in paths]
        act = modules[0]
    except (ModelError, IndexError) as error:
        raise _misfit(decision, "an activation module", str(error)) from error
    everywhere = tuple(path for path, module in walk(model) if module is act)
    if any(module is not act for module in modules) or set(everywhere) != set(paths):
        raise _misfit(decision, f"one module under {', '.join(paths)}", f"one under {', '.join(everywhere)}")
    if activation_name(act) is None:
        raise _misfit(decision, "an activation that the norm can compute", type(act).__qualname__)
    norm = get(model, decision.paths[0])
    if has_hooks(act) or has_hooks(norm):
        raise _misfit(decision, "a norm and an activation without hooks", "hooks")
    if not _bare(norm):
        raise _misfit(decision, "a norm without an activation of its own", type(norm).__qualname__)


def absorb(layer: nn.Module, act: nn.Module) -> nn.Module:
    """Hang the activation into the layer; what takes its place is returned."""
    layer.act = act
    place = nn.Identity()
    place.training = act.training
    return place


def given_back(layer: nn.Module, place: nn.Module) -> nn.Module:
    """The activation that `absorb` hung into the layer, with the hooks that were put on its place since."""
    act = layer.act
    assert isinstance(act, nn.Module)
    for name in HOOKS:
        later = vars(place)[name]
        if isinstance(later, dict):
            vars(act)[name].update(later)
    return act


def _found(
    model: nn.Module, decisions: Sequence[Decision], graphs: Sequence[_Calls]
) -> tuple[dict[tuple[str, ...], tuple[str, ...]], dict[str, list[str]]]:
    """Paths of norms with the paths of their activations, and the reasons of those that stay, with their norms."""
    paths_of: dict[int, list[str]] = {}
    for path, module in walk(model):
        paths_of.setdefault(id(module), []).append(path)
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    reasons: dict[str, list[str]] = {}
    for decision in decisions:
        norm = get(model, decision.paths[0])
        act = _follower(model, norm, graphs) if decision.action == "swap" and _bare(norm) else None
        if act is None:
            continue
        if (reason := _obstacle(model, norm, act, graphs)) is None:
            found[decision.paths] = tuple(paths_of[id(act)])
        else:
            reasons.setdefault(reason, []).append(decision.name)
    return found, reasons


class _Tracer(fx.Tracer):
    """Looks into modules only as far as they hold a norm or an activation: what else they do is no concern here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        norms = {id(module) for _, module in find_norms(model)}
        self._norms = norms
        self._holders = {
            id(module)
            for module in model.modules()
            if any(id(part) in norms or activation_name(part) for part in module.modules() if part is not module)
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        plain = super().is_leaf_module(m, module_qualified_name)
        return plain or id(m) in self._norms or id(m) not in self._holders


def _traced(model: nn.Module, tracer: _Tracer) -> list[fx.Graph]:
    """What forward does in training and in evaluation."""
    graphs = []
    for training in (True, False):
        model.train(training)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what a forward has to say about symbols
            graphs.append(tracer.trace(model))
    return graphs


def _calls(model: nn.Module, graph: fx.Graph) -> _Calls:
    calls: _Calls = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(id(_module(model, node)), []).append(node)
    return calls


def _module(model: nn.Module, node: fx.Node) -> nn.Module:
    return get(model, str(node.target))


def _bare(norm: nn.Module) -> bool:
    state = read_norm(norm)
    return state.act is None and state.drop is None


def _readers(model: nn.Module, node: fx.Node) -> list[fx.Node]:
    """What reads a node's value, behind every `nn.Identity` (timm's unused drop_block, say)."""
    found = []
    for user in node.users:
        passes = user.op == "call_module" and type(_module(model, user)) is nn.Identity
        found += _readers(model, user) if passes and not has_hooks(_module(model, user)) else [user]
    return found


def _follower(model: nn.Module, norm: nn.Module, graphs: Sequence[_Calls]) -> nn.Module | None:
    """The first activation module that reads the norm's output."""
    readers = (reader for calls in graphs for node in calls.get(id(norm), ()) for reader in _readers(model, node))
    acts = (_module(model, reader) for reader in readers if reader.op == "call_module")
    return next((act for act in acts if activation_name(act) is not None), None)


def _obstacle(model: nn.Module, norm: nn.Module, act: nn.Module, graphs: Sequence[_Calls]) -> str | None:
    """Why the activation has to stay where it is."""
    if has_hooks(norm) or has_hooks(act):
        return "hooks would see other values"
    for calls in graphs:
        ours, theirs = calls.get(id(norm), []), calls.get(id(act), [])
        if len(theirs) > 1:
            return "the module is called in several places"
        if len(ours) > 1:
            return "the norm is called in several places"
        if (ours or theirs) and not (ours and theirs and _readers(model, ours[0]) == theirs):
            return "something else reads the norm's output as well"
    return None


def _note(reason: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"activation after {', '.join(names[:3])}{more} not absorbed: {reason}"


def _misfit(decision: Decision, expected: str, found: str) -> PlanMismatchError:
    return PlanMismatchError(
        "the activation that the plan absorbs is not there as planned",
        where=decision.name,
        expected=expected,
        found=found,
        fix="Make a plan for this model with gnswap.plan, or edit this one: absorbs=None.",
    )
