"""Which lowering a norm gets: one table of what each target can run, and the order in which it is tried.

Why a table: what is fastest differs by provider and by thread count, what is possible by dtype, rank and whether sizes
are known; the reasons stand with each lowering. On a machine with the provider at hand, `autotune` measures instead.
"""

from __future__ import annotations

import dataclasses

from gnswap._onnx.lowering import Lowering
from gnswap._onnx.lowerings.instance_norm import INSTANCE_NORM
from gnswap._onnx.lowerings.instance_norm_batch_norm import INSTANCE_NORM_BATCH_NORM
from gnswap._onnx.lowerings.layer_norm import LAYER_NORM
from gnswap._onnx.lowerings.layer_norm_batch_norm import LAYER_NORM_BATCH_NORM
from gnswap._onnx.lowerings.layer_norm_conv import LAYER_NORM_CONV
from gnswap._onnx.norm import Norm


@dataclasses.dataclass(frozen=True)
class Target:
    """What a file is written for.

    Attributes:
        name: as `export_onnx` takes it.
        lowerings: best first; the last one can write every norm.
        reason: why in this order.
        shape_nodes: whether nodes that read sizes at run time are fine. Strict sessions on a GPU refuse them, since
            onnxruntime runs them on the CPU.
        max_opset: newest opset that the provider is known to have kernels for.
    """

    name: str
    lowerings: tuple[Lowering, ...]
    reason: str
    shape_nodes: bool = True
    max_opset: int = 24


_CPU_PARALLEL = Target(
    "cpu",
    (LAYER_NORM_CONV, LAYER_NORM_BATCH_NORM, LAYER_NORM, INSTANCE_NORM_BATCH_NORM, INSTANCE_NORM),
    "fastest on onnxruntime's CPU provider with several threads",
)
_CPU_SERIAL = Target(
    "cpu",
    (INSTANCE_NORM_BATCH_NORM, INSTANCE_NORM, LAYER_NORM_CONV, LAYER_NORM_BATCH_NORM, LAYER_NORM),
    "fastest on onnxruntime's CPU provider with one thread",
)
_OTHERS = (
    Target("portable", (INSTANCE_NORM,), "kernels for it are everywhere"),
    Target(
        "cuda",
        (INSTANCE_NORM, LAYER_NORM, LAYER_NORM_BATCH_NORM, INSTANCE_NORM_BATCH_NORM),
        "not measured here: --autotune on the GPU finds the best",
        shape_nodes=False,
        max_opset=21,
    ),
    Target(
        "tensorrt",
        (INSTANCE_NORM, LAYER_NORM, LAYER_NORM_BATCH_NORM),
        "TensorRT has a layer of its own for it",
        shape_nodes=False,
        max_opset=21,
    ),
)
TARGETS = ("portable", "cpu", "cuda", "tensorrt")


def target_of(name: str, threads: int | None) -> Target:
    """The target of this name; for the CPU with so many threads in one operator (None: several)."""
    if name == "cpu":
        return _CPU_SERIAL if threads == 1 else _CPU_PARALLEL
    return next(target for target in _OTHERS if target.name == name)


def refusal(lowering: Lowering, norm: Norm, target: Target) -> str | None:
    """Why a norm cannot be written in this way for a target; None where it can."""
    if norm.rank not in lowering.ranks:
        return f"{lowering.name} is for {', '.join(map(str, lowering.ranks))} axes"
    if lowering.shape_nodes and norm.positions is None and not target.shape_nodes:
        return f"{lowering.name} reads sizes at run time where they are dynamic"
    if target.name == "tensorrt" and norm.num_groups == 1 and lowering.statistics is INSTANCE_NORM.statistics:
        return "TensorRT takes one group for an instance norm (NVIDIA/TensorRT#4756)"
    return None


def candidates(norm: Norm, target: Target) -> list[Lowering]:
    """The lowerings that can write a norm, best first; never empty."""
    able = [lowering for lowering in target.lowerings if refusal(lowering, norm, target) is None]
    return able or [INSTANCE_NORM]


def choose(norm: Norm, target: Target) -> tuple[Lowering, str]:
    """The lowering for a norm, and why."""
    chosen = candidates(norm, target)[0]
    refused = [reason for one in target.lowerings if one is not chosen and (reason := refusal(one, norm, target))]
    first = target.lowerings[0]
    return chosen, target.reason if chosen is first else "; ".join(refused[:1] or [target.reason])
