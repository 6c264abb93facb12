"""validate_onnx: does the ONNX file compute what the torch model computes, and where was asked?

Why against fp64 and not against torch alone: two fp32 runs differ by the sum of two rounding errors, and nothing in
that number says whether it is much. `gnswap._parity` says how the bound follows from torch's own error.
"""

from __future__ import annotations

import collections
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gnswap import _onnx_scopes, _parity, _providers, _references, _running, _sites, _stress
from gnswap._errors import ArgumentError, ValidationError
from gnswap._parity import LayerParity, OutputParity, Parity, Placed

_LAYER_ROWS = 2  # samples on which single layers are compared: all their results are held in memory at once

_CLOSE = 8.0  # a bound within so many times torch's own error is one that the cap has made narrow


def validate_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]],
    *,
    provider: str = "cuda",
    tolerance: float | None = None,
    more_shapes: bool = True,
    special_inputs: bool = True,
    layers: bool = False,
    original: nn.Module | None = None,
) -> Parity:
    """Run an ONNX file and its torch model on the same inputs and compare every output.

    The model runs twice: in the file's precision, and in fp64 as the truth. The file passes where its distance from
    the truth is at most 128 times torch's own in fp32, 8 times in half precision (with a floor of 16 units of
    rounding, and a cap). Beside the inputs as given, batch 1, a larger batch and two other sizes are tried where the
    file says that these axes are dynamic, and inputs that careless normalisations fail on: all zero, constant,
    mean/std 30, tiny variance, huge contrast.
    The model runs in eval mode on its own device; its train flags are restored.

    Args:
        path: the ONNX file; fp32, fp16 or bf16.
        model: what it was exported from.
        inputs: a tensor; a tuple of tensors for a model of several inputs; or a list of such batches. fp32 inputs of
            a half-precision file are rounded to its type first, for both sides.
        provider: "cpu", "cuda" or "tensorrt"; every node has to run there.
        tolerance: a bound of your own on the relative error of every row, instead of the derived ones.
        more_shapes: whether to try other batches and sizes than the given ones.
        special_inputs: whether to try the special inputs.
        layers: also compare what every GroupNorm gives, on up to 2 of the first inputs: `Parity.first_departure`
            names the first that is off.
        original: the network before its conversion; adds how often its top-1 answer on the given inputs is the
            file's.

    Returns:
        one row for every output of every input. A file that differs does not raise: look at `passed`.

    Raises:
        ArgumentError: no inputs, a wrong number of them, or shapes and dtypes that the file does not take.
        ProviderError: the provider does not run here, or not every node runs on it.
        ValidationError: onnxruntime cannot run the file, torch's own output on the given inputs is not finite, or
            the outputs of the two have different numbers or shapes.
        MissingDependencyError: onnxruntime or onnx is missing.

    Example:
        >>> import tempfile, torch, gnswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), gnswap.FusedGroupNorm(2, 8))
        >>> x = torch.randn(2, 3, 16, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = gnswap.export_onnx(model, f"{folder}/net.onnx", x)
        ...     gnswap.validate_onnx(report.path, model, x, provider="cpu").passed
        True
    """
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise ArgumentError(
            "tolerance out of range", where="tolerance", expected="more than 0, finite", found=repr(tolerance)
        )
    for one in (model, *([original] if original is not None else [])):
        _sites.require_plain(one)
    cases = _providers.as_cases(inputs)
    session = _providers.open_session(path, provider)
    cases = [_providers.fitted(session, case) for case in cases]
    proto = _onnx_scopes.load(path)
    precision = _onnx_scopes.precision_of(proto)
    references = _references.References(model, precision)
    judge = _Judge(session, references, precision, tolerance)
    found_layers: list[LayerParity] = []
    with _references.in_eval(references):
        for case in cases:
            judge.given(case, original)
        axes = _dynamic_axes(session)
        more = (
            *(_stress.other_sizes(cases[0], axes) if more_shapes else ()),
            *(_stress.special_cases(cases[0], axes) if special_inputs else ()),
        )
        for name, case in more:
            judge.extra(name, case)
        if layers:
            few = _stress.resized(cases[0], axes, {"batch": min(_LAYER_ROWS, cases[0][0].shape[0])})
            found_layers = list(_layers(path, proto, provider, few, judge))
    return Parity(
        path=os.fspath(path),
        provider=provider,
        tolerance=tolerance,
        outputs=tuple(judge.rows),
        notes=(*references.notes, *judge.notes),
        versions=_providers.versions(provider),
        precision=str(precision).removeprefix("torch."),
        layers=tuple(found_layers),
        placement=_placement(session),
    )


