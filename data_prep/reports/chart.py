"""Statistics of a data set as one picture: outcomes, lengths, labels, and the scores with the bounds that were used."""

from __future__ import annotations

import io
import os
import posixpath
from typing import Any

import numpy as np

from data_prep.reports.statistics import MEASURES, Distribution, Statistics, count_text, headline
from data_prep.storage import Folder

_INK, _MUTED, _GRID = "#1f2933", "#697586", "#e4e7eb"
_KEPT, _DROPPED, _FAILED = "#2a7f9e", "#e8a33d", "#c8553d"
_REASONS, _LABELS, _BINS, _FEWEST_BINS = 14, 14, 40, 12
_OUTLIERS = 0.005
"""Share of the values at each end that may be gathered in the last bin: a single one must not squeeze all others."""
_LONGEST = 30
_STYLE = {
    "font.size": 9, "font.family": "DejaVu Sans", "text.color": _INK, "axes.labelcolor": _MUTED, "axes.edgecolor": _GRID,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True, "xtick.color": _GRID, "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED, "ytick.labelcolor": _INK, "grid.color": _GRID, "svg.fonttype": "none", "svg.hashsalt": "statistics",
}  # fmt: skip


def write_chart(found: Statistics, url: str | os.PathLike[str]) -> None:
    """Draw the statistics into a file, whose name ends in .png, .svg or .pdf."""
    parent, name = posixpath.split(os.fspath(url))
    kind = name.rpartition(".")[2].lower()
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"{url}: a chart is a .png, .svg or .pdf file; give it such a name")
    Folder(parent or ".").write(name, draw_chart(found, kind))


def draw_chart(found: Statistics, kind: str = "png") -> bytes:
    """The picture as a file of this kind."""
    import matplotlib  # here: it takes half a second to import, and nothing else in this room needs it
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 8.6), facecolor="white", layout="constrained")
        figure.get_layout_engine().set(w_pad=0.16, h_pad=0.12)
        head, upper, lower = figure.add_gridspec(3, 1, height_ratios=(0.09, 1.25, 1))
        _outcomes(figure.add_subplot(head), found)
        upper = upper.subgridspec(1, 3)
        _bars(figure.add_subplot(upper[0]), "Dropped and failed, by reason", _reasons(found), found.rows, _REASONS, "none")
        _histogram(figure.add_subplot(upper[1]), "duration", found)
        labels = [(name, count, _KEPT) for name, count in found.labels.most_common()]
        title = f"Labels, the first {_LABELS} of {len(labels):,}" if len(labels) > _LABELS else "Labels"
        _bars(figure.add_subplot(upper[2]), title, labels, found.clips, _LABELS, "no labels")
        for place, name in zip(lower.subgridspec(1, 4), ("loudness", "silence", "motion", "av_offset"), strict=True):
            _histogram(figure.add_subplot(place), name, found)
        file = io.BytesIO()
        # No date: equal statistics give equal files.
        figure.savefig(file, format=kind, dpi=110, metadata={"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind])
    return file.getvalue()


def _outcomes(axes: Any, found: Statistics) -> None:
    """The totals, and one bar of all rows: kept, dropped, failed."""
    name = posixpath.basename(found.url)
    axes.set_title(f"{name}: {headline(found)}" if name else headline(found), fontsize=14, pad=26, parse_math=False)
    start, total = 0, max(1, found.rows)
    for status, text, colour in (("ok", "kept", _KEPT), ("dropped", "dropped", _DROPPED), ("failed", "failed", _FAILED)):
        count = found.statuses[status]
        axes.barh(0, count, left=start, color=colour, height=1, label=f"{text} {count:,} ({count / total:.1%})")
        start += count
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0, handlelength=1, handleheight=1,
                borderpad=0.3, columnspacing=2)  # fmt: skip
    axes.set(xlim=(0, total), ylim=(-0.5, 0.5))
    axes.set_axis_off()


def _reasons(found: Statistics) -> list[tuple[str, int, str]]:
    colours = {"dropped": _DROPPED, "failed": _FAILED}
    reasons = [(reason, count, colours[status]) for status, counter in found.reasons.items() for reason, count in counter.items()]
    return sorted(reasons, key=lambda each: -each[1])


def _bars(axes: Any, title: str, bars: list[tuple[str, int, str]], total: int, most: int, none: str) -> None:
    """Horizontal bars, the longest first, each with its count; beyond `most` they are added up in words."""
    axes.set_title(title)
    if not bars:
        _nothing(axes, none)
        return
    shown, rest = bars[:most], bars[most:]
    largest = max(count for _, count, _ in shown)
    places = range(len(shown))
    axes.barh(places, [count for _, count, _ in shown], color=[colour for *_, colour in shown], height=0.68)
    for place, (_, count, _) in enumerate(shown):
        axes.text(count + 0.015 * largest, place, f"{count:,}  {count / max(1, total):.1%}", va="center", color=_MUTED, fontsize=8)
    axes.set_yticks(places, [_short(name) for name, *_ in shown], parse_math=False)
    if rest:
        axes.set_xlabel(f"and {len(rest):,} more with {sum(count for _, count, _ in rest):,} together", loc="left")
    # Few bars keep the height that they have among many.
    axes.set(xlim=(0, 1.28 * largest), ylim=(most - 0.4, -0.6))
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _histogram(axes: Any, name: str, found: Statistics) -> None:
    """Kept and dropped clips by one measurement, with the bound that was used."""
    measure, values = MEASURES[name], found.measures[name]
    axes.set_title(f"{measure.title}, {measure.unit}".removesuffix(", "))
    if not values:
        _nothing(axes, "not measured")
        return
    bound = found.filters.get(measure.bound)
    bounds = () if bound is None else (-bound, bound) if name == "av_offset" else (bound,)
    edges, kept, dropped = values.histogram(_BINS, bounds, outliers=_OUTLIERS)
    for counts, below, colour in ((kept, 0, _KEPT), (dropped, kept, _DROPPED)):
        axes.bar(edges[:-1], counts, np.diff(edges), bottom=below, align="edge", color=colour, edgecolor="white", linewidth=0.6)
    for place in bounds:
        axes.axvline(place, color=_INK, linewidth=1.1, linestyle=(0, (4, 3)))
    if bounds:
        axes.set_title(f"{measure.bound} {bound:g}", loc="right", fontsize=8, fontweight="normal", color=_MUTED)
    low, high = axes.get_xlim()
    margin = max(0, _FEWEST_BINS * (edges[1] - edges[0]) - (high - low)) / 2
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel(_in_words(values), loc="left", fontsize=8)
    axes.grid(axis="y", linewidth=0.8)
    axes.tick_params(length=0)
    axes.yaxis.set_major_formatter(lambda value, _: count_text(value))
    axes.locator_params(axis="y", nbins=5, integer=True)
    axes.locator_params(axis="x", nbins=6)


def _in_words(values: Distribution) -> str:
    """Quantiles of the kept clips: the last bins hold outliers, so the picture alone does not tell how far they go."""
    found = values.quantiles()
    if not found:
        return "none kept"
    return " · ".join(f"{name} {found[name]:.3g}" for name in ("5%", "median", "95%", "max"))


def _nothing(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_MUTED)
    axes.set(xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1].rstrip()}…"
