"""Which lowering a norm gets: one table of what each target can run, and the order in which it is tried.

Why a table: what is fastest differs by provider and by thread count, what is possible by dtype, rank and whether sizes
are known; the reasons stand with each lowering. On a machine with the provider at hand, `autotune` measures instead.
"""

from __future__ import annotations

import dataclasses

from gnswap._onnx.lowering import Lowering
from gnswap._onnx.lowerings.by_channel import BY_CHANNEL, BY_CHANNEL_BATCH_NORM
from gnswap._onnx.lowerings.instance_norm import INSTANCE_NORM
from gnswap._onnx.lowerings.instance_norm_batch_norm import INSTANCE_NORM_BATCH_NORM
from gnswap._onnx.lowerings.instance_norm_conv import INSTANCE_NORM_CONV
from gnswap._onnx.lowerings.layer_norm import LAYER_NORM
from gnswap._onnx.lowerings.layer_norm_batch_norm import LAYER_NORM_BATCH_NORM
from gnswap._onnx.lowerings.layer_norm_conv import LAYER_NORM_CONV
from gnswap._onnx.lowerings.two_step import TWO_STEP
from gnswap._onnx.norm import Norm

_LONG_ROW = 2**17  # numbers; beyond, sums from first to last lose digits, most on flat images


@dataclasses.dataclass(frozen=True)
class Target:
    """What a file is written for.

    Attributes:
        name: as `export_onnx` takes it.
        provider: of onnxruntime that runs it, or None.
        lowerings: best first; the first that can write a norm is chosen.
        reason: why in this order.
        single_row: those that come before where a sample has one group only, so that threads have no rows to share.
        long_row: those that come before all others where a group has so many numbers that onnxruntime's CPU kernels
            lose digits (in the example input, where sizes are dynamic), or nobody knows how many.
        shape_nodes: whether nodes that read sizes at run time are fine. Strict sessions on a GPU refuse them, since
            onnxruntime runs them on the CPU.
        opset: where none is asked for. 18 is known everywhere; 20 is the first with Gelu as one operator, without
            which a convnext-style network takes 1.2 times as long on the CPU.
        max_opset: newest opset that the provider is known to have kernels for.
    """

    name: str
    provider: str | None
    lowerings: tuple[Lowering, ...]
    reason: str
    single_row: tuple[Lowering, ...] = ()
    long_row: tuple[Lowering, ...] = ()
    shape_nodes: bool = True
    opset: int = 18
    max_opset: int = 24


_CPU_PARALLEL = Target(
    "cpu",
    "cpu",
    (LAYER_NORM_CONV, LAYER_NORM_BATCH_NORM, LAYER_NORM),
    "fastest on onnxruntime's CPU provider with several threads",
    single_row=(INSTANCE_NORM_CONV, INSTANCE_NORM_BATCH_NORM),
    long_row=(BY_CHANNEL, TWO_STEP),
    opset=20,
)
_CPU_SERIAL = Target(
    "cpu",
    "cpu",
    (INSTANCE_NORM_CONV, INSTANCE_NORM_BATCH_NORM, INSTANCE_NORM),
    "fastest on onnxruntime's CPU provider with one thread",
    long_row=(BY_CHANNEL_BATCH_NORM, TWO_STEP),
    opset=20,
)
_OTHERS = (
    Target(
        "portable",
        None,
        (INSTANCE_NORM, LAYER_NORM),
        "kernels for it are everywhere",
        long_row=(TWO_STEP,),
        shape_nodes=False,
    ),
    Target(
        "cuda",
        "cuda",
        (INSTANCE_NORM, LAYER_NORM, INSTANCE_NORM_BATCH_NORM, LAYER_NORM_BATCH_NORM),
        "accurate, and a kernel for it; not timed: autotune on the GPU finds the fastest",
        shape_nodes=False,
        max_opset=21,
    ),
    Target(
        "tensorrt",
        "tensorrt",
        (INSTANCE_NORM, LAYER_NORM, LAYER_NORM_BATCH_NORM, TWO_STEP),
        "TensorRT has a layer of its own for it; not timed: autotune on the GPU finds the fastest",
        shape_nodes=False,
        max_opset=21,
    ),
)
_OF_CHANNELS = (BY_CHANNEL.form, BY_CHANNEL_BATCH_NORM.form)
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
        return f"{lowering.name} would read sizes at run time, which are dynamic"
    if target.name == "tensorrt" and norm.num_groups == 1 and lowering.form is INSTANCE_NORM.form:
        return "TensorRT takes one group for an instance norm (NVIDIA/TensorRT#4756)"
    if lowering.form in _OF_CHANNELS and (norm.channel_length is None or norm.channel_length > _LONG_ROW):
        length = norm.channel_length or "an unknown number of"
        return f"{lowering.name} would add up {length} numbers of a channel one by one"
    return None


def candidates(norm: Norm, target: Target) -> list[tuple[Lowering, str]]:
    """The lowerings that can write a norm, best first, each with the reason for its place; never empty."""
    ranked = [(lowering, target.reason) for lowering in target.lowerings]
    if norm.rows == 1 and target.single_row:
        reason = "one group is one row, on which only one thread works"
        ranked = [*((lowering, reason) for lowering in target.single_row), *ranked]
    if not norm.is_half and (norm.row_length is None or norm.row_length > _LONG_ROW):
        reason = "keeps its digits in rows of any length"
        exact = [(lowering, reason) for lowering in target.long_row]
        # whoever times the candidates must not find a faster one that loses them
        ranked = exact if any(refusal(one, norm, target) is None for one, _ in exact) else [*exact, *ranked]
    if norm.is_half:
        casting = [(lowering, reason) for lowering, reason in ranked if lowering.half_casts]
        reason = "keeps its statistics in fp32 without casts"
        ranked = [*((lowering, reason) for lowering, _ in ranked if not lowering.half_casts), *casting]
    refusals = [refusal(lowering, norm, target) for lowering, _ in ranked]
    refused = [found for found in refusals if found is not None]
    able = [one for one, found in zip(ranked, refusals, strict=True) if found is None]
    if able and able[0][0] is not ranked[0][0]:
        able[0] = (able[0][0], refused[0])
    return able or [(INSTANCE_NORM, "; ".join(refused))]


def choose(norm: Norm, target: Target) -> tuple[Lowering, str]:
    """The lowering for a norm, and why."""
    return candidates(norm, target)[0]
