"""Small SVG pictures as text: elements, linear and logarithmic axes.

Why not matplotlib's: its pictures carry their own colours and fonts, while these take them from the page's style
sheet, follow it from light to dark, and are a tenth of the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

_NOTHING = 1e-6  # below it there is only rounding


class Picture:
    """An SVG picture that grows element by element.

    Args:
        width, height: in CSS pixels; it is shrunk where there is less room, and never enlarged.
        label: what it shows, for readers who cannot see it.

    Example:
        >>> picture = Picture(10, 10, "a dot")
        >>> picture.add("circle", title="one & only", cx=5.0, cy=1 / 3, r=2, class_="mark")
        >>> print(picture.parts[0])
        <circle cx="5" cy="0.33" r="2" class="mark"><title>one &amp; only</title></circle>
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def add(
        self, tag: str, text: str | None = None, *, title: str | None = None, **attributes: str | float | None
    ) -> None:
        """Add an element; `class_` stands for class, and an underscore for a hyphen."""
        words = "".join(
            f" {name.rstrip('_').replace('_', '-')}={quoteattr(value if isinstance(value, str) else number(value))}"
            for name, value in attributes.items()
            if value is not None
        )
        inner = ("" if title is None else f"<title>{escape(title)}</title>") + ("" if text is None else escape(text))
        self.parts.append(f"<{tag}{words}>{inner}</{tag}>" if inner else f"<{tag}{words}/>")

    def __str__(self) -> str:
        size = f'viewBox="0 0 {number(self.width)} {number(self.height)}" style="max-width:{number(self.width)}px"'
        return f'<svg {size} role="img" aria-label={quoteattr(self.label)}>{"".join(self.parts)}</svg>'


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels.

    Attributes:
        low, high: ends of the values.
        start, end: the pixels that these lie at.
        log: logarithmic; values outside are then shown at the ends.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def decades(cls, values: Sequence[float], start: float, end: float, *, least: float, most: float) -> Axis:
        """A logarithmic axis around the finite values, at least one decade long, within `least` and `most`."""
        shown = [min(max(value, least), most) for value in values if math.isfinite(value)] or [1.0]
        low, high = (math.log10(edge) for edge in (min(shown), max(shown)))
        middle, half = (low + high) / 2, max((high - low) / 2 * 1.05, 0.5)
        return cls(10 ** (middle - half), 10 ** (middle + half), start, end, log=True)

    def __call__(self, value: float) -> float:
        low, high = (math.log10(edge) if self.log else edge for edge in (self.low, self.high))
        if self.log:
            value = math.log10(max(value, 1e-300)) if math.isfinite(value) else high
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 8) -> list[float]:
        """Round values within the axis, not more than about `most`."""
        if not self.log:
            least = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(least))
            step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * 0.999)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [index * step for index in range(first, last + 1)]
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        stride = max(1, math.ceil((last - first) / most))
        digits = (1, 2, 5) if self.high < 100 * self.low else (1,)
        found = [digit * 10.0**power for power in range(first, last + 1) if power % stride == 0 for digit in digits]
        return [value for value in found if self.low <= value <= self.high]


def number(value: float) -> str:
    """A number in at most two decimals, for coordinates."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def path(points: Sequence[tuple[float, float] | None]) -> str:
    """A broken line through points; None leaves a gap."""
    words, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        words.append(f"{pen}{number(point[0])} {number(point[1])}")
        pen = "L"
    return "".join(words)


def short(value: float) -> str:
    """A number for people: 0.012, 1, 50, 2000, 1e+06."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) < _NOTHING:
        return "0"
    return f"{value:.0f}" if 10 <= abs(value) < 1e5 else f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.1g}"
