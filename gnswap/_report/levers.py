"""A plan taken apart: the same network with one lever after another in force, to measure what each one brings.

Why from the plan and not by planning anew without photos: every stage then has the groups that the plan ended up
with, so that two neighbouring stages differ by one lever and nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gnswap._records import Decision, Plan


@dataclasses.dataclass(frozen=True)
class Lever:
    """One way to keep the function, and the fields of a `Decision` that carry it.

    Attributes:
        name: for axes and legends.
        what: in words, for the reader.
        fields: of `Decision`; without the lever they have the values in `_OFF`, or their defaults.
        regroups: whether it changes what a channel is divided by, beyond a factor of its own.
    """

    name: str
    what: str
    fields: tuple[str, ...] = ()
    regroups: bool = True


NAIVE = Lever("naive copy", "gamma and beta copied into plain GroupNorm, with the plan's numbers of groups")
LEVERS = (
    Lever(
        "standardised", "each channel standardised with its running statistics, neighbours in groups", ("standardise",)
    ),
    Lever("softness", "a constant beside each group's variance", ("softness",)),
    Lever("order and signs", "which channels share a group, and with which sign", ("channel_order", "signs")),
    Lever(
        "balance", "a loudness and a centre for each channel inside its group, undone behind it", ("loudness", "centre")
    ),
    Lever("corrections", "a gain and an offset for each channel, fitted to photos", ("gain", "offset"), regroups=False),
)
TRAINED = Lever("trained", "the network as it is now: refitted, healed or trained after the conversion", regroups=False)
PLACES = {lever.name: place for place, lever in enumerate((NAIVE, *LEVERS, TRAINED))}
"""Each lever's colour, the same in all pictures and reports."""

_OFF = {"standardise": False}


def stages(plan: Plan) -> list[tuple[Lever, tuple[Decision, ...]]]:
    """The swaps of a plan with no lever, then with one more at a time; levers that change nothing are left out.

    Example:
        >>> decision = Decision(("1",), "BatchNorm2d", 4, "swap", "", 2, softness=1.0)
        >>> [lever.name for lever, _ in stages(Plan("", "Net", (decision,)))]
        ['naive copy', 'standardised', 'softness']
    """
    pulled = {field for lever in LEVERS for field in lever.fields}
    off: dict[str, Any] = {
        field.name: _OFF.get(field.name, field.default)
        for field in dataclasses.fields(Decision)
        if field.name in pulled
    }
    current = tuple(dataclasses.replace(swap, **off) for swap in plan.swaps)
    found = [(NAIVE, current)]
    for lever in LEVERS:
        pairs = zip(current, plan.swaps, strict=True)
        after = tuple(
            dataclasses.replace(now, **{name: getattr(swap, name) for name in lever.fields}) for now, swap in pairs
        )
        if after != current:
            found.append((lever, after))
        current = after
    return found
