"""Times the ways to write a network's norms on the machine at hand, through the provider that will run the file.

Why whole networks and not single norms: what a form costs depends on what the provider fuses around it. Candidates are
the choice of the table (`targets`), and each lowering for all norms that it can write. All run in turn, the median of
each decides.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gnswap import _timing
from gnswap._onnx import compiler, targets
from gnswap._onnx.lowering import Lowering
from gnswap._onnx.norm import Norm

_SECONDS_EACH = 1.0
_BY_TABLE = "by table"


def tune(
    model: Any, norms: Sequence[Norm], target: targets.Target, inputs: Sequence[Tensor], threads: int | None
) -> tuple[compiler.Choice, dict[str, float]]:
    """Find the fastest form.

    Args:
        model, norms: an `onnx_ir.Model` after `compiler.prepare`; left as they are.
        target: whose candidates are timed, through its provider.
        inputs: one batch.
        threads: of the CPU inside one operator; None leaves it to onnxruntime.

    Returns:
        the choice, and the median time of every candidate in milliseconds, fastest first.

    Raises:
        ProviderError: the provider does not run here, or not every node would run on it.
    """
    import onnx_ir as ir

    assert target.provider is not None
    names = {lowering.name: lowering for norm in norms for lowering, _ in targets.candidates(norm, target)}
    choices = {_BY_TABLE: compiler.by_target(target)}
    choices |= {name: _everywhere(lowering, target) for name, lowering in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        runners = []
        for number, choice in enumerate(choices.values()):
            twin, twins = compiler.copied(model, norms)
            compiler.lower(twin.graph, twins, choice)
            path = Path(folder) / f"{number}.onnx"
            ir.save(twin, path, external_data=f"{number}.data")
            runners.append(_timing.runner(path, tuple(inputs), target.provider, threads=threads))
        times = _timing.in_turn(runners, _SECONDS_EACH * len(runners))
    medians = {name: 1e3 * statistics.median(one) for name, one in zip(choices, times, strict=True)}
    medians = dict(sorted(medians.items(), key=lambda item: item[1]))
    best = next(iter(medians))
    return _because(choices[best], f"{best} was the fastest of {len(medians)} here"), medians


def _everywhere(wanted: Lowering, target: targets.Target) -> compiler.Choice:
    def choice(norm: Norm) -> tuple[Lowering, str]:
        able = targets.candidates(norm, target)
        return next((one for one in able if one[0] is wanted), able[0])

    return choice


def _because(choice: compiler.Choice, reason: str) -> compiler.Choice:
    return lambda norm: (choice(norm)[0], reason)
