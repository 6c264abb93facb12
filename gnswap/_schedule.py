"""A schedule that takes the softness of a network's GroupNorms to another value while it trains.

Why anneal: a converted network is closest to its original where it is soft, and a pure GroupNorm is where training
should end. In small steps the network follows; each step keeps the nominal output (see `FusedGroupNorm.softness`), so
that nothing jumps.

Why every step starts from the first gain and not from the last one: in bfloat16 one step's change of the gain can be
less than half of its last digit and would be lost, a thousand times over.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from torch import Tensor, nn

from gnswap._errors import ArgumentError
from gnswap._layer import FusedGroupNorm, softened

_SHAPES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """What a layer had when the schedule began."""

    softness: float
    gain: Tensor | None


class SoftnessSchedule:
    r"""Takes every `FusedGroupNorm` of a network from its softness to `end`, in the manner of torch's schedulers.

    After t calls of `step`, with :math:`u = \min(t / \mathrm{steps}, 1)`, a layer that began at softness :math:`s_0`
    has

    .. math:: s = \mathrm{end} + (s_0 - \mathrm{end})\,(1 - u) \quad\text{(linear)}, \qquad
        s = \mathrm{end} + (s_0 - \mathrm{end})\,\tfrac{1 + \cos \pi u}{2} \quad\text{(cosine)}

    and is at `end` exactly from the last step on. Gains are corrected so that a group at its nominal variance gives the
    same output all the way.

    Args:
        model: holds one `FusedGroupNorm` or more; may be wrapped (DDP).
        end: the softness to end at; 0 is pure GroupNorm.
        steps: calls of `step` until there.
        shape: "linear" or "cosine" (slow at both ends).

    Raises:
        ArgumentError: no `FusedGroupNorm` in the model; `steps` below 1; `end` negative or not finite; an unknown
            shape.

    Example:
        >>> import torch, gnswap
        >>> model = torch.nn.Sequential(gnswap.FusedGroupNorm(4, 16, softness=1.0))
        >>> schedule = gnswap.SoftnessSchedule(model, end=0.0, steps=4, shape="linear")
        >>> for _ in range(5):  # after each optimizer.step()
        ...     schedule.step()
        ...     print(model[0].softness)
        0.75
        0.5
        0.25
        0.0
        0.0
    """

    def __init__(
        self, model: nn.Module, end: float = 0.0, *, steps: int, shape: Literal["linear", "cosine"] = "cosine"
    ) -> None:
        self._layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, FusedGroupNorm)}
        if not self._layers:
            raise ArgumentError(
                "the model has no softness",
                where="SoftnessSchedule",
                expected="a FusedGroupNorm in it",
                found=type(model).__qualname__,
                fix="Convert it first.",
            )
        for name, holds, expected, found in (
            ("steps", steps >= 1, "1 or more", steps),
            ("end", 0.0 <= end < math.inf, "0 or more, finite", end),
            ("shape", shape in _SHAPES, " or ".join(_SHAPES), shape),
        ):
            if not holds:
                raise ArgumentError(
                    f"{name} is out of range", where="SoftnessSchedule", expected=expected, found=repr(found)
                )
        self.end, self.steps, self.shape, self.last_step = float(end), steps, shape, 0
        self._starts = {
            path: _Start(layer.softness, None if layer.channel_gain is None else layer.channel_gain.clone())
            for path, layer in self._layers.items()
        }

    def step(self) -> None:
        """Go one step on; after the last one nothing changes any more. Call it after `optimizer.step()`."""
        self.go_to(self.last_step + 1)

    def go_to(self, step: int) -> None:
        """Go to where `step` calls of `step` lead from the beginning; 0 gives the first gains back bit for bit."""
        self.last_step = step
        done = min(step / self.steps, 1.0)
        left = 1.0 - done if self.shape == "linear" else (1.0 + math.cos(math.pi * done)) / 2
        for path, layer in self._layers.items():
            start = self._starts[path]
            softness = self.end + (start.softness - self.end) * left if done < 1.0 else self.end
            if start.gain is not None and layer.channel_gain is not None:
                gain = softened(start.gain, softness - start.softness) if step else start.gain
                layer.channel_gain = gain.to(layer.channel_gain, copy=True)
            layer._softness = softness if step else start.softness  # the property would correct the gain once more

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is and what it began from: numbers, and under "gain" tensors `[C]` by path."""
        return {
            "end": self.end,
            "steps": self.steps,
            "shape": self.shape,
            "last_step": self.last_step,
            "softness": {path: start.softness for path, start in self._starts.items()},
            "gain": {path: start.gain.clone() for path, start in self._starts.items() if start.gain is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another schedule of the same network was.

        The layers' softness and gain are set to what they were there, bit for bit, whether or not the model's own
        state (which holds the gain but no softness) has been loaded.

        Raises:
            ArgumentError: the state is of a network with other layers.
        """
        if state["softness"].keys() != self._layers.keys():
            different = sorted(state["softness"].keys() ^ self._layers.keys())
            raise ArgumentError(
                "the state is of another network",
                where="SoftnessSchedule.load_state_dict",
                expected=f"the softness of {len(self._layers)} layers",
                found=f"different ones: {', '.join(different[:3])}",
            )
        self.end, self.steps, self.shape = state["end"], state["steps"], state["shape"]
        gains = state["gain"]
        self._starts = {
            path: _Start(softness, gains[path].clone() if path in gains else None)
            for path, softness in state["softness"].items()
        }
        self.go_to(state["last_step"])
