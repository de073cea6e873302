"""Curves as SVG, for the reports of benchmarks: panels with a dashed line at the goal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MARGIN = 40


@dataclass(frozen=True)
class Panel:
    """A place for lines that begin at 0, 0; sizes in pixels.

    Attributes:
        longest: greatest x, in what the caller counts.
        most: greatest y.
        left: where in the picture it begins.
    """

    width: int
    height: int
    longest: float
    most: float = 1.0
    left: int = 0

    def axes(self, goal: float, below: str) -> list[str]:
        """Both axes, the goal, and what the lower axis counts."""
        at = self._at
        level = float(at(0, goal).split(",")[1])
        return [
            f'<polyline fill="none" stroke="#888" points="{at(0, self.most)} {at(0, 0)} {at(self.longest, 0)}"/>',
            f'<polyline fill="none" stroke="#ccc" stroke-dasharray="4" '
            f'points="{at(0, goal)} {at(self.longest, goal)}"/>',
            f'<text x="{self.left + 4}" y="{level + 4:.0f}">{goal:g}</text>',
            f'<text x="{self.left + self.width - MARGIN}" y="{self.height - 12}" text-anchor="end">{below}</text>',
        ]

    def line(self, points: Iterable[tuple[float, float]], colour: str) -> str:
        """One curve."""
        where = " ".join(self._at(x, y) for x, y in points)
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{where}"/>'

    def _at(self, x: float, y: float) -> str:
        across = (self.width - 2 * MARGIN) / self.longest
        up = (self.height - 2 * MARGIN) / self.most
        return f"{self.left + MARGIN + x * across:.1f},{self.height - MARGIN - y * up:.1f}"


def text(x: int, y: int, colour: str, words: str) -> str:
    """A line of text that begins there."""
    return f'<text x="{x}" y="{y}" fill="{colour}">{words}</text>'


def picture(width: int, height: int, parts: Sequence[str]) -> str:
    """The whole SVG, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">'
    )
    return "\n".join(
        [head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>", ""]
    )
