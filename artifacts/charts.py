"""Small SVG charts for the report, drawn by matplotlib: success by round with intervals, and training curves.

A chart is a string of SVG to put into a page. Its colours are CSS variables (--ink, --muted, --line, --c0 to --c7), so
that one drawing serves light, dark and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = 8
# Colours that stand for variables of the page's style, which replace them in the SVG.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
SERIES = [f"#0400{index:02x}" for index in range(COLOURS)]
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", **{c: f"--c{i}" for i, c in enumerate(SERIES)}}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same chart is the same bytes
    "text.parse_math": False,  # a dollar sign is one
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


class Line(NamedTuple):
    """A line of a chart: its name, x, y, optional (low, high) of each point, its colour's index (None: the ink), and
    whether it is dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] = ()
    colour: int | None = 0
    dashed: bool = False


def chart(title: str, lines: Sequence[Line], *, xlabel: str, ticks: Sequence[str] = (), percent: bool = False) -> str:
    """One chart as SVG. `ticks` names x = 0, 1, ...; `percent` fixes y to 0..100."""
    from matplotlib import rc_context  # on demand, since importing it takes half a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE):
        figure = Figure(figsize=(4, 2.9), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        named = {}
        for line in lines:
            colour = INK if line.colour is None else SERIES[line.colour % COLOURS]
            marker = "o" if len(line.x) <= 12 else None
            style = "--" if line.dashed else "-"
            (drawn,) = axes.plot(line.x, line.y, style, color=colour, marker=marker, markersize=3.5, lw=1.5)
            if line.name:
                named[line.name] = drawn
            if line.band:
                axes.fill_between(line.x, *zip(*line.band, strict=True), color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel(xlabel)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            axes.set_ylim(0, 100)
        if named:
            axes.legend(list(named.values()), list(named), loc="best")  # a name may begin with _, which labels may not
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return for_page(text.getvalue(), title)


def for_page(svg: str, title: str) -> str:
    """The drawing without its prologue, as wide as its place, with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    label = escape(title).replace("\\", r"\\")
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="{label}" viewBox="\1">', svg, count=1
    )
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg)
