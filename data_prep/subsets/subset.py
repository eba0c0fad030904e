"""A subset of finished shards by stricter bounds or by choice: new sidecars, no new pass over media, no copy of a tar."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.checksum import crc32
from data_prep.filters import FilterConfig
from data_prep.index import ShardInfo, ShardSet, build_index
from data_prep.layout import SETTINGS_FILE, ShardFolder, read_json, used_filters
from data_prep.parallel import in_order
from data_prep.sidecar import ShardError, parse_sidecar
from data_prep.storage import Folder
from data_prep.subsets.selection import Judge, Selection, SubsetError

Progress = Callable[[int, int], None]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class SubsetSummary:
    """What became of the clips of the parent."""

    url: str
    """The subset."""
    clips: int
    """Clips kept."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> clips that the parent has and the subset has not."""
    absent: int = 0
    """Listed keys that are no clips of the parent."""
    laxer: tuple[str, ...] = ()
    """Bounds that are laxer than those the parent was made with."""

    def __str__(self):
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
        lines = [f"{self.url}: {self.clips} clips kept, {sum(self.dropped.values())} dropped now" + (f" ({reasons})" if reasons else "")]
        if self.absent:
            lines.append(f"{self.absent} of the listed keys are no clips here: never made, dropped or failed")
        if self.laxer:
            lines.append(f"{', '.join(self.laxer)}: laxer than for the shards; what was dropped then has no data and stays dropped")
        return "\n".join(lines)


def make_subset(
    url: str | os.PathLike[str],
    out: str | os.PathLike[str],
    filters: FilterConfig | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
) -> SubsetSummary:
    """Write sidecars and an index into `out` that keep the clips of `url` within the bounds of `filters` and in `selection`.

    The tars stay where they are. Nothing that was dropped or failed comes back. `progress` is told (steps done, steps to do).
    SubsetError where no clip is left, or where `out` holds something else: then nothing is written.
    """
    parent, source, target = ShardSet.open(url), ShardFolder.open(url), ShardFolder.open(out)
    selection = selection or Selection()
    settings = _settings(parent, filters, selection)
    _check_free(target, source, settings)
    ends = np.cumsum(parent.shards.column("rows").to_numpy()).tolist()
    with Judge(filters, selection, ends[-1]) as judge:
        tables = in_order(lambda info: _sidecar(source.folder, info), parent.shards)
        for shard, table in enumerate(_counted(tables, 0, 2 * len(ends), progress)):
            judge.add(table, ends[shard] - len(table))
        codes, reasons = judge.decided(source.folder.url)
    target.folder.write(SETTINGS_FILE, json.dumps(settings, indent=1).encode() + b"\n")

    def rewrite(shard: int) -> None:
        table = _sidecar(source.folder, parent.shards[shard])
        dropped = _dropping(table, codes[ends[shard] - len(table) : ends[shard]], reasons)
        target.folder.write(f"{parent.shards.name(shard)}.parquet", _parquet(dropped))

    for _ in _counted(in_order(rewrite, range(len(ends))), len(ends), 2 * len(ends), progress):
        pass
    subset = build_index(out, settings, tars=source.tars)
    counts = Counter(dict(zip(reasons, np.bincount(codes, minlength=len(reasons) + 1)[1:].tolist(), strict=True)))
    dropped = {reason: count for reason, count in counts.most_common() if count}
    return SubsetSummary(subset.url, len(subset), dropped, judge.absent, _laxer(used_filters(parent.settings), filters))


def _sidecar(folder: Folder, info: ShardInfo) -> pa.Table:
    """The sidecar that was indexed: what came in its place since, by damage or another run, is not to be built upon."""
    data = folder.read(f"{info.name}.parquet")
    if crc32(data) != info.sidecar_crc32:
        raise ShardError(f"{folder.url}/{info.name}.parquet: not the file that was indexed; look with `foleyscale prep verify`", info.name)
    return parse_sidecar(data, f"{folder.url}/{info.name}.parquet")


def _counted(items: Iterable[_Item], done: int, total: int, progress: Progress | None) -> Iterator[_Item]:
    for number, item in enumerate(items, start=done + 1):
        yield item
        if progress:
            progress(number, total)


def filters_of(url: str | os.PathLike[str]) -> FilterConfig:
    """The bounds that a folder of shards was made with: what to start from for stricter ones."""
    known = used_filters(ShardFolder.open(url).settings)
    return FilterConfig(**{each.name: known[each.name] for each in fields(FilterConfig) if each.name in known})


def _settings(parent: ShardSet, filters: FilterConfig | None, selection: Selection) -> dict[str, Any]:
    """Those of the parent, and what makes the subset; the parent's hash is among them, so the subset's differs."""
    bounds = used_filters(parent.settings) if filters is None else asdict(filters)
    record = {"parent": parent.hash, "filters": bounds, "selection": selection.record()}
    if "subset" in parent.settings:
        record["of"] = parent.settings["subset"]
    return json.loads(json.dumps({**parent.settings, "subset": record}))


def _check_free(target: ShardFolder, source: ShardFolder, settings: dict[str, Any]) -> None:
    """Shards of another kind must not be overwritten; a subset that was broken off is completed."""
    if target.folder.root == source.folder.root:
        raise SubsetError(f"{target.folder.url}: a subset needs a folder of its own")
    known = read_json(target.folder, SETTINGS_FILE) if SETTINGS_FILE in target.files else None
    if known != settings and (known is not None or target.names or target.unfinished):
        raise SubsetError(f"{target.folder.url}: holds other shards, or another subset; choose another folder")


def _laxer(old: Mapping[str, Any], filters: FilterConfig | None) -> tuple[str, ...]:
    found = []
    for name, new in (asdict(filters) if filters else {}).items():
        before = old.get(name)
        if before is None or before == new:
            continue
        if new is None or (new < before if name.startswith("min_") else new > before):
            found.append(f"{name} {new} (was {before})")
    return tuple(found)


def _dropping(table: pa.Table, codes: np.ndarray, reasons: list[str]) -> pa.Table:
    """The sidecar with some rows dropped; their members stay listed, so that the tar can be verified against it."""
    chosen = pa.array(codes > 0)
    named = pa.array(np.array([None, *reasons], dtype=object)[codes], pa.string())
    for name, values in (("status", "dropped"), ("reason", named)):
        column = pc.if_else(chosen, values, table[name])
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    return table


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
