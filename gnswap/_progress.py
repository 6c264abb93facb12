"""A progress bar for what takes long, on stderr, and only where somebody looks at it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def shown(items: Iterable[_Item], text: str, total: int | None = None) -> Iterator[_Item]:
    """The items, with a bar while they are worked through; without one where stderr is no terminal.

    Args:
        items: what is worked through, once.
        text: what is being done, such as "calibrating".
        total: how many there are; `len(items)` where that is known.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, text, total, console=console, transient=True, disable=not console.is_terminal)
