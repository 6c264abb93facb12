"""What must hold for one converted network of timm: the checks behind `zoo.py`, and behind CI's sample of them.

A check takes a `Case` and raises `Fault` where something does not hold, `DoesNotApply` where the BatchNorm original
cannot do it either. Any other exception is a fault as well. Its result are figures for the row.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from _zoo_cases import SIZES, Case, build, make_case, make_meta_case, run
from torch import Tensor, nn

import gnswap
from gnswap._baselines import naive_group_norm
from gnswap._running import flat
from gnswap._sites import find_norms

Row = dict[str, Any]


class Fault(Exception):  # noqa: N818 - what a check finds
    """Something that does not hold for a converted network."""


class DoesNotApply(Exception):  # noqa: N818
    """The original cannot do it either."""


def examine(name: str, x: Tensor | None, sizes: Iterable[int] = SIZES) -> Row:
    """Every check on one architecture, each whatever the others find.

    Args:
        name: of timm.
        x: what `_zoo_cases.photos` returns, or None: on the meta device, and only what can be checked there.
        sizes: see `_zoo_cases.SIZES`.

    Returns:
        layers by type, seconds, and what passed, failed (with the error in full) and does not apply.
    """
    start = time.perf_counter()
    row: Row = {"passed": [], "failed": {}, "does_not_apply": {}}
    try:
        case = make_meta_case(name) if x is None else make_case(name, x, sizes)
    except Exception:  # whatever a network raises is a row of the table
        row["failed"]["convert"] = traceback.format_exc()
        return row
    row["size"] = list(case.x.shape[1:])
    row["parameters"] = sum(parameter.numel() for parameter in case.original.parameters())
    row["layers"] = Counter(decision.norm_type.rpartition(".")[2] for decision in case.conversion.plan.decisions)
    for title, check in CHECKS.items():
        if x is None and title not in WITHOUT_VALUES:
            continue
        try:
            row |= check(case) or {}
            row["passed"].append(title)
        except DoesNotApply as reason:
            row["does_not_apply"][title] = str(reason)
        except Exception as error:  # a check that breaks off found something, too
            row["failed"][title] = str(error) if isinstance(error, Fault) else traceback.format_exc()
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def same(one: Any, other: Any) -> bool:
    """Whether two outputs have the same bits; on the meta device: the same shapes."""
    pairs = list(zip(flat(one), flat(other), strict=False))
    if len(flat(one)) != len(flat(other)) or not pairs:
        return False
    return all(a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or torch.equal(a, b)) for a, b in pairs)


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value expected."""
    pairs = list(zip(flat(found), flat(expected), strict=True))
    scale = max(float(b.abs().amax()) for _, b in pairs)
    return max(float((a.double() - b.double()).abs().amax()) for a, b in pairs) / max(scale, 1e-30)


def require(holds: bool, fault: str) -> None:
    """Raises `Fault` unless it holds."""
    if not holds:
        raise Fault(fault)


def require_finite(output: Any, what: str) -> None:
    """Raises `Fault` where an output holds NaN or infinity."""
    require(all(tensor.is_meta or bool(tensor.isfinite().all()) for tensor in flat(output)), f"{what} is not finite")


def require_shapes(found: Any, expected: Any) -> None:
    """Raises `Fault` where two outputs differ in the shapes of their tensors."""
    shapes, wanted = ([tuple(tensor.shape) for tensor in flat(output)] for output in (found, expected))
    require(shapes == wanted, f"shapes {shapes}, not {wanted}")


def of_original(call: Callable[[], Any]) -> Any:
    """What the original does.

    Raises:
        DoesNotApply: it raised something.
    """
    try:
        return call()
    except Exception as error:  # whatever it raises, the converted network need not do better
        raise DoesNotApply(f"{type(error).__name__}: {error}"[:300]) from error


def no_norm_left(case: Case) -> None:
    """Every BatchNorm is swapped, or kept for a reason."""
    kept = {decision.paths for decision in case.conversion.plan.kept if decision.reason}
    left = [paths[0] for paths, _ in find_norms(case.converted) if paths not in kept]
    require(not left, f"left without a reason: {left}")
    count = sum(isinstance(module, gnswap.FusedGroupNorm) for module in case.converted.modules())
    swaps = len(case.conversion.plan.swaps)
    require(count == swaps, f"{count} GroupNorms for {swaps} swaps")