class _Judge:
    """Runs the file and the references on one case after the other and keeps a row for every output."""

    def __init__(
        self, session: Any, references: _references.References, precision: torch.dtype, tolerance: float | None
    ) -> None:
        self.session, self.references, self.precision, self.tolerance = session, references, precision, tolerance
        self.rows: list[OutputParity] = []
        self.notes: list[str] = []

    def given(self, case: tuple[Tensor, ...], original: nn.Module | None) -> None:
        own, exact = self.references.run(case)
        for name, value in zip(self._names(own), own, strict=False):
            if not bool(torch.isfinite(value).all()):
                raise ValidationError(
                    "the torch model's own output is not finite, so there is nothing to compare with",
                    where=f"{name}, input {', '.join(_sizes(case))}",
                    fix="Look at the inputs and at the model's parameters for NaN and infinity.",
                )
        others = None
        if original is not None:
            with _running.eval_mode(original):
                others = _references.outputs(original, case)
        self._compare("given", case, own, exact, others)

    def extra(self, name: str, case: tuple[Tensor, ...]) -> None:
        try:
            own, exact = self.references.run(case)
        except Exception as error:  # the network itself does not take this size
            self.notes.append(f"{name} not compared, the model itself raises {type(error).__name__}")
            return
        if not all(bool(torch.isfinite(value).all()) for value in own):
            self.notes.append(f"{name} not compared, torch's own output in {self.precision} is not finite")
            return
        self._compare(name, case, own, exact, None)

    def _names(self, own: list[Tensor]) -> list[str]:
        names = [output.name for output in self.session.get_outputs()]
        if len(names) != len(own):
            raise ValidationError(
                "the file and the model have different numbers of outputs",
                expected=f"{len(own)} (torch)",
                found=f"{len(names)} in the file: {', '.join(names)}",
            )
        return names

    def _compare(
        self,
        inputs: str,
        case: tuple[Tensor, ...],
        own: list[Tensor],
        exact: list[Tensor] | None,
        original: list[Tensor] | None,
    ) -> None:
        for number, (name, found) in enumerate(zip(self._names(own), _providers.run(self.session, case), strict=True)):
            if found.shape != own[number].shape:
                raise ValidationError(
                    "the outputs have different shapes",
                    where=f"{name}, input {', '.join(_sizes(case))}",
                    expected=f"{tuple(own[number].shape)} (torch)",
                    found=f"{tuple(found.shape)}",
                )
            row = _parity.output_row(
                name,
                inputs,
                tuple(_sizes(case)),
                found,
                own[number],
                None if exact is None else exact[number],
                precision=self.precision,
                tolerance=self.tolerance,
                original=original[number] if original is not None and number < len(original) else None,
            )
            self.rows.append(row)
            lost = row.torch_error or 0.0
            if _CLOSE * lost > row.bound and self.tolerance is None:
                self.notes.append(
                    f"{name}, {inputs}: torch's own error in {self.precision} is {lost:.1e}; the bound is capped"
                )


def _layers(
    path: str | os.PathLike[str], proto: Any, provider: str, case: tuple[Tensor, ...], judge: _Judge
) -> Iterator[LayerParity]:
    """Every norm's result in the file beside torch's, in torch's order of execution."""
    expected = judge.references.norms(case)
    if not expected:
        judge.notes.append("layers not compared: there is no fp64 run of them, or the model has no GroupNorm")
        return
    paths = _references.norm_paths(judge.references.own)
    values = _onnx_scopes.results(proto.graph, paths)
    unclear = [name for name, calls in expected.items() if len(values[name]) != len(calls)]
    if unclear:
        more = f" and {len(unclear) - 5} more" if len(unclear) > 5 else ""
        judge.notes.append(
            f"{len(unclear)} of {len(expected)} layers not compared, their results cannot be told apart in the file "
            f"by the names of its nodes: {', '.join(unclear[:5])}{more}"
        )
    wanted = {name: values[name] for name in expected if name not in unclear}
    if not wanted:
        return
    names = [value for listed in wanted.values() for value in listed]
    with tempfile.TemporaryDirectory() as folder:
        session = _providers.open_session(_onnx_scopes.with_outputs(path, names, Path(folder)), provider)
        heard = dict(zip([output.name for output in session.get_outputs()], _providers.run(session, case), strict=True))
    stored, behind = _onnx_scopes.layouts(proto), _onnx_scopes.affine_behind(proto)
    for name, listed in wanted.items():
        orders = next((stored[path] for path in paths[name] if path in stored), [None] * len(listed))
        bare = next((behind[path] for path in paths[name] if path in behind), [False] * len(listed))
        for value, order, is_bare, (own, exact) in zip(listed, orders, bare, expected[name], strict=True):
            found = heard[value].double()
            if order is not None:
                found = found[:, torch.argsort(torch.tensor(order))]
            if is_bare:
                found = _references.with_affine(judge.references.own, name, found)
            if found.shape != exact.shape:
                judge.notes.append(f"{name} not compared: {value} in the file is {tuple(found.shape)}")
                continue
            yield _parity.layer_row(
                name, value, found, own, exact, precision=judge.precision, tolerance=judge.tolerance
            )


def _dynamic_axes(session: Any) -> list[dict[str, int]]:
    return [
        {name: axis for axis, name in enumerate(one.shape) if isinstance(name, str)} for one in session.get_inputs()
    ]


def _placement(session: Any) -> tuple[Placed, ...]:
    counts = collections.Counter(
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )
    return tuple(Placed(provider, operator, nodes) for (provider, operator), nodes in counts.most_common())


def _sizes(case: tuple[Tensor, ...]) -> list[str]:
    return ["x".join(map(str, value.shape)) for value in case]
