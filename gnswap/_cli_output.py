"""What the command line prints and where: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from gnswap._progress import shown

_PIPE_WIDTH = 160  # where no terminal says how wide it is, tables must not be folded to 80 columns


class Batches(Protocol):
    """Batches of inputs that can be counted and read again."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def __len__(self) -> int: ...


def result(data: dict[str, Any], view: RenderableType | list[RenderableType], as_json: bool) -> None:
    """Print the result of a verb on stdout: as one JSON document, or as tables."""
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))  # noqa: T201
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    console.print(*(view if isinstance(view, list) else [view]), sep="\n", highlight=False)


def stderr() -> Console:
    """Where progress and messages go. Made anew each time, since tests and callers may redirect stderr."""
    return Console(stderr=True)


def note(text: str) -> None:
    """Something that the user should know and that stops nothing."""
    stderr().print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True, highlight=False)


def skipped(reasons: tuple[str, ...]) -> None:
    """Pictures that cannot be read and were left out."""
    for reason in reasons:
        note(f"skipped: the picture cannot be read: {reason}")


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say on stderr what is going on, and on a terminal how long it took.

    No spinner: a progress bar may run inside, and two live displays on one terminal overwrite each other.
    """
    console = stderr()
    console.print(f"{text} ...", markup=False, highlight=False, soft_wrap=True)
    start = time.perf_counter()
    yield
    if console.is_terminal:
        console.print(f"[dim]{'done in':>10} {time.perf_counter() - start:.1f} s[/]", highlight=False)


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Warnings of the package are for the user to read; on a terminal they read better without file and line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(warning.message) for warning in caught):
                note(text)


@contextlib.contextmanager
def bar(text: str) -> Iterator[Callable[[float], object]]:
    """A progress bar on stderr; what it gives is told which share of the work is done, from 0 to 1."""
    with Progress(console=stderr(), transient=True) as progress:
        task = progress.add_task(text, total=1.0)
        yield lambda share: progress.update(task, completed=share)


class Watched:
    """Batches with a progress bar on stderr, every time they are read.

    Args:
        batches: to be read any number of times; has a length.
        text: what to call them.
    """

    def __init__(self, batches: Batches, text: str) -> None:
        self.batches, self.text = batches, text

    def __iter__(self) -> Iterator[Tensor]:
        return shown(self.batches, self.text, len(self.batches))
