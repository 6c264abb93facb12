"""apply: put the layers of a plan in place of the BatchNorms, all of them or none.

Why in three steps (check everything, build everything, swap everything): nothing of the model has changed until the
last layer is built, and the swap itself is a handful of assignments that are taken back if one of them fails.
"""

from __future__ import annotations

from torch import nn

from gnswap import _fusing, _sites
from gnswap._absorb import absorb, require_absorbable
from gnswap._build import build_layer
from gnswap._carry import carry_over, copied, replace_all
from gnswap._errors import ArgumentError, ModelError, NothingToSwapError, PlanMismatchError
from gnswap._layer import FusedGroupNorm
from gnswap._norms import read_norm, type_name
from gnswap._records import Decision, Plan
from gnswap._survey import survey


def apply(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """Replace the BatchNorms of a model by the GroupNorms of a plan.

    The new layers take over what the old ones held: gamma and beta as the same `Parameter` objects (an optimizer
    stays valid), dtype, device, training flag, hooks, fused activation and dropout, further attributes. A layer
    that is reached under several names stays one layer.

    Re-running an initialisation (`init_weights`, zero-init of the last gamma) afterwards resets gamma and beta but not
    the standardisation, as it would have kept the running statistics. Fusing or re-parameterising (RepVGG, MobileOne,
    FastViT) needs BatchNorm: do it before. Code that picks parameters by class (no weight decay for BatchNorm2d) has to
    name `FusedGroupNorm` as well; code that goes by shape need not.

    Args:
        model: a network of the architecture that the plan was made for.
        plan: made by `gnswap.plan`, perhaps edited, perhaps on another machine.
        inplace: change this very model. Otherwise a deep copy is changed and the model left untouched.

    Returns:
        The converted network. This is `model` itself with `inplace`, unless the root is a BatchNorm.

    Raises:
        NothingToSwapError: the plan swaps nothing.
        PlanMismatchError: the plan is for another architecture.
        ModelError: the model is converted already, cannot be copied, or a layer cannot be swapped.
        WrappedModelError: the model is wrapped (DDP, FSDP, torch.compile, TorchScript).

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU())
        >>> converted = gnswap.apply(net, gnswap.plan(net, groups=8))
        >>> type(net[1]).__name__, type(converted[1]).__name__
        ('BatchNorm2d', 'FusedGroupNorm')
    """
    _sites.require_plain(model)
    if not isinstance(plan, Plan):
        raise ArgumentError("not a plan", where="apply.plan", expected="a gnswap.Plan", found=f"{plan!r:.60}")
    if _sites.applied(model) is not None:
        raise ModelError(
            "the model is converted already", where=type(model).__qualname__, fix="Call gnswap.revert first."
        )
    if not plan.swaps:
        kept = "; ".join(f"{decision.name}: {decision.reason}" for decision in plan.kept[:3])
        raise NothingToSwapError(
            "the plan swaps nothing",
            where=type(model).__qualname__,
            expected="one BatchNorm or more that is not kept",
            found=f"{len(plan.kept)} layer{'s' * (len(plan.kept) > 1)} kept ({kept})" if kept else "no BatchNorm",
            fix="gnswap.inspect lists every norm of the model, and why it is kept or left alone.",
        )
    _check(model, plan)
    target = model if inplace else copied(model)
    norms = dict(_sites.find_norms(target))
    swaps = [(decision, norms[decision.paths]) for decision in plan.swaps]
    layers: list[nn.Module] = [_replacement(norm, decision) for decision, norm in swaps]
    paths = [decision.paths for decision, _ in swaps]
    for (decision, _), layer in zip(swaps, layers[:], strict=True):
        if decision.absorbs:
            paths.append(decision.absorbs)
            layers.append(absorb(layer, _sites.get(target, decision.absorbs[0])))
    root = replace_all(target, paths, layers)
    _fusing.forbid(root, [path for decision, _ in swaps for path in decision.paths])
    root.__dict__["_gnswap"] = _sites.Applied(plan, _sites.digest(root))
    return root


def _check(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that does not fit, before anything is touched."""
    norms = dict(_sites.find_norms(model))
    refusals = {site.paths: site.refusal for site in survey(model).sites}
    by_path = {path: module for paths, module in norms.items() for path in paths}
    advice = "Make a plan for this model with gnswap.plan."
    for decision in plan.decisions:
        module = norms.get(decision.paths)
        if module is None:
            there = [path for path in decision.paths if path in by_path]
            found = f"a norm under {', '.join(there)} only" if there else "no norm there"
            raise PlanMismatchError(
                "the plan is for another model",
                where=decision.name,
                expected=f"one {decision.norm_type} under {', '.join(path or '(root)' for path in decision.paths)}",
                found=found,
                fix=advice,
            )
        if type_name(type(module)) != decision.norm_type:
            raise PlanMismatchError(
                "the plan is for another type of layer",
                where=decision.name,
                expected=decision.norm_type,
                found=type_name(type(module)),
                fix=advice,
            )
        if decision.action == "swap":
            _check_swap(module, decision, refusals[decision.paths])
            if decision.absorbs is not None:
                require_absorbable(model, decision)
    if len(plan.decisions) != len(norms):
        decided = {path for decision in plan.decisions for path in decision.paths}
        missing = next((paths[0] for paths in norms if not decided.intersection(paths)), None)
        raise PlanMismatchError(
            "the plan decides about a layer more than once" if missing is None else "the plan leaves a layer out",
            where=missing,
            expected=f"one decision for each of {len(norms)} norm layers",
            found=f"{len(plan.decisions)} decisions",
            fix=advice,
        )
    if (found := _sites.fingerprint(model)) != plan.fingerprint:
        raise PlanMismatchError(
            "the plan is for another model: the norm layers are the same, other parameters are not",
            where=type(model).__qualname__,
            expected=f"fingerprint {plan.fingerprint[:12]}",
            found=found[:12],
            fix=advice,
        )


def _check_swap(module: nn.Module, decision: Decision, reason: str | None) -> None:
    if reason is not None:
        raise ModelError(
            "this layer cannot be swapped",
            where=decision.name,
            found=reason,
            fix="A plan made for this model by gnswap.plan keeps it.",
        )
    state = read_norm(module)
    if state.num_channels != decision.num_channels:
        raise PlanMismatchError(
            "another number of channels than planned",
            where=decision.name,
            expected=str(decision.num_channels),
            found=str(state.num_channels),
        )
    if decision.standardise and state.running_var is None:
        raise PlanMismatchError(
            "no running statistics to standardise with",
            where=decision.name,
            expected="running_mean and running_var",
            fix="Edit the plan: standardise=False makes it a plain GroupNorm.",
        )


def _replacement(norm: nn.Module, decision: Decision) -> FusedGroupNorm:
    """The layer that stands for `norm`, with everything of it that is neither parameter nor statistic."""
    layer, state = build_layer(norm, decision), read_norm(norm)
    carry_over(norm, layer, weight=state.weight, bias=state.bias)
    return layer
