"""validate_onnx: does the ONNX file compute what the torch model computes, and where was asked?

Why a bound relative to the largest output and not to each entry: rounding errors of a network scale with the
activations that were summed, so an output near zero has the same absolute error as a large one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnswap import _providers, _sites
from gnswap._errors import ArgumentError, ValidationError
from gnswap._record import Record


@dataclasses.dataclass(frozen=True)
class OutputParity(Record):
    """One output for one input.

    Attributes:
        name: of the output.
        input_shapes: of the inputs, as "2x3x224x224".
        shape: of the output.
        max_error: largest absolute difference; infinity where the file gives NaN or infinity.
        scale: largest absolute value of torch's output.
        relative_error: max_error / scale (max_error itself where scale is 0).
        top1_agreement: share of rows with the same largest entry, where the output looks like logits
            (two axes, at least two classes); not part of the verdict.
        passed: relative_error is within the tolerance; for integer outputs: equal.
    """

    name: str
    input_shapes: tuple[str, ...]
    shape: tuple[int, ...]
    max_error: float
    scale: float
    relative_error: float
    top1_agreement: float | None
    passed: bool


@dataclasses.dataclass(frozen=True)
class Parity(Record):
    """onnxruntime against torch.

    Attributes:
        path, provider: what ran, and where; every node of it ran there.
        tolerance: bound on relative_error.
        outputs: one entry for every output of every input.
        notes: what was not compared, and why.
        versions: of torch and onnxruntime.
    """

    path: str
    provider: str
    tolerance: float
    outputs: tuple[OutputParity, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether there is at least one comparison and every one passed."""
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    @property
    def worst(self) -> OutputParity:
        """The comparison with the largest relative error."""
        return max(self.outputs, key=lambda output: output.relative_error)


def validate_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]],
    *,
    provider: str = "cuda",
    tolerance: float = 1e-4,
    more_shapes: bool = True,
) -> Parity:
    """Run an ONNX file and its torch model on the same inputs and compare every output.

    Beside the inputs as given, batch 1, a larger batch and another height and width are tried where the file says
    that these axes are dynamic. The model runs in eval mode on its own device; its train flags are restored.

    Args:
        path: the ONNX file.
        model: what it was exported from.
        inputs: a tensor; a tuple of tensors for a model of several inputs; or a list of such batches.
        provider: "cpu", "cuda" or "tensorrt"; every node has to run there.
        tolerance: largest difference that passes, relative to the output's largest entry.
        more_shapes: whether to try other batches and sizes than the given ones.

    Returns:
        one row for every output of every input. A file that differs does not raise: look at `passed`.

    Raises:
        ArgumentError: no inputs, a wrong number of them, or shapes and dtypes that the file does not take.
        ProviderError: the provider does not run here, or not every node runs on it.
        ValidationError: onnxruntime cannot run the file, torch's own output is not finite, or the outputs of the
            two have different numbers or shapes.
        MissingDependencyError: onnxruntime is missing.

    Example:
        >>> import tempfile, torch, gnswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), gnswap.FusedGroupNorm(2, 8))
        >>> x = torch.randn(2, 3, 16, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = gnswap.export_onnx(model, f"{folder}/net.onnx", x)
        ...     gnswap.validate_onnx(report.path, model, x, provider="cpu").passed
        True
    """
    if not 0 < tolerance < math.inf:
        raise ArgumentError(
            "tolerance out of range", where="tolerance", expected="more than 0, finite", found=repr(tolerance)
        )
    _sites.require_plain(model)
    cases = _providers.as_cases(inputs)
    session = _providers.open_session(path, provider)
    for case in cases:
        _providers.check_case(session, case)
    rows: list[OutputParity] = []
    notes: list[str] = []
    with _in_eval(model), torch.no_grad():
        for case in cases:
            rows += _compare(session, case, _on_device(model, case), tolerance)
        for case in _other_shapes(session, cases[0]) if more_shapes else ():
            try:
                expected = _on_device(model, case)
            except Exception as error:  # the network itself does not take this size
                notes.append(f"{_sizes(case)[0]} not compared, the model itself raises {type(error).__name__}")
                continue
            rows += _compare(session, case, expected, tolerance)
    return Parity(
        path=os.fspath(path),
        provider=provider,
        tolerance=tolerance,
        outputs=tuple(rows),
        notes=tuple(notes),
        versions={
            "torch": str(torch.__version__),
            "onnxruntime": str(_providers.require_onnxruntime().__version__),
        },
    )


