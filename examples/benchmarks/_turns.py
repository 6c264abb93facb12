"""Calls that take turns on the clock, so that what else the machine does hits all of them alike.

In a fixed order each would find the caches as the one before it leaves them: after a copy of other tensors, say, or
with its own input just read. So the order is drawn anew for each turn, and a call runs once before its time is taken.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# of a turn's time, what all threads together may have waited for a processor
MOST_WAITING = 0.02


@dataclass(frozen=True)
class Turns:
    """Milliseconds of each call in each turn, and how many turns passed without a wait for a processor."""

    times: dict[str, list[float]]
    quiet: int


def waited() -> float:
    """Seconds that this process's threads were ready to run and did not, so far; 0 where the system does not tell."""
    total = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            total += int(thread.read_text().split()[1])
    return total / 1e9


def take_turns(calls: dict[str, Callable[[], Any]], turns: tuple[int, int], seconds: float, patience: int = 1) -> Turns:
    """Time calls in turns, in an order drawn anew; short calls are repeated within a turn, long ones take fewer turns.

    Where threads wait for a processor that something else is using, a parallel loop takes as long as the wait and not
    as its work: a ratio would count loops. So turns with waits are taken again, up to `patience` times as many turns
    as without, and left out where enough remain.
    """
    once = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once[name] = max(time.perf_counter() - start, 1e-6)
    count = max(turns[0], min(turns[1], int(seconds / sum(once.values()))))
    rng = random.Random(0)
    repeats = {name: max(1, min(200, int(seconds / len(calls) / count / once[name]))) for name in calls}
    every: list[dict[str, float]] = []
    quiet: list[dict[str, float]] = []
    while len(quiet) < count and len(every) < patience * count:
        turn, before, begin = {}, waited(), time.perf_counter()
        for name, call in rng.sample(list(calls.items()), len(calls)):
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            turn[name] = (time.perf_counter() - start) / repeats[name] * 1e3
        every.append(turn)
        if waited() - before < MOST_WAITING * (time.perf_counter() - begin):
            quiet.append(turn)
    kept = quiet if len(quiet) >= turns[0] else every
    return Turns({name: [turn[name] for turn in kept] for name in calls}, len(quiet))
