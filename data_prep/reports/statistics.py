"""What a folder of shards holds: clips by outcome and reason, hours, bytes, splits, labels, and how each measurement is distributed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.layout import ShardFolder, used_filters
from data_prep.parallel import in_order
from data_prep.sidecar import ShardError, read_sidecar

_QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


class Measure(NamedTuple):
    """A column of the sidecars whose values are counted."""

    title: str
    unit: str
    step: float
    """Values are rounded to multiples of it: the memory depends on their range, not on their number."""
    bound: str = ""
    """The field of FilterConfig that limits it."""


MEASURES = {
    "duration": Measure("Length", "s", 0.01),
    "loudness": Measure("Loudness", "dBFS", 0.1, "min_loudness"),
    "silence": Measure("Share of silence", "", 0.001, "max_silence"),
    "motion": Measure("Motion", "", 0.0001, "min_motion"),
    "av_offset": Measure("Sound offset", "s", 0.001, "max_offset"),
}


@dataclass
class Distribution:
    """How often each value of a measurement occurs among kept and among dropped clips, in multiples of a step."""

    step: float
    kept: Counter[int] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)

    def add(self, status: str, values: np.ndarray) -> None:
        """Count values (N,) of clips that are "ok" or "dropped"; what is not finite is left out."""
        values = values[np.isfinite(values)]
        steps, counts = np.unique(np.rint(values / self.step).astype(np.int64), return_counts=True)
        counter = self.kept if status == "ok" else self.dropped
        for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
            counter[step] += count

    def __bool__(self) -> bool:
        return bool(self.kept or self.dropped)

    def quantiles(self) -> dict[str, float]:
        """Of the kept clips; nothing where there are none."""
        if not self.kept:
            return {}
        steps = np.array(sorted(self.kept))
        ends = np.cumsum([self.kept[step] for step in steps.tolist()])
        places = {name: int(np.searchsorted(ends, max(1, math.ceil(share * ends[-1])))) for name, share in _QUANTILES.items()}
        return {name: _rounded(steps[place] * self.step, self.step) for name, place in places.items()}

    def histogram(self, bins: int = 40, include: Sequence[float] = (), outliers: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges (n + 1,) and how many kept and dropped clips (n,) lie between them, n <= bins + 1; all values of `include` lie inside.

        The share `outliers` of the values at each end is counted in the last bin there, however far out they are.
        """
        steps = np.array(sorted(self.kept.keys() | self.dropped.keys()) or [0])
        counts = np.array([[counter[step] for step in steps.tolist()] for counter in (self.kept, self.dropped)])
        ends = np.cumsum(counts.sum(axis=0))
        low, high = (steps[np.searchsorted(ends, share * ends[-1])] for share in (outliers, 1 - outliers))
        inside = [round(value / self.step) for value in include]
        low, high = min(low, *inside, high), max(high, *inside, low)
        # Whole steps to a bin, and edges between steps: else some bins would hold one step more than their neighbours.
        width = -(-(high - low + 1) // bins)
        edges = np.arange(low, high + width + 1, width) - 0.5
        clipped = np.clip(steps, low, high)
        kept, dropped = (np.histogram(clipped, edges, weights=count)[0].astype(np.int64) for count in counts)
        return edges * self.step, kept, dropped

    def summary(self) -> dict[str, Any]:
        """Quantiles and a histogram, for JSON."""
        edges, kept, dropped = self.histogram()
        edges = [_rounded(edge, self.step / 2) for edge in edges.tolist()]
        return {"quantiles": self.quantiles(), "histogram": {"edges": edges, "kept": kept.tolist(), "dropped": dropped.tolist()}}


@dataclass
class Statistics:
    """Sums over all sidecars of a folder."""

    url: str
    """The folder."""
    filters: dict[str, Any]
    """The bounds by which clips were kept, as far as the folder tells."""
    shards: int = 0
    """Shards with a sidecar."""
    bytes: int = 0
    """Bytes of their tars."""
    kept_bytes: int = 0
    """Bytes of the members of kept clips."""
    seconds: float = 0.0
    """Length of all kept clips together."""
    statuses: Counter[str] = field(default_factory=Counter)
    """ok, dropped, failed -> rows."""
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {"dropped": Counter(), "failed": Counter()})
    """dropped, failed -> reason -> rows."""
    splits: Counter[str] = field(default_factory=Counter)
    """Split -> kept clips."""
    datasets: Counter[str] = field(default_factory=Counter)
    """Data set -> kept clips."""
    labels: Counter[str] = field(default_factory=Counter)
    """Label -> kept clips; a clip may have several."""
    measures: dict[str, Distribution] = field(default_factory=lambda: {name: Distribution(each.step) for name, each in MEASURES.items()})
    """Column -> distribution."""

    @property
    def rows(self) -> int:
        """Rows of the manifest that the shards account for."""
        return self.statuses.total()

    @property
    def clips(self) -> int:
        """Kept clips."""
        return self.statuses["ok"]

    def summary(self, labels: int | None = None) -> dict[str, Any]:
        """All of it for JSON, with the most frequent `labels`, or every one."""
        counters = {**self.reasons, "splits": self.splits, "datasets": self.datasets}
        return {
            "url": self.url,
            "shards": self.shards,
            "rows": self.rows,
            "clips": self.clips,
            "hours": self.seconds / 3600,
            "bytes": self.bytes,
            "kept_bytes": self.kept_bytes,
            **{name: dict(counter.most_common()) for name, counter in counters.items()},
            "label_count": len(self.labels),
            "labels": dict(self.labels.most_common(labels)),
            "filters": self.filters,
            "measures": {name: each.summary() for name, each in self.measures.items() if each},
        }


