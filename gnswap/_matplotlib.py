"""matplotlib, where it is installed: the one place that asks for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from gnswap._errors import MissingDependencyError, StoreError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_figure() -> type[Figure]:
    """The `Figure` class, which needs no pyplot: no global state, no window system.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is not installed, and figures are drawn with it", fix="Run: pip install 'gnswap[report]'"
        ) from error
    return Figure


def require_place(path: str | os.PathLike[str]) -> None:
    """Refuse, before anything is measured for it, a figure that could not be drawn or written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StoreError: there is no directory to write to.
    """
    require_figure()
    folder = Path(path).parent
    if not folder.is_dir():
        raise StoreError(
            "the figure cannot be written",
            where=str(path),
            expected=f"a file in a directory that exists; there is no {folder}",
            fix="Make the directory first, or name another file.",
        )


def write_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        StoreError: the file cannot be written; what was there before is unchanged.
    """
    path = Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(fresh, format="png")
        fresh.replace(path)
    except OSError as error:
        raise StoreError(
            "the figure cannot be written", where=str(path), found=f"{type(error).__name__}: {error}"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
