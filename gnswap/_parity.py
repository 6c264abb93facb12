"""Parity as data: how far an ONNX file's numbers are from the exact ones, beside how far torch's own are.

Why every bound is a multiple of torch's own error: a fixed tolerance is too wide for a short network and too narrow
for a deep one. The same network in fp64 tells what torch's own arithmetic in the file's precision loses, on the same
input; a file that is right loses about as much, in another order of summation. Why relative to the largest entry and
not to each: rounding errors of a network scale with the activations that were summed, so an output near zero has the
same absolute error as a large one.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from gnswap._record import Record

FACTOR = {torch.float64: 128.0, torch.float32: 128.0, torch.float16: 8.0, torch.bfloat16: 8.0}
"""How many times torch's own error a file may be off. In half precision the rounding of every stored value dominates,
which both sides do alike. In fp32 files of `export_onnx` were measured at 1 to 8 times torch's error in onnxruntime
(1.31.1, CPU, EfficientNet-Lite0 and resnet18) on most inputs and at up to 77 times on a constant image, through groups
of 100,000 numbers, which onnxruntime adds up from the first to the last; its unsafe GroupNormalization is at over
1000."""

FLOOR_IN_EPS = 16.0
"""The bound is never below this many units of rounding of the file's precision: on a few numbers torch's error may
be zero by chance."""

CAP = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.25}
"""The bound is never above this: where torch itself loses that much, no file can be judged."""

WITHOUT_EXACT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Bound on the difference from torch where there is no fp64 run to say what torch's own error is."""

_POSITIONS = 512  # entries of a channel by which it is known again


@dataclasses.dataclass(frozen=True)
class OutputParity(Record):
    """One output for one input.

    Attributes:
        name: of the output.
        input_shapes: of the inputs, as "2x3x224x224".
        shape: of the output.
        max_error: largest absolute difference from torch's run in the file's precision; infinity where the file
            gives NaN or infinity.
        scale: largest absolute value of torch's output.
        relative_error: max_error / scale (max_error itself where scale is 0).
        top1_agreement: share of rows with the same largest entry, where the output looks like logits
            (two axes, at least two classes); not part of the verdict.
        passed: the error is within the bound; for integer outputs: equal.
        inputs: which inputs these are: "given", "batch 1", "all zero" and so on.
        error: the file's distance from the fp64 run, relative to its largest entry; None without such a run.
        torch_error: the same of torch's own run in the file's precision.
        bound: what `error` (without fp64: `relative_error`) must not exceed.
        top1_original: as `top1_agreement`, against the BatchNorm original.
    """

    name: str
    input_shapes: tuple[str, ...]
    shape: tuple[int, ...]
    max_error: float
    scale: float
    relative_error: float
    top1_agreement: float | None
    passed: bool
    inputs: str = "given"
    error: float | None = None
    torch_error: float | None = None
    bound: float = 0.0
    top1_original: float | None = None


@dataclasses.dataclass(frozen=True)
class LayerParity(Record):
    """One call of one norm, on the first inputs.

    Attributes:
        name: path of the layer in the torch model.
        value: name of its result in the file.
        shape: of that result.
        scale: largest absolute value in it.
        error, torch_error, bound, passed: as in `OutputParity`.
        reordered: the file stores its channels in another order.
    """

    name: str
    value: str
    shape: tuple[int, ...]
    scale: float
    error: float
    torch_error: float
    bound: float
    passed: bool
    reordered: bool = False


@dataclasses.dataclass(frozen=True)
class Placed(Record):
    """Where onnxruntime put the nodes of one operator.

    Attributes:
        provider: onnxruntime's name of the execution provider.
        operator: its type.
        nodes: how many of them.
    """

    provider: str
    operator: str
    nodes: int