def output(case: Case) -> None:
    """The output is finite, of the original's shape."""
    require_shapes(case.converted_answers, case.answers)
    require_finite(case.converted_answers, "the output")


def closer_than_naive(case: Case) -> Row:
    """Converted without data, the output is nearer to the original's than after the naive swap."""
    outputs = (case.converted_answers, run(naive_group_norm(case.original), case.x))
    expected = flat(case.answers)
    scale = sum(float((b - b.mean(0)).square().sum()) for b in expected) ** 0.5

    def distance(found: Any) -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(flat(found), expected, strict=True)) ** 0.5

    ours, naive = (distance(found) for found in outputs)
    if not naive:
        raise DoesNotApply("the naive swap changes nothing here")
    require(ours < naive, f"distance {ours:.4g}, of the naive swap {naive:.4g}, spread of the answers {scale:.4g}")
    return {"distance": ours / naive}


def batch_independent(case: Case) -> None:
    """The first sample has the same bits whatever the others are, and every layer gives a row alone the same bits."""
    others = torch.cat([case.x[:1], 2 * case.x[1:].flip(0) + 1])
    rows: dict[str, bool] = {}
    handles = [
        module.register_forward_hook(functools.partial(_compare_rows, rows, name))
        for name, module in case.converted.named_modules()
        if isinstance(module, gnswap.FusedGroupNorm)
    ]
    try:
        found = run(case.converted, others)
    finally:
        for handle in handles:
            handle.remove()
    require(all(rows.values()), f"other bits for a row alone: {[name for name, equal in rows.items() if not equal]}")
    first = [[tensor[:1] for tensor in flat(one)] for one in (found, case.converted_answers)]
    require(same(*first), "the first sample's output depends on the other samples")


def _compare_rows(rows: dict[str, bool], name: str, module: nn.Module, inputs: Any, found: Tensor) -> None:
    alone = module.forward(inputs[0][:1], *(extra[:1] for extra in inputs[1:]))
    rows[name] = rows.get(name, True) and torch.equal(alone, found[:1])


