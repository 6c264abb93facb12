"""What the nodes of an ONNX file cost, by onnxruntime's own profile, and what kind of work that is.

Why by the file's names and not by operators alone: a GroupNorm is written with Reshape, Mul, Add or even Conv, which
other layers use as well; the module path of a node says whose it is, and survives most of onnxruntime's fusions.
"""

from __future__ import annotations

import collections
import json
import re
import statistics
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from gnswap import _onnx_scopes, _timing
from gnswap._errors import ProviderError
from gnswap._providers import PROVIDERS
from gnswap._speed import Operator

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_NORMS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization", "BatchNormalization", "GroupNorm")
_LAYOUT = ("Reorder", "Transpose")
_ACTIVATIONS = frozenset(
    {"Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "QuickGelu", "Gelu", "FastGelu", "BiasGelu", "LeakyRelu"}
    | {"Elu", "Tanh", "Softplus", "Mish"}
)
_WARM_UP, _RUNS = 3, 10


def operators(
    path: str, inputs: tuple[Tensor, ...], provider: str, *, threads: int | None, norms: Collection[str] = ()
) -> tuple[Operator, ...]:
    """Profile a file for ten runs.

    Args:
        path, inputs, provider, threads: as in `_timing.runner`.
        norms: paths of the modules that are norms, beside those that show in the file.

    Returns:
        the operators, slowest first; the milliseconds are sums over nodes of medians over runs.

    Raises:
        ProviderError: a node ran on another provider than the one asked for.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = _timing.runner(path, inputs, provider, threads=threads, profile=Path(folder) / "profile")
        for _ in range(_WARM_UP + _RUNS):
            run.step()
        events = json.loads(Path(run.session.end_profiling()).read_text())
    return summarise(events, _onnx_scopes.load(path).graph, PROVIDERS[provider], norms)


def summarise(events: list[dict[str, Any]], graph: Any, provider: str, norms: Collection[str]) -> tuple[Operator, ...]:
    """Add up the node events of a profile by operator and kind of work.

    Raises:
        ProviderError: a node ran on another provider than `provider`, or something was copied between devices.
    """
    times: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, about = event["name"].removesuffix("_kernel_time"), event["args"]
            times[name, about["op_name"], about["provider"]].append(event["dur"] / 1e3)
    strays = sorted(
        f"{name} ({kind}) on {where}"
        for name, kind, where in times
        if where != provider or kind.startswith("Memcpy")  # a copy between devices: something lives on the other
    )
    if strays:
        raise ProviderError(
            f"{len(strays)} nodes ran elsewhere than on {provider}, by onnxruntime's profile",
            found=", ".join(strays[:10]),
        )
    owners = _Owners(graph, norms)
    sums: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    for (name, kind, where), durations in times.items():
        late = durations[_WARM_UP:] or durations
        sums[kind, owners.part(name, kind), where].append(statistics.median(late))
    rows = [Operator(kind, part, where, len(each), sum(each)) for (kind, part, where), each in sums.items()]
    return tuple(sorted(rows, key=lambda row: -row.ms))


class _Owners:
    """Tells what kind of work a node of onnxruntime's optimised graph is."""

    def __init__(self, graph: Any, norms: Collection[str]) -> None:
        self.nodes = {node.name: node for node in graph.node}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        scopes = {_onnx_scopes.scope_of(node) for node in graph.node if node.op_type in _NORMS}
        self.norms = {scope for scope in scopes if scope} | set(norms)
        # what onnxruntime makes of a GroupNormalization has no names of ours
        self.inlined = any(node.op_type == "GroupNormalization" for node in graph.node)

    def part(self, name: str, kind: str) -> str:
        """One of `_speed.PARTS` for a node of that name and operator."""
        if kind.startswith(_LAYOUT):
            return "layout"
        node = self._origin(name)
        if any(product in kind for product in _PRODUCTS):
            # fusions name a Conv after the last thing that it took in
            while node is not None and not node.op_type.startswith(_PRODUCTS):
                node = self.producers.get(node.input[0]) if node.input else None
            return "normalisation" if node is not None and self._is_affine(node) else "convolution"
        if kind in _ACTIVATIONS:
            return "activation"
        if kind in _NORMS or (node is not None and self._in_norm(node)):
            return "normalisation"
        return "normalisation" if node is None and self.inlined else "other"

    def _origin(self, name: str) -> Any:
        plain = re.sub(r"_nchwc$|_token_\d+$", "", name)
        return self.nodes.get(plain) or self.producers.get(plain)

    def _is_affine(self, node: Any) -> bool:
        """Whether this is a depthwise 1x1 Conv, which is how gamma and beta may be written."""
        weight = self.weights.get(node.input[1], ()) if node.op_type == "Conv" else ()
        return len(weight) > 2 and set(weight[1:]) == {1} and self._in_norm(node)

    def _in_norm(self, node: Any) -> bool:
        scope = _onnx_scopes.scope_of(node)
        return any(_onnx_scopes.inside(scope, path) for path in self.norms)
