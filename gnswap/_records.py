"""The records that the verbs hand to each other: what was found, what was decided, what came of it.

Notation of the whole package: N samples, C channels, G groups, D = C/G channels in a group, S = product of
the spatial sizes. Statistics are `[N, G]`, affine parameters `[C]`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from typing import Any, Literal, Self

from gnswap._errors import PlanError
from gnswap._record import Record

PLAN_SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Site(Record):
    """One normalisation layer of a model, under all the names it can be reached by.

    Attributes:
        paths: every dotted path to this one module, in the order of `named_modules`; "" is the root.
        norm_type: its class, as `module.QualifiedName`.
        num_channels: C; 0 where the layer does not know it yet (lazy layers).
        eps: the layer's own epsilon.
        affine: whether it has gamma; `bias` whether it has beta.
        frozen: whether its affine parameters do not train (buffers, or requires_grad off).
        running_stats: whether it has running mean and variance.
        dims: number of input dimensions its class accepts, such as "4" or "2 or 3".
        act, drop: the class of a fused activation and of a fused dropout, where there is one.
        hooks: how many hooks hang on it (they are carried over).
        refusal: why it cannot be swapped; None where it can.
    """

    paths: tuple[str, ...]
    norm_type: str
    num_channels: int
    eps: float
    affine: bool
    bias: bool
    frozen: bool
    running_stats: bool
    dims: str
    act: str | None = None
    drop: str | None = None
    hooks: int = 0
    refusal: str | None = None

    @property
    def name(self) -> str:
        """The first path; "(root)" where the model itself is the layer."""
        return self.paths[0] or "(root)"


@dataclasses.dataclass(frozen=True)
class Inventory(Record):
    """What `inspect` found in a model.

    Attributes:
        model: the model's class.
        fingerprint: sha256 over the names, types and shapes that make the architecture.
        sites: every BatchNorm of any kind, in the order of `named_modules`.
        left_alone: paths and classes of the other normalisation layers ("stages.0.norm: LayerNorm").
        notes: what a user should know: functional batch_norm calls, norms held outside the module tree.
    """

    model: str
    fingerprint: str
    sites: tuple[Site, ...]
    left_alone: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def swappable(self) -> tuple[Site, ...]:
        """The sites that nothing stands against."""
        return tuple(site for site in self.sites if site.refusal is None)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.sites)} BatchNorm layers, {len(self.swappable)} can be swapped"]
        for site in self.sites:
            traits = [f"{site.num_channels} channels", f"eps {site.eps:g}"]
            words = {
                "frozen": site.frozen,
                f"act {site.act}": site.act is not None,
                "no gamma": not site.affine,
                "no beta": site.affine and not site.bias,
                "no running statistics": not site.running_stats,
            }
            traits += [word for word, holds in words.items() if holds]
            names, kind = " = ".join(path or "(root)" for path in site.paths), site.norm_type.rpartition(".")[2]
            lines.append(f"  {names}: {kind}, {', '.join(traits)}")
            if site.refusal is not None:
                lines.append(f"    kept: {site.refusal}")
        return "\n".join((*lines, *(f"  left alone: {other}" for other in self.left_alone), *self.notes))


@dataclasses.dataclass(frozen=True)
class Decision(Record):
    """What happens to one site, and why.

    Attributes:
        paths, norm_type, num_channels: the site (see `Site`).
        action: "swap" or "keep".
        reason: in words, for the person who reads the plan.
        num_groups: G of the GroupNorm; 0 for a kept site.
        softness: added to the group's variance; 0 is pure GroupNorm.
        standardise: whether the running statistics standardise the input first.
        channel_order: permutation of C; groups are D consecutive entries of it. None is the natural order.
        signs: +1 or -1 per channel, in natural order; None is all +1.
        loudness: factor on each standardised channel inside its group, undone behind the norm; None is all 1.
        centre: added to each standardised channel before the norm, taken away behind it; None is all 0. Both in natural
            order, chosen so that the group's variance changes little from photo to photo.
        gain: factor on gamma per channel, in natural order, fitted to photos; None is all 1.
        offset: added to beta per channel, fitted to photos; None is all 0.
        absorbs: every path of the activation module that the layer computes in its place; None where there is none.
        evidence: figures that the decision rests on, by name; see `gnswap.plan`.
    """

    paths: tuple[str, ...]
    norm_type: str
    num_channels: int
    action: Literal["swap", "keep"]
    reason: str
    num_groups: int = 0
    softness: float = 0.0
    standardise: bool = True
    channel_order: tuple[int, ...] | None = None
    signs: tuple[int, ...] | None = None
    loudness: tuple[float, ...] | None = None
    centre: tuple[float, ...] | None = None
    gain: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None
    absorbs: tuple[str, ...] | None = None
    evidence: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.paths:
            raise PlanError("a decision names no path", where=self.norm_type)
        if self.action == "keep":
            return
        where, channels = self.name, self.num_channels
        if self.num_groups < 1 or channels % self.num_groups:
            raise PlanError(
                "impossible number of groups",
                where=where,
                expected=f"a divisor of {channels} channels",
                found=str(self.num_groups),
            )
        if not 0.0 <= self.softness < float("inf"):
            raise PlanError("impossible softness", where=where, expected="0 or more, finite", found=str(self.softness))
        if self.channel_order is not None and sorted(self.channel_order) != list(range(channels)):
            raise PlanError(
                "channel_order is no permutation",
                where=where,
                expected=f"each of 0 to {channels - 1} once",
                found=f"{self.channel_order!s:.60}",
            )
        if self.signs is not None and (len(self.signs) != channels or set(self.signs) - {-1, 1}):
            raise PlanError("wrong signs", where=where, expected=f"{channels} times +1 or -1")
        if self.loudness is not None and not all(value > 0 for value in self.loudness):
            raise PlanError("wrong loudness", where=where, expected=f"{channels} positive numbers")
        for field in ("loudness", "centre", "gain", "offset"):
            values = getattr(self, field)
            if values is not None and not (len(values) == channels and all(map(math.isfinite, values))):
                raise PlanError(f"wrong {field}", where=where, expected=f"{channels} finite numbers")

    @property
    def name(self) -> str:
        """The first path; "(root)" where the model itself is the layer."""
        return self.paths[0] or "(root)"

    @property
    def output_path(self) -> str:
        """Where a hook sees what the layer computes, in the original and in the converted network."""
        return (self.absorbs or self.paths)[0]

    @property
    def group_size(self) -> int:
        """D, the number of channels in a group; 0 for a kept site."""
        return self.num_channels // self.num_groups if self.num_groups else 0


@dataclasses.dataclass(frozen=True)
class Plan(Record):
    """Every decision of a conversion, as data: print it, edit it, save it, apply it elsewhere.

    Attributes:
        fingerprint: the architecture that the plan is for (`Inventory.fingerprint`).
        model: the model's class.
        decisions: one for each site, in the order of `named_modules`.
        options: the options that led here, for the reader.
        notes: what the plan's maker had to say beyond single sites.
        versions: of gnswap, torch and timm.
        schema_version: of this record; another one is refused.
    """

    fingerprint: str
    model: str
    decisions: tuple[Decision, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    schema_version: int = PLAN_SCHEMA_VERSION

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read a plan. Raises `PlanError` on an unknown schema version before looking at anything else."""
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != PLAN_SCHEMA_VERSION:
            raise PlanError(
                "unknown schema version",
                where="Plan.schema_version",
                expected=str(PLAN_SCHEMA_VERSION),
                found=repr(version),
                fix="Make the plan again with this version of gnswap, or install the one that wrote it.",
            )
        return super().from_dict(data)

    @property
    def swaps(self) -> tuple[Decision, ...]:
        """The decisions that replace a layer."""
        return tuple(decision for decision in self.decisions if decision.action == "swap")

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The decisions that leave a BatchNorm where it is."""
        return tuple(decision for decision in self.decisions if decision.action == "keep")

    def edit(self, pattern: str, **changes: Any) -> Self:
        """A copy with fields of some decisions changed.

        Args:
            pattern: glob over module paths, such as "layer1.*.bn2".
            **changes: fields of `Decision`, such as ``num_groups=4``.

        Raises:
            PlanError: nothing matches, there is no such field, or a changed decision is impossible.

        Example:
            >>> import torch, gnswap
            >>> plan = gnswap.plan(torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.BatchNorm2d(32)))
            >>> plan.edit("1", num_groups=2).decisions[0].num_groups
            2
        """
        hits = [any(matches(path, pattern) for path in decision.paths) for decision in self.decisions]
        if not any(hits):
            raise PlanError(
                "no site has such a name",
                where=pattern,
                expected="one of " + ", ".join(decision.name for decision in self.decisions[:8]),
            )
        fields = [field.name for field in dataclasses.fields(Decision)]
        if unknown := sorted(changes.keys() - set(fields)):
            raise PlanError("a decision has no such field", where=unknown[0], expected=f"one of {', '.join(fields)}")
        edited = (
            dataclasses.replace(decision, **changes) if hit else decision
            for hit, decision in zip(hits, self.decisions, strict=True)
        )
        return dataclasses.replace(self, decisions=tuple(edited))


def matches(path: str, pattern: str) -> bool:
    """Whether a module path fits a glob; "(root)" stands for the root's empty path."""
    return fnmatch.fnmatchcase(path or "(root)", pattern)