def saved_and_loaded(case: Case) -> None:
    """Loaded from a directory, by nothing but what is in it, the network gives the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        gnswap.save(case.conversion, f"{folder}/saved")
        loaded = gnswap.load(f"{folder}/saved")
        require(same(run(loaded, case.x[:1]), case.single_answer), "another output after loading")


def reverted(case: Case) -> None:
    """`revert` gives the original back: modules, tensors, output."""
    back = gnswap.revert(case.converted)
    classes = [[(path, type(module)) for path, module in one.named_modules()] for one in (back, case.original)]
    require(classes[0] == classes[1], "other modules after revert")
    one, two = back.state_dict(), case.original.state_dict()
    require(list(one) == list(two), "other names after revert")
    different = [name for name, value in two.items() if not value.is_meta and not torch.equal(value, one[name])]
    require(not different, f"other values after revert: {different[:5]}")
    if not case.x.is_meta:  # the same modules have the same shapes
        require(same(run(back, case.x), case.answers), "another output after revert")


def copied(case: Case) -> None:
    """A deep copy gives the same bits."""
    require(same(run(copy.deepcopy(case.converted), case.x[:1]), case.single_answer), "another output of the copy")


def pickled(case: Case) -> None:
    """So does a copy that went through pickle."""
    try:
        stored = pickle.dumps(case.converted)
    except Exception:
        of_original(lambda: pickle.dumps(case.original))
        raise
    require(same(run(pickle.loads(stored), case.x[:1]), case.single_answer), "another output after pickle")


def channels_last(case: Case) -> Row:
    """The memory format changes the output no more than it does in the original, and by no more than rounding."""
    x = case.x[:1].contiguous(memory_format=torch.channels_last)

    def error(model: nn.Module, expected: Any) -> float:
        return relative_error(run(copy.deepcopy(model).to(memory_format=torch.channels_last), x), expected)

    try:
        found = error(case.converted, case.single_answer)
    except Exception:  # such as of parameters with five axes, which have no such format
        of_original(lambda: error(case.original, case.single_answer))
        raise
    if found > 1e-4:
        allowed = 10 * error(case.original, run(case.original, case.x[:1]))
        require(found <= allowed, f"relative error {found:.2g}, ten times the original's is {allowed:.2g}")
    return {"channels_last_error": found}


def trained(case: Case) -> None:
    """A step on one sample: gradients are finite, norms and other weights change, the output stays finite."""
    model = copy.deepcopy(case.converted).train()
    loss = sum(tensor.square().mean() for tensor in flat(model(case.x[:1])))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    require(not bad, f"gradients that are not finite: {bad[:5]}")
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    require(bool(norm > 0), "all gradients are 0")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    norms = {path for decision in case.conversion.plan.swaps for path in decision.paths}
    of_norms = {name for name in changed if name.rpartition(".")[0] in norms}
    require(bool(of_norms), "no gamma changed")
    require(changed > of_norms, "no weight changed")
    require_finite(run(model.eval(), case.x[:1]), "the output after a step")


def features_only(case: Case) -> None:
    """timm's feature extractor converts as well, and gives the original's shapes."""
    x = case.x[:1]
    original = of_original(lambda: build(case.name, x.device.type, features_only=True))
    expected = of_original(lambda: run(original, x))
    if not find_norms(original):
        raise DoesNotApply("no BatchNorm in the feature extractor")
    found = run(gnswap.convert(original).model, x)
    require_shapes(found, expected)
    require_finite(found, "a feature map")


def reset_classifier(case: Case) -> None:
    """A new classifier can be put on; it is a new layer, so BatchNorms in it are new ones."""
    original = copy.deepcopy(case.original)
    of_original(lambda: original.reset_classifier(7))
    expected = of_original(lambda: run(original, case.x[:1]))
    model = copy.deepcopy(case.converted)
    model.reset_classifier(7)
    found = run(model, case.x[:1])
    require_shapes(found, expected)
    require_finite(found, "the output of the new classifier")


def forward_features(case: Case) -> None:
    """`forward_features` and then `forward_head` is the whole forward."""
    expected = of_original(lambda: _in_two_steps(case.original, case.x[:1]))
    found = _in_two_steps(case.converted, case.x[:1])
    require_shapes(found, expected)
    if same(expected, case.answers if len(case.x) == 1 else run(case.original, case.x[:1])):
        require(same(found, case.single_answer), "another output than in one step")


def _in_two_steps(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model.forward_head(model.forward_features(x))


def fused_before(case: Case) -> Row:
    """A network that timm has re-parameterised first converts as well, where BatchNorms are left."""
    _require_fusable(case.original)
    original = of_original(lambda: timm.utils.reparameterize_model(case.original))
    expected = of_original(lambda: run(original, case.x))
    left = len(find_norms(original))
    if not left:
        try:
            gnswap.convert(original)
        except gnswap.NothingToSwapError:
            return {"norms_after_fusing": 0}
        raise Fault("there was nothing to convert")
    found = run(gnswap.convert(original).model, case.x)
    require_shapes(found, expected)
    require_finite(found, "the output of the fused network")
    return {"norms_after_fusing": left}


def fused_after(case: Case) -> None:
    """Re-parameterising the converted network changes nothing, or fails and says what to do."""
    _require_fusable(case.original)
    of_original(lambda: timm.utils.reparameterize_model(case.original))
    try:
        fused = timm.utils.reparameterize_model(case.converted)
    except Exception as error:
        require("before the conversion" in str(error), f"unclear: {type(error).__name__}: {error}")
        return
    error = relative_error(run(fused, case.x[:1]), case.single_answer)
    require(error < 1e-3, f"fused without an error, but the output is another one: {error:.2g}")


def _require_fusable(model: nn.Module) -> None:
    names = ("fuse", "reparameterize", "switch_to_deploy")
    if not any(hasattr(module, name) for module in model.modules() for name in names):
        raise DoesNotApply("nothing to fuse")


CHECKS: dict[str, Callable[[Case], Row | None]] = {
    "no norm left": no_norm_left,
    "output": output,
    "closer than naive": closer_than_naive,
    "batch independence": batch_independent,
    "save and load": saved_and_loaded,
    "revert": reverted,
    "deepcopy": copied,
    "pickle": pickled,
    "channels_last": channels_last,
    "train step": trained,
    "features_only": features_only,
    "reset_classifier": reset_classifier,
    "forward_features": forward_features,
    "fuse, then convert": fused_before,
    "convert, then fuse": fused_after,
}
WITHOUT_VALUES = frozenset(
    {"no norm left", "output", "revert", "deepcopy", "features_only", "reset_classifier", "forward_features"}
)
"""The checks that mean something on the meta device."""
