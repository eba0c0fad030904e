"""Pictures for the report: curves as inline SVG in the page's own colours, spectrograms as PNG."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.figure import Figure

__all__ = ["Curve", "curves_svg", "smooth", "spectrogram_png"]

# Colours that matplotlib is told, and the CSS that replaces them: one drawing follows the page's light and dark themes.
_INK, _GRID, _FIRST, _SECOND = "#010101", "#020202", "#030303", "#040404"
_THEMED = {_INK: "var(--muted)", _GRID: "var(--line)", _FIRST: "var(--accent)", _SECOND: "var(--second)"}
_RC = {
    "svg.fonttype": "none", "font.size": 9, "axes.edgecolor": _GRID, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _GRID,
    "ytick.color": _GRID, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "grid.color": _GRID, "axes.spines.top": False,
    "axes.spines.right": False, "axes.formatter.limits": (-3, 4), "axes.formatter.use_mathtext": False,
}


@dataclass(kw_only=True)
class Curve:
    """One quantity over the steps of a stage."""

    name: str
    """As in metrics.jsonl."""
    train: list[tuple[int, float]] = field(default_factory=list)
    """(step, value) while training."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(step, value) on held-out clips."""


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Mean of the last `span` finite values up to each point of (N,), NaN where there is none."""
    finite = np.isfinite(values)
    sums, counts = np.cumsum(np.where(finite, values, 0.0)), np.cumsum(finite)
    sums[span:], counts[span:] = sums[span:] - sums[:-span], counts[span:] - counts[:-span]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def curves_svg(curve: Curve, prefix: str, width: float = 4.6, height: float = 2.4) -> str:
    """One chart as an <svg> element for an HTML page; `prefix` keeps its ids apart from those of other charts. Inches."""
    with matplotlib.rc_context(_RC | {"svg.hashsalt": prefix}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for points, colour, label in ((curve.train, _FIRST, "training"), (curve.validation, _SECOND, "validation")):
            if points:
                _draw(axes, np.array(points, dtype=np.float64), colour, label)
        if _spans_decades(curve):
            axes.set_yscale("log")
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_xlabel("step")
        if curve.train and curve.validation:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _for_page(buffer.getvalue(), prefix)


def spectrogram_png(log_mel: np.ndarray, low: float, high: float) -> bytes:
    """PNG of a log-mel (F, T), low bands at the bottom, one pixel per value; `low` and `high` are the ends of the colour scale."""
    scaled = np.clip((np.asarray(log_mel, dtype=np.float64) - low) / max(high - low, 1e-9), 0.0, 1.0)
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, np.nan_to_num(scaled)[::-1], format="png", cmap="magma", vmin=0.0, vmax=1.0)
    return buffer.getvalue()


def _draw(axes, points: np.ndarray, colour: str, label: str) -> None:
    steps, values = points.T
    span = max(len(values) // 40, 1)
    marker = "o" if len(values) <= 30 else None
    if span > 1:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(steps, smooth(values, span), color=colour, linewidth=1.6, label=label, marker=marker, markersize=3)


def _spans_decades(curve: Curve) -> bool:
    values = np.array([value for _, value in curve.train + curve.validation], dtype=np.float64)
    values = values[np.isfinite(values)]
    return bool("loss" in curve.name and len(values) and values.min() > 0 and values.max() > 30 * values.min())


def _for_page(svg: str, prefix: str) -> str:
    """Strip what only a stand-alone file needs, make ids unique to the chart, and put the page's colours in."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A reference "#m1f" and an id "m1f" get the prefix; a colour "#030303" stands after neither.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for told, themed in _THEMED.items():
        svg = svg.replace(told, themed)
    return svg.strip()