def statistics(url: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> Statistics:
    """Walk over the sidecars of a folder, indexed or not. `progress` is told (shards done, shards to do)."""
    shards = ShardFolder.open(url)
    if not shards.names:
        raise ShardError(f"{shards.folder.url}: no shards here; write them with `foleyscale prep shards`")
    found = Statistics(url=shards.folder.url, filters=used_filters(shards.settings))
    found.bytes = sum(shards.tar_files.get(f"{name}.tar", 0) for name in shards.names)
    for table in in_order(lambda name: read_sidecar(shards.folder, name), shards.names):
        found.shards += 1
        _add(found, table)
        if progress:
            progress(found.shards, len(shards.names))
    return found


def _add(found: Statistics, table: pa.Table) -> None:
    _count(found.statuses, table["status"])
    for status, reasons in found.reasons.items():
        _count(reasons, table.filter(pc.equal(table["status"], status))["reason"])
    good = table.filter(pc.equal(table["status"], "ok"))
    found.kept_bytes += pc.sum(pc.struct_field(pc.list_flatten(good["members"]), "size")).as_py() or 0
    _count(found.splits, good["split"])
    if "dataset" in table.column_names:
        _count(found.datasets, good["dataset"])
    if "labels" in table.column_names:
        _count(found.labels, pc.list_flatten(good["labels"]))
    if "duration" in table.column_names:
        found.seconds += pc.sum(good["duration"]).as_py() or 0.0
    for name in MEASURES.keys() & set(table.column_names):
        for status, rows in (("ok", good), ("dropped", table.filter(pc.equal(table["status"], "dropped")))):
            found.measures[name].add(status, rows[name].cast(pa.float64()).to_numpy())


def _count(counter: Counter[str], column: pa.ChunkedArray) -> None:
    for pair in pc.value_counts(column.drop_null()).to_pylist():
        counter[pair["values"]] += pair["counts"]


def _rounded(value: float, step: float) -> float:
    return round(float(value), max(0, math.ceil(-math.log10(step))))


class TextTable(NamedTuple):
    """A table whose cells are texts; the first column is to be set left, the others right."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def text_tables(found: Statistics, labels: int = 15) -> Iterator[TextTable]:
    """The statistics as tables for a terminal, with the most frequent `labels`."""
    total = max(1, found.rows)
    outcomes = [("kept", "", found.clips)]
    outcomes += [(status, reason, count) for status, reasons in found.reasons.items() for reason, count in reasons.most_common()]
    rows = [(f"{status} {reason}".strip(), f"{count:,}", f"{count / total:.1%}") for status, reason, count in outcomes]
    yield TextTable(headline(found), ("", "rows", "share"), rows)
    rows = [(name, *(f"{value:g}" for value in each.quantiles().values())) for name, each in found.measures.items() if each.kept]
    if rows:
        named = [(f"{MEASURES[name].title}, {MEASURES[name].unit}".removesuffix(", "), *values) for name, *values in rows]
        yield TextTable("Measurements of kept clips", ("", *_QUANTILES), named)
    for title, counter in (("Splits", found.splits), ("Data sets", found.datasets), ("Labels", found.labels)):
        if counter:
            rows = [(name, f"{count:,}", f"{count / max(1, found.clips):.1%}") for name, count in counter.most_common(labels)]
            rest = len(counter) - len(rows)
            yield TextTable(f"{title}: {len(counter):,}" + (f", the first {labels}" if rest else ""), ("", "clips", "share"), rows)


def headline(found: Statistics) -> str:
    """The totals in a line."""
    kept = f"{found.clips:,} of {found.rows:,} clips kept ({found.clips / max(1, found.rows):.1%})"
    length = f"{found.seconds / 3600:,.1f} h" if found.seconds >= 3600 else f"{found.seconds / 60:.1f} min"
    return f"{kept}, {length}, {size_text(found.bytes)} in {found.shards:,} shard{'s' * (found.shards != 1)}"


def size_text(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def count_text(count: float) -> str:
    """A number for an axis: 1,200 as 1.2k."""
    for unit in ("", "k", "M"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}G"
