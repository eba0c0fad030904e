"""Pictures for the report: curves as inline SVG in the page's own colours, spectrograms as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Curve", "Point", "curves_svg", "smooth", "spectrogram_png", "variants_svg"]

# Colours that matplotlib is told, and the CSS that replaces them: one drawing follows the page's light and dark themes.
_INK, _GRID, _FIRST, _SECOND, _THIRD, _FOURTH = (f"#0{digit}0{digit}0{digit}" for digit in range(1, 7))
_THEMED = {_INK: "var(--muted)", _GRID: "var(--line)", _FIRST: "var(--accent)", _SECOND: "var(--second)", _THIRD: "var(--good)",
           _FOURTH: "var(--bad)"}  # fmt: skip
_DASHES = ((4, 1.5), (1, 1.5), (7, 1.5, 1, 1.5), (4, 1.5, 1, 1.5, 1, 1.5))
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


@dataclass(frozen=True)
class Point:
    """A figure after one round."""

    round: int
    """0 is where the rounds started."""
    value: float
    error: float | None = None
    """Standard error, drawn as a bar."""


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Mean of the last `span` finite values up to each point of (N,), NaN where there is none."""
    finite = np.isfinite(values)
    sums, counts = np.cumsum(np.where(finite, values, 0.0)), np.cumsum(finite)
    sums[span:], counts[span:] = sums[span:] - sums[:-span], counts[span:] - counts[:-span]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def curves_svg(curve: Curve, prefix: str, width: float = 4.6, height: float = 2.4) -> str:
    """One chart as an <svg> element for an HTML page; `prefix` keeps its ids apart from those of other charts. Inches."""

    def draw(axes) -> None:
        for points, colour, label in ((curve.train, _FIRST, "training"), (curve.validation, _SECOND, "validation")):
            if points:
                _draw(axes, np.array(points, dtype=np.float64), colour, label)
        if _spans_decades(curve):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        if curve.train and curve.validation:
            axes.legend(frameon=False, fontsize=8)

    return _chart(draw, prefix, width, height)


def variants_svg(variants: Mapping[str, Sequence[Point]], prefix: str, width: float = 4.6, height: float = 2.4) -> str:
    """One figure over the rounds, a curve per variant: the first is solid, those compared with it are dashed.

    A name that is empty has no place in the legend; a variant without points has none either, but a colour. As `curves_svg` else.
    """

    def draw(axes) -> None:
        # Patterns change after a turn of the colours: each pair is met once before the first comes back.
        styles = cycle((colour, (0, dashes)) for dashes in _DASHES for colour in (_SECOND, _THIRD, _FOURTH))
        for number, (name, points) in enumerate(variants.items()):
            rounds, values, errors = np.array([(p.round, p.value, p.error or 0.0) for p in points], dtype=np.float64).reshape(-1, 3).T
            colour, style = next(styles) if number else (_FIRST, "-")
            if points:
                axes.errorbar(rounds, values, errors, color=colour, linestyle=style, linewidth=1.6, elinewidth=0.8, capsize=2,
                              marker="o", markersize=3, label=name)
        axes.set_xticks(sorted({point.round for points in variants.values() for point in points}))
        axes.set_xlabel("round")
        if any(name and points for name, points in variants.items()):
            axes.legend(frameon=False, fontsize=8, handlelength=4)

    return _chart(draw, prefix, width, height)


def _chart(draw: Callable[[Axes], None], prefix: str, width: float, height: float) -> str:
    with matplotlib.rc_context(_RC | {"svg.hashsalt": prefix}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
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
