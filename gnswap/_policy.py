"""The options of a plan, checked once: the policy for every layer, and what tells single layers apart.

Why apart from `plan`: here is said what may be asked, there what follows from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gnswap._errors import ArgumentError, PlanError
from gnswap._records import Site, matches

DEFAULT_SOFTNESS = 1.0
"""softness="auto" without photos, as far as `max_softness` allows it.

Why the most that the default bound allows: agreement with the original (and KL) get better all the way. At softness 0,
0.3 and 1, at most 4 groups of at least 64 channels, 144 real photos: EfficientNet-Lite0 .715 (.390), .722 (.364),
.743 (.335); -Lite1 .729 (.540), .757 (.451), .757 (.394).
"""

_OVERRIDE_KEYS = ("groups", "group_size", "softness", "action")


@dataclasses.dataclass(frozen=True)
class Policy:
    """The options that hold for every layer."""

    groups: int | str
    group_size: int | None
    softness: float | str
    max_softness: float
    fidelity: float | None
    order: str | Mapping[str, Sequence[int]]

    def check(self, *, calibrated: bool) -> None:
        if self.groups != "auto":
            _require_count("groups", self.groups, also='"auto"')
            if self.group_size is not None:
                raise ArgumentError(
                    "groups and group_size contradict each other",
                    where="plan",
                    expected="one of them",
                    found=f"groups={self.groups}, group_size={self.group_size}",
                )
        if self.group_size is not None:
            _require_count("group_size", self.group_size)
        if self.softness != "auto":
            _require_softness("softness", self.softness, also='"auto"')
        _require_softness("max_softness", self.max_softness)
        if self.order not in ("auto", "natural") and not isinstance(self.order, Mapping):
            raise ArgumentError(
                "unknown order",
                where="plan.order",
                expected='"auto", "natural", or a mapping from path or glob to a permutation',
                found=f"{self.order!r:.80}",
            )
        if self.fidelity is None:
            return
        if not _is_number(self.fidelity) or not 0 < self.fidelity <= 1:
            raise ArgumentError(
                "impossible target",
                where="plan.fidelity",
                expected="a share of photos, above 0 and at most 1",
                found=repr(self.fidelity),
            )
        if not calibrated:
            raise ArgumentError(
                "a target fidelity cannot be judged without photos",
                where="plan.fidelity",
                fix="Pass calibration= an iterable of input batches, or leave fidelity out.",
            )

    def options(self) -> dict[str, Any]:
        """The options as JSON has them; an order of the user's own stands in the decisions."""
        order = self.order if isinstance(self.order, str) else "given"
        return {**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, "order": order}

    def base_softness(self) -> tuple[float, str]:
        if isinstance(self.softness, str):
            return min(DEFAULT_SOFTNESS, self.max_softness), "the default without photos"
        return float(self.softness), "as asked"


@dataclasses.dataclass(frozen=True)
class Selection:
    """The options that tell layers apart: include, exclude, overrides, orders of the user's own."""

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    overrides: dict[str, dict[str, Any]]
    orders: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, include: Any, exclude: Any, overrides: Any, order: Any, sites: Sequence[Site]) -> Selection:
        if overrides is not None and not isinstance(overrides, Mapping):
            raise ArgumentError(
                "overrides is no mapping",
                where="plan.overrides",
                expected='such as {"layer1.*": {"groups": 4}}',
                found=repr(overrides),
            )
        named = {pattern: _checked_override(pattern, override) for pattern, override in (overrides or {}).items()}
        selection = cls(
            None if include is None else _globs("include", include),
            () if exclude is None else _globs("exclude", exclude),
            named,
            {pattern: _permutation(pattern, order[pattern]) for pattern in order} if isinstance(order, Mapping) else {},
        )
        for option, patterns in (
            ("include", selection.include or ()),
            ("exclude", selection.exclude),
            ("overrides", tuple(named)),
            ("order", tuple(selection.orders)),
        ):
            for pattern in patterns:
                require_match(f"plan.{option}", pattern, sites)
        return selection

    def skipped(self, site: Site) -> str | None:
        """Why include and exclude leave this site out; None where they do not."""
        if self.include is not None and not any(_fits(site, pattern) for pattern in self.include):
            return "not among the layers to include"
        hit = next((pattern for pattern in self.exclude if _fits(site, pattern)), None)
        return None if hit is None else f'excluded by "{hit}"'

    def override(self, site: Site) -> dict[str, Any]:
        """What the overrides say of this site.

        "named" tells whether one of them gives the site's own path, "literal" whether its groups come from there.
        """
        merged: dict[str, Any] = {"literal": False}
        globs = [pattern for pattern in self.overrides if not _names(site, pattern) and _fits(site, pattern)]
        exact = [pattern for pattern in self.overrides if _names(site, pattern)]
        for pattern in (*globs, *exact):
            said = self.overrides[pattern]
            if "groups" in said or "group_size" in said:
                merged = {key: value for key, value in merged.items() if key not in ("groups", "group_size")}
                merged["literal"] = pattern in exact
            merged.update(said)
        return {**merged, "named": bool(exact)}

    def order(self, site: Site) -> tuple[int, ...] | None:
        """The order given for this site: under its own path, or under the last glob that fits."""
        fitting = [pattern for pattern in self.orders if _fits(site, pattern)]
        return self.orders[max(fitting, key=lambda pattern: _names(site, pattern))] if fitting else None

    def options(self) -> dict[str, Any]:
        """The three options as JSON has them."""
        return {
            "include": None if self.include is None else list(self.include),
            "exclude": list(self.exclude),
            "overrides": {pattern: dict(override) for pattern, override in self.overrides.items()},
        }


