"""The records of a saved conversion: what plan.json holds."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from gnswap._record import Record

STORE_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ModelSource(Record):
    """How to build the architecture of a saved model again.

    Attributes:
        kind: "timm", or "factory" for a function of the user's own, which is never called from a file alone.
        name: the timm name with its tag, or `package.module:factory`.
        options: keyword arguments of `timm.create_model`.
    """

    kind: Literal["timm", "factory"]
    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name + "".join(f", {key}={value!r}" for key, value in self.options.items())


@dataclasses.dataclass(frozen=True)
class LayerState(Record):
    """What one swapped layer is besides its tensors.

    Attributes:
        num_groups, softness, eps: of the FusedGroupNorm now; softness may have been annealed since the swap.
        origin: plain attributes of the norm that it replaced, such as momentum, for `gnswap.revert`.
    """

    num_groups: int
    softness: float
    eps: float
    origin: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Saved(Record):
    """The content of plan.json.

    Attributes:
        plan: as `Plan.to_dict`.
        architecture: fingerprint of the network with its norms back in place. It differs from the plan's where
            something else was changed after the swap, such as a new classifier.
        source: how to build that network, where known; otherwise `source_unknown` says why not.
        weights_sha256: of model.safetensors.
        layers: by first path.
        aliases: further name of a tensor to its first name.
        strides: memory layouts other than contiguous.
        training: the root's mode; `other_mode` lists the modules in the opposite one.
        frozen: parameters with requires_grad off.
        schema_version: of this record; another one is refused.
    """

    plan: dict[str, Any]
    architecture: str
    source: ModelSource | None
    source_unknown: str
    weights_sha256: str
    layers: dict[str, LayerState]
    aliases: dict[str, str]
    strides: dict[str, tuple[int, ...]]
    training: bool
    other_mode: tuple[str, ...]
    frozen: tuple[str, ...]
    schema_version: int = STORE_SCHEMA_VERSION
