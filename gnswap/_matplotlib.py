"""matplotlib, where it is installed: the one place that asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gnswap._errors import MissingDependencyError

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