def _permutation(pattern: Any, order: Any) -> tuple[int, ...]:
    if not isinstance(order, Sequence) or not all(isinstance(channel, int) for channel in order):
        raise ArgumentError(
            "an order is no permutation",
            where=f'plan.order["{pattern}"]',
            expected="the layer's channels as whole numbers, in a list",
            found=f"{order!r:.80}",
        )
    return tuple(order)


def _names(site: Site, pattern: str) -> bool:
    return any((path or "(root)") == pattern for path in site.paths)


def _fits(site: Site, pattern: str) -> bool:
    return _names(site, pattern) or any(matches(path, pattern) for path in site.paths)


def require_match(where: str, pattern: str, sites: Sequence[Site]) -> None:
    if any(_fits(site, pattern) for site in sites):
        return
    paths = [path or "(root)" for site in sites for path in site.paths]
    inside = [path for path in paths if path.startswith(f"{pattern}.")]
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5) or paths[:3]
    raise PlanError(
        f'"{pattern}" fits no norm layer',
        where=where,
        expected="a path or glob such as " + ", ".join(near) if paths else "a model with BatchNorm",
        fix=f'For all layers inside it write "{pattern}.*".' if inside else None,
    )


def _globs(option: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError(
            f"{option} is no glob", where=f"plan.{option}", expected="a string or strings", found=f"{value!r:.80}"
        )
    return tuple(patterns)


def _checked_override(pattern: Any, override: Any) -> dict[str, Any]:
    where = f'overrides["{pattern}"]'
    if not isinstance(pattern, str) or not isinstance(override, Mapping):
        raise PlanError(
            "an override goes from a glob to a mapping",
            where=where,
            expected='such as {"layer1.*": {"groups": 4}}',
            found=f"{override!r:.80}",
        )
    for key, value in override.items():
        if key not in _OVERRIDE_KEYS:
            near = difflib.get_close_matches(str(key), _OVERRIDE_KEYS, n=1)
            raise PlanError(
                "unknown key",
                where=where,
                expected=f"any of {', '.join(_OVERRIDE_KEYS)}",
                found=repr(key),
                fix=f'Did you mean "{near[0]}"?' if near else None,
            )
        if key == "action":
            if value not in ("swap", "keep"):
                raise PlanError("unknown action", where=where, expected='"swap" or "keep"', found=repr(value))
        elif value == "auto" and key != "group_size":
            continue
        elif key == "softness":
            _require_softness(f"{where}.softness", value, also='"auto"')
        else:
            _require_count(f"{where}.{key}", value)
    if "groups" in override and "group_size" in override:
        raise PlanError("groups and group_size contradict each other", where=where, expected="one of them")
    return dict(override)


def _require_count(where: str, value: Any, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        expected = "a whole number, at least 1" + (f", or {also}" if also else "")
        raise ArgumentError(
            "impossible number of channels or groups", where=where, expected=expected, found=repr(value)
        )


def _require_softness(where: str, value: Any, also: str = "") -> None:
    if not _is_number(value) or not 0 <= value < math.inf:
        expected = "a number, 0 or more, finite" + (f", or {also}" if also else "")
        raise ArgumentError("impossible softness", where=where, expected=expected, found=repr(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
