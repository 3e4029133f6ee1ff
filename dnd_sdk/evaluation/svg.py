"""Just enough SVG for the plots of a report: text, lines, bars, dots; no dependency, and all text is escaped."""

from __future__ import annotations

from xml.sax.saxutils import escape

PALETTE = ("#4477aa", "#ee6677", "#228833", "#aa8800", "#66ccee", "#aa3377", "#777777", "#cc6600", "#225555", "#999933")
"""Told apart also by most colour-blind readers (after Paul Tol); the first is for the metric that counts most."""
INK, FAINT = "#222222", "#dddddd"
FONT = "font-family='system-ui, sans-serif' font-size='12'"


class Canvas:
    """A drawing under way, in pixels from the top left."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False, ink: str = INK) -> None:
        """`text` with its baseline at `y`; `anchor` is start, middle or end."""
        weight = " font-weight='bold'" if bold else ""
        self._parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{ink}'{weight}>{escape(text)}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, ink: str = FAINT, width: float = 1.0) -> None:
        """A straight line."""
        self._parts.append(
            f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{ink}' stroke-width='{width:g}'/>"
        )

    def bar(self, x: float, y: float, width: float, height: float, *, ink: str, note: str = "") -> None:
        """A filled rectangle; a negative `width` goes left of `x`. `note` shows under the pointer."""
        left = min(x, x + width)
        self._parts.append(
            f"<rect x='{left:.1f}' y='{y:.1f}' width='{abs(width):.1f}' height='{height:.1f}' fill='{ink}'>"
            f"<title>{escape(note)}</title></rect>"
        )

    def dot(self, x: float, y: float, radius: float, *, ink: str, opacity: float = 1.0, note: str = "") -> None:
        """A filled circle."""
        self._parts.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:g}' fill='{ink}' fill-opacity='{opacity:g}'>"
            f"<title>{escape(note)}</title></circle>"
        )

    def whisker(self, low: float, high: float, y: float) -> None:
        """A horizontal interval with end marks."""
        self.line(low, y, high, y, ink=INK, width=1.2)
        for x in (low, high):
            self.line(x, y - 3, x, y + 3, ink=INK, width=1.2)

    def render(self) -> str:
        """The whole file."""
        size = f"width='{self.width:g}' height='{self.height:g}' viewBox='0 0 {self.width:g} {self.height:g}'"
        body = "\n".join(self._parts)
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT}>\n"
            f"<rect width='100%' height='100%' fill='white'/>\n{body}\n</svg>\n"
        )