@dataclasses.dataclass(frozen=True)
class Parity(Record):
    """onnxruntime against torch.

    Attributes:
        path, provider: what ran, and where; every node of it ran there.
        tolerance: the bound on every relative error that was asked for; None where each row has its own.
        outputs: one entry for every output of every input.
        notes: what was not compared, and why.
        versions: of torch and onnxruntime, and the device where there is one.
        precision: of the file: "float32", "float16" or "bfloat16".
        layers: one entry for every call of every norm in the order of execution, where asked for.
        placement: the node assignment as onnxruntime reported it.
    """

    path: str
    provider: str
    tolerance: float | None
    outputs: tuple[OutputParity, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    precision: str = "float32"
    layers: tuple[LayerParity, ...] = ()
    placement: tuple[Placed, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there is at least one comparison and every one passed, those of layers too."""
        return bool(self.outputs) and all(row.passed for row in self.outputs) and self.first_departure is None

    @property
    def worst(self) -> OutputParity:
        """The comparison with the largest relative error."""
        return max(self.outputs, key=lambda output: output.relative_error)

    @property
    def first_departure(self) -> LayerParity | None:
        """The first norm, in the order of execution, that is outside its bound; None where every one is within."""
        return next((layer for layer in self.layers if not layer.passed), None)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry of `expected` (absolute where that is 0); NaN is infinity."""
    if not expected.numel():
        return 0.0
    scale = float(expected.abs().amax())
    error = float((found - expected).abs().amax())
    return (error / scale if scale else error) if math.isfinite(error) else math.inf


def bound_of(torch_error: float, precision: torch.dtype) -> float:
    """How far a file of that precision may be from fp64 where torch itself is `torch_error` away.

    Example:
        >>> bound_of(1e-6, torch.float32)
        0.000128
    """
    floor = FLOOR_IN_EPS * torch.finfo(precision).eps
    return min(max(floor, FACTOR[precision] * torch_error), CAP[precision])


def top1(found: Tensor, expected: Tensor) -> float | None:
    """Share of rows with the same largest entry; None where these do not look like logits."""
    if not (expected.is_floating_point() and expected.dim() == 2 and expected.shape[1] > 1 and len(expected)):
        return None
    return float((found.argmax(1) == expected.argmax(1)).double().mean())


def layer_row(
    name: str,
    value: str,
    found: Tensor,
    own: Tensor,
    exact: Tensor,
    *,
    precision: torch.dtype,
    tolerance: float | None = None,
) -> LayerParity:
    """Compare the result of one norm in the file with torch's own run and the fp64 run, all fp64 `[N, C, ...]`.

    An exporter may store the channels of an inner value in another order and undo that in the weights of the next
    layer. So where the natural order is off, the order is looked for in the numbers. A wrong order is not overlooked:
    it shows in the layers after.
    """
    torch_error, error = distance(own, exact), distance(found, exact)
    bound, reordered = tolerance or bound_of(torch_error, precision), False
    if error > bound and found.dim() > 1:
        other = distance(found, exact.index_select(1, _order_in(found, exact)))
        error, reordered = min(error, other), other < error
    return LayerParity(
        name=name or "(root)",
        value=value,
        shape=tuple(exact.shape),
        scale=float(exact.abs().amax()),
        error=error,
        torch_error=torch_error,
        bound=bound,
        passed=error <= bound,
        reordered=reordered,
    )


def _order_in(found: Tensor, exact: Tensor) -> Tensor:
    """For each channel of `found` the one of `exact` that is most like it, each once."""
    flat = [value.movedim(1, 0).flatten(1) for value in (found, exact)]
    few = slice(None, None, max(flat[0].shape[1] // _POSITIONS, 1))
    nearest = torch.cdist(flat[0][:, few].contiguous(), flat[1][:, few].contiguous()).argmin(1).tolist()
    taken: set[int] = set()
    order = []
    for one in nearest:
        order.append(-1 if one in taken else one)
        taken.add(one)
    # what is left is channels that are equal, as those are that an activation has made all zero
    rest = iter(sorted(set(range(len(order))) - taken))
    return torch.tensor([next(rest) if one < 0 else one for one in order])


def output_row(
    name: str,
    inputs: str,
    sizes: tuple[str, ...],
    found: Tensor,
    own: Tensor,
    exact: Tensor | None,
    *,
    precision: torch.dtype,
    tolerance: float | None = None,
    original: Tensor | None = None,
) -> OutputParity:
    """Compare one output of the file with torch's own run and the fp64 run of the same shape."""
    row = OutputParity(
        name=name,
        input_shapes=sizes,
        shape=tuple(own.shape),
        max_error=0.0,
        scale=float(own.double().abs().amax()) if own.numel() else 0.0,
        relative_error=distance(found.double(), own.double()),
        top1_agreement=top1(found, own),
        passed=True,
        inputs=inputs,
        top1_original=None if original is None or original.shape != own.shape else top1(found, original),
    )
    row = dataclasses.replace(row, max_error=row.relative_error * (row.scale or 1.0))
    if not own.is_floating_point():
        return dataclasses.replace(row, passed=row.max_error == 0.0)
    if exact is None:
        bound = tolerance or WITHOUT_EXACT[precision]
        return dataclasses.replace(row, bound=bound, passed=row.relative_error <= bound)
    torch_error = distance(own.double(), exact)
    bound, error = tolerance or bound_of(torch_error, precision), distance(found.double(), exact)
    return dataclasses.replace(row, error=error, torch_error=torch_error, bound=bound, passed=error <= bound)
