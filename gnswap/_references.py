"""The torch side of a parity: the network in the file's precision, and in fp64 as the truth.

Why fp64 of the model as it is: the file's weights may be rounded to half precision, and that loss belongs to the file.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gnswap import _running, _sites
from gnswap._layer import FusedGroupNorm

Case = tuple[Tensor, ...]


class References:
    """One torch model, to be run in two precisions.

    Args:
        model: left untouched; it is run itself where it has the file's precision.
        precision: of the file.

    Attributes:
        notes: what could not be done, and why.
    """

    def __init__(self, model: nn.Module, precision: torch.dtype) -> None:
        kinds = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
        self.notes: list[str] = []
        self.own = model if kinds <= {precision} else copy.deepcopy(model).to(precision)
        self.exact: nn.Module | None = None
        try:
            self.exact = copy.deepcopy(model).double()
        except Exception as error:  # deepcopy raises what the members raise
            self._without_exact(error)

    def run(self, case: Case) -> tuple[list[Tensor], list[Tensor] | None]:
        """The outputs in the file's precision and in fp64 (None where the model does not run in it), on the CPU.

        Raises whatever the model raises in the file's precision.
        """
        own, exact = outputs(self.own, case), None
        if self.exact is not None:
            try:
                exact = [value.double() for value in outputs(self.exact, case)]
            except Exception as error:  # a model with fp32 written into its forward
                self._without_exact(error)
        return own, exact

    def norms(self, case: Case) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """What each norm gave at each call, in the file's precision and in fp64; in the order of execution.

        Calls with the same result count once: a file holds them once.
        """
        own = _heard(self.own, lambda: outputs(self.own, case))
        if (model := self.exact) is None:
            return {}
        exact = _heard(model, lambda: outputs(model, case))
        if {name: len(calls) for name, calls in own.items()} != {name: len(calls) for name, calls in exact.items()}:
            return {}  # a forward that was patched onto the instance, and does not run the copy
        return {name: _distinct(list(zip(calls, exact[name], strict=True))) for name, calls in own.items()}

    def _without_exact(self, error: Exception) -> None:
        self.exact = None
        self.notes.append(
            f"the model does not run in fp64 ({type(error).__name__}: {str(error).splitlines()[0]:.120}), so torch's "
            "own error is not known and the bound is a fixed one"
        )


@contextlib.contextmanager
def in_eval(references: References) -> Iterator[None]:
    """Eval mode for both models; afterwards every module has its own flag again."""
    with _running.eval_mode(references.own, *([references.exact] if references.exact else [])), torch.no_grad():
        yield


def outputs(model: nn.Module, case: Case) -> list[Tensor]:
    """The model's outputs, on the CPU, in the order of the ONNX file's outputs."""
    leaves = torch.utils._pytree.tree_leaves(model(*(_running.placed(value, model) for value in case)))
    return [leaf.cpu() for leaf in leaves if isinstance(leaf, Tensor)]


def with_affine(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """`gamma * x + beta` of the norm at `path`, in fp64; x `[N, C, ...]`."""
    norm = model.get_submodule(path)
    assert isinstance(norm, FusedGroupNorm | nn.GroupNorm)
    weight, bias = norm.effective_affine() if isinstance(norm, FusedGroupNorm) else (norm.weight, norm.bias)
    shape = (-1, *[1] * (x.dim() - 2))
    if weight is not None:
        x = x * weight.detach().double().cpu().reshape(shape)
    return x if bias is None else x + bias.detach().double().cpu().reshape(shape)


def norm_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every GroupNorm by its first path, with all its paths."""
    found: dict[int, list[str]] = {}
    for path, module in _sites.walk(model):
        if isinstance(module, FusedGroupNorm | nn.GroupNorm):
            found.setdefault(id(module), []).append(path)
    return {paths[0]: tuple(paths) for paths in found.values()}


def _distinct(calls: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    kept: list[tuple[Tensor, Tensor]] = []
    for call in calls:
        if not any(torch.equal(call[1], other[1]) for other in kept):
            kept.append(call)
    return kept


def _heard(model: nn.Module, run: Callable[[], object]) -> dict[str, list[Tensor]]:
    heard: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Callable[[nn.Module, object, object], None]:
        def hear(_module: nn.Module, _inputs: object, output: object) -> None:
            assert isinstance(output, Tensor)
            # a copy: an activation in place may follow
            heard.setdefault(name, []).append(output.detach().to("cpu", torch.float64, copy=True))

        return hear

    handles = [model.get_submodule(name).register_forward_hook(listen(name)) for name in norm_paths(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return heard
