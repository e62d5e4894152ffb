"""Interactive panels of a report: curves that can be zoomed and hovered, drawn by plotly.js."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

COLOURS = ("#3b7dd8", "#d1762a", "#2f9e62", "#cc4a5e", "#9a5fc0", "#8c7431",
           "#1aa0b4", "#d667b0", "#7f8790", "#9aa81f", "#6a6cd0", "#c99a2e")  # fmt: skip
GREY = "#8a8a8a"
MOST = 2000  # points of a curve; a longer one is shown by means of neighbouring points
DIGITS = 5  # significant digits of a number in the page
Dash = Literal["solid", "dot", "dash"]


@dataclass(frozen=True)
class Curve:
    """What is drawn in one colour: a line, or marks alone where `mark` is given."""

    name: str
    colour: str
    x: ArrayLike
    y: ArrayLike
    dash: Dash = "solid"
    mark: str | None = None  # a symbol of plotly: circle-open, star, triangle-down ...
    width: float = 1.8

    def trace(self) -> dict[str, Any]:
        """The curve as plotly.js takes it."""
        x, y = (np.asarray(each, float) for each in (self.x, self.y))
        if self.mark is None:
            x, y = thinned(x), thinned(y)
        look = (
            {"mode": "lines", "line": {"color": self.colour, "dash": self.dash,
                                       "width": self.width}}
            if self.mark is None
            else {"mode": "markers", "marker": {"color": self.colour, "symbol": self.mark,
                                                "size": 11}}
        )  # fmt: skip
        # plotly reads tags in names.
        name = html.escape(self.name, quote=False)
        return {"type": "scatter", "name": name, "x": _plain(x), "y": _plain(y), **look}


@dataclass(frozen=True)
class Panel:
    """One plot: its title, what it shows in words, its axes and its curves."""

    title: str
    caption: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: str = ""  # the axes that are logarithmic: "", "y" or "xy"
    together: bool = True  # a hover tells of all curves at this x, not of the nearest point alone

    def html(self, name: str) -> str:
        """The place of the plot in a page, under this id."""
        words = html.escape(self.caption)
        return (
            f'<figure class="panel"><h3>{html.escape(self.title)}</h3>'
            f'<div id="{name}" class="plot"></div><figcaption>{words}</figcaption></figure>'
        )

    def plot(self) -> dict[str, Any]:
        """Data and layout as plotly.js takes them; the page adds the colours of its scheme."""
        axis = {"automargin": True, "zeroline": False}
        x = {**axis, "title": {"text": self.x}, **({"type": "log"} if "x" in self.log else {})}
        y = {**axis, "title": {"text": self.y}, **({"type": "log"} if "y" in self.log else {})}
        layout = {"xaxis": x, "yaxis": {**y, "hoverformat": ".4g"}, "showlegend": False,
                  "height": 320, "margin": {"l": 50, "r": 10, "t": 10, "b": 45},
                  "hoverlabel": {"namelength": 40},
                  "hovermode": "x unified" if self.together else "closest"}  # fmt: skip
        return {"data": [each.trace() for each in self.curves if np.size(each.y)], "layout": layout}


def grid(panels: Sequence[Panel], prefix: str = "panel") -> tuple[str, dict[str, Any]]:
    """The panels side by side as HTML, and the plot of each under its id."""
    named = {f"{prefix}-{i}": each for i, each in enumerate(panels) if each.curves}
    places = "\n".join(panel.html(name) for name, panel in named.items())
    plots = {name: panel.plot() for name, panel in named.items()}
    return f'<div class="panels">\n{places}\n</div>', plots


def script(plots: dict[str, Any]) -> str:
    """The plots and the library that draws them, so that the page needs nothing from outside."""
    from plotly.offline import get_plotlyjs

    data = json.dumps(plots, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"<script>{get_plotlyjs()}</script>\n<script>const PLOTS = {data};\n{DRAW}</script>"


DRAW = """
const scheme = matchMedia("(prefers-color-scheme: dark)");
function look() {
  const of = name => getComputedStyle(document.documentElement).getPropertyValue(name);
  const all = {"font.color": of("--ink"), "paper_bgcolor": of("--paper"),
    "plot_bgcolor": of("--paper"), "hoverlabel.bgcolor": of("--paper"),
    "hoverlabel.font.color": of("--ink"), "modebar.color": of("--faint")};
  for (const axis of ["xaxis", "yaxis"]) {
    all[axis + ".gridcolor"] = of("--line");
    all[axis + ".linecolor"] = of("--line");
  }
  return all;
}
const CONFIG = {responsive: true, displaylogo: false,
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]]};
const paint = name => Plotly.relayout(name, look());
for (const [name, plot] of Object.entries(PLOTS))
  Plotly.newPlot(name, plot.data, plot.layout, CONFIG)
    .then(() => paint(name));
scheme.addEventListener("change", () => Object.keys(PLOTS).forEach(paint));
"""


def thinned(values: np.ndarray) -> np.ndarray:
    """The values, or the means of so many neighbours that at most `MOST` are left."""
    many = math.ceil(len(values) / MOST)
    if many <= 1:
        return values
    whole = np.append(values, np.full(-len(values) % many, np.nan)).reshape(-1, many)
    there = ~np.isnan(whole)
    sums, counts = np.where(there, whole, 0).sum(1), there.sum(1)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _plain(values: np.ndarray) -> list[float | None]:
    """JSON has no nan: a gap in the curve is null."""
    return [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values]
