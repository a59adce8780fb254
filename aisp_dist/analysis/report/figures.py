"""The figures, each a small panel of inline SVG in the page's own text colour. matplotlib is imported only here, and
needs no display.

Shapes: P prompts, K iterations.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK = "#0a0b0c"  # replaced by the page's text colour
_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8a8a8a"
_MARKERS, _LINES = "osD^vPX*", ("-", "--", "-.", ":")
_STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "svg.fonttype": "none",
    "svg.hashsalt": "aisp",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.7,
}
_DATELESS = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_numbers = itertools.count()


@dataclass(frozen=True)
class Look:
    """How an arm is drawn in every figure; no two arms share colour, line and marker."""

    color: str
    line: str
    marker: str


def looks(arms: Sequence[str], main: str, base: str) -> dict[str, Look]:
    """The main arm in the first colour."""
    order = [main, *(arm for arm in arms if arm not in (main, base))]
    found = {arm: Look(_OKABE_ITO[i % 6], _LINES[i // 6 % 4], _MARKERS[i % 8]) for i, arm in enumerate(order)}
    return {base: Look(GREY, ":", "s")} | found


def panel(draw: Callable[[Axes], None], x: str, y: str, title: str = "", wide: float = 3.7, high: float = 2.7) -> str:
    """One figure as an SVG element. Its ids are unique on the page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(wide, high), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        if title:
            axes.set_title(title, fontsize=9.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=_DATELESS)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    own = f"f{next(_numbers)}-"
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}", svg)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)


def lines(axes: Axes, arms: Mapping[str, tuple[np.ndarray, np.ndarray]], look: Mapping[str, Look]) -> None:
    """arms: x [K] and values [P, K], drawn as mean and 95 % band (normal approximation over prompts)."""
    for name, (x, values) in arms.items():
        count = np.isfinite(values).sum(axis=0)
        keep = count > 0
        x, values, count = x[keep], values[:, keep], count[keep]
        mean = np.nanmean(values, axis=0)
        half = 1.96 * np.nanstd(values, axis=0) / np.sqrt(np.maximum(count - 1, 1))
        how = look[name]
        axes.fill_between(x, mean - half, mean + half, color=how.color, alpha=0.15, linewidth=0)
        few = len(x) <= 24
        axes.plot(x, mean, how.line, color=how.color, marker=how.marker if few else None, markersize=3.5, linewidth=1.6)


def whole(axes: Axes) -> None:
    """Ticks at whole numbers, as of iterations."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def points(axes: Axes, arms: Mapping[str, tuple[Sequence[float], Sequence[float]]], look: Mapping[str, Look]) -> None:
    """arms: x and y as mean, low, high."""
    for name, (x, y) in arms.items():
        error: Any = {"xerr": [[x[0] - x[1]], [x[2] - x[0]]], "yerr": [[y[0] - y[1]], [y[2] - y[0]]]}
        how = look[name]
        axes.errorbar(x[0], y[0], **error, fmt=how.marker, color=how.color, markersize=6, linewidth=1.2, capsize=2)


def cloud(axes: Axes, arms: Mapping[str, tuple[np.ndarray, np.ndarray]], look: Mapping[str, Look]) -> None:
    for name, (x, y) in arms.items():
        axes.plot(x, y, look[name].marker, color=look[name].color, markersize=3, alpha=0.55, markeredgewidth=0)


def histograms(axes: Axes, arms: Mapping[str, np.ndarray], look: Mapping[str, Look]) -> None:
    edges: Any = np.histogram_bin_edges(
        np.concatenate(list(arms.values())), min(30, 4 + len(next(iter(arms.values()))) // 4)
    )
    for name, values in arms.items():
        filled: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.45, "color": look[name].color}
        axes.hist(values, edges, **filled)
        axes.axvline(float(values.mean()), color=look[name].color, linewidth=1.4, linestyle=look[name].line)