def _compare(session: Any, case: tuple[Tensor, ...], expected: list[Tensor], tolerance: float) -> list[OutputParity]:
    names = [output.name for output in session.get_outputs()]
    found = _providers.run(session, case)
    if len(found) != len(expected):
        raise ValidationError(
            "the file and the model have different numbers of outputs",
            expected=f"{len(expected)} (torch)",
            found=f"{len(found)} in the file: {', '.join(names)}",
        )
    return [
        _row(name, case, torch.from_numpy(np.asarray(one)), other, tolerance)
        for name, one, other in zip(names, found, expected, strict=True)
    ]


def _row(name: str, case: tuple[Tensor, ...], found: Tensor, expected: Tensor, tolerance: float) -> OutputParity:
    if found.shape != expected.shape:
        raise ValidationError(
            "the outputs have different shapes",
            where=f"{name}, input {', '.join(_sizes(case))}",
            expected=f"{tuple(expected.shape)} (torch)",
            found=f"{tuple(found.shape)}",
        )
    if not bool(torch.isfinite(expected).all()):
        raise ValidationError(
            "the torch model's own output is not finite, so there is nothing to compare with",
            where=f"{name}, input {', '.join(_sizes(case))}",
            fix="Look at the inputs and at the model's parameters for NaN and infinity.",
        )
    looks_like_logits = expected.is_floating_point() and expected.dim() == 2 and expected.shape[1] > 1
    agreement = None
    if looks_like_logits and expected.numel():
        agreement = float((found.argmax(1) == expected.argmax(1)).double().mean())
    exact = not expected.is_floating_point()
    found, expected = found.double(), expected.double()
    scale = float(expected.abs().amax()) if expected.numel() else 0.0
    error = float((found - expected).abs().amax()) if expected.numel() else 0.0
    error = error if math.isfinite(error) else math.inf
    relative = error / scale if scale else error
    return OutputParity(
        name=name,
        input_shapes=tuple(_sizes(case)),
        shape=tuple(expected.shape),
        max_error=error,
        scale=scale,
        relative_error=relative,
        top1_agreement=agreement,
        passed=error == 0.0 if exact else relative <= tolerance,
    )


def _other_shapes(session: Any, case: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Batch 1, a larger odd batch, and another height and width, where the file's axes are dynamic."""
    axes = [
        {name: axis for axis, name in enumerate(one.shape) if isinstance(name, str)} for one in session.get_inputs()
    ]
    if any("batch" in one for one in axes):
        batch = next(value.shape[one["batch"]] for value, one in zip(case, axes, strict=True) if "batch" in one)
        for size in {1, 2 * batch + 1} - {batch}:
            yield _resized(case, axes, {"batch": size})
    names = sorted({name for one in axes for name in one} - {"batch"})
    if names:
        # odd sizes, and different ones for each axis, so that swapped or rounded axes show
        yield _resized(case, axes, {name: 1 + 2 * (number + 8) for number, name in enumerate(names)}, grow=True)


def _resized(
    case: tuple[Tensor, ...], axes: list[dict[str, int]], sizes: dict[str, int], *, grow: bool = False
) -> tuple[Tensor, ...]:
    """The case with some named axes cut, or continued by repetition, to `sizes` (`grow`: by that many more)."""
    resized = []
    for value, named in zip(case, axes, strict=True):
        for name in sizes.keys() & named.keys():
            axis = named[name]
            length = sizes[name] + (value.shape[axis] if grow else 0)
            value = value.index_select(axis, torch.arange(length, device=value.device) % value.shape[axis])
        resized.append(value)
    return tuple(resized)


def _on_device(model: nn.Module, case: tuple[Tensor, ...]) -> list[Tensor]:
    """The model's outputs, on the CPU, in the order of the ONNX file's outputs."""
    state = next((tensor for tensor in model.state_dict().values() if tensor.is_floating_point()), None)
    if state is not None:
        case = tuple(value.to(state.device, state.dtype if value.is_floating_point() else None) for value in case)
    leaves = torch.utils._pytree.tree_leaves(model(*case))
    return [leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor)]


def _sizes(case: tuple[Tensor, ...]) -> list[str]:
    return ["x".join(map(str, value.shape)) for value in case]


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
