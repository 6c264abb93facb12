"""A progress bar for what takes long, on stderr, and only where somebody looks at it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
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


@contextlib.contextmanager
def counted(text: str, total: int, done: int = 0, *, hidden: bool = False) -> Iterator[Callable[[int, str], None]]:
    """A bar over numbered steps, gone when the block ends; gives what is told how far it is, and in which words.

    Args:
        text: what is being done.
        total, done: steps in all, and those done by now.
        hidden: show nothing, as where stderr is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task(text, total=total, completed=done)
        yield lambda completed, words: bar.update(task, completed=completed, description=words)
