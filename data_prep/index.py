"""Read a folder of shards: which clips there are, where their bytes lie, and whether they are intact."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.shards import BLOCK, SHARD_PATTERN, shard_name
from data_prep.sidecar import Member, ShardError, Sidecar, TarRanges, read_sidecar, sidecar_hash
from data_prep.storage import Folder, parse_parquet

__all__ = ["Entry", "Member", "ShardError", "ShardInfo", "ShardSet", "build_index", "statistics", "verify"]

INDEX_FILE, DATASET_FILE = "index.parquet", "dataset.json"
_OPEN_SHARDS = 48
_THREADS = 8


@dataclass(frozen=True)
class ShardInfo:
    """A row of the index: `clips` counts the good rows, `bytes` the whole tar, `hash` stands for the sidecar's contents."""

    name: str
    split: str
    clips: int
    rows: int
    bytes: int
    hash: str

    @property
    def number(self) -> int:
        """The number in its name."""
        return int(self.name.rpartition("-")[2])


@dataclass(frozen=True)
class Entry:
    """One good clip: its members by extension, the sidecar's other columns, and the URLs of layers that do not hold it."""

    shard: str
    key: str
    members: dict[str, Member]
    columns: dict[str, Any]
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """The shards of one folder that a ShardSet reads, and the settings they were made with."""

    folder: Folder
    shards: tuple[ShardInfo, ...]
    settings: dict[str, Any]

    @property
    def hash(self) -> str:
        """sha256 over the settings and each shard's name, clips and hash: other data, other hash."""
        shards = [(info.name, info.clips, info.hash) for info in self.shards]
        return hashlib.sha256(json.dumps([self.settings, shards], sort_keys=True).encode()).hexdigest()


class ShardSet:
    """The good clips of a folder of shards, each read by its byte range. Cheap to pickle; every process opens its own files."""

    def __init__(self, layers: Sequence[Layer], open_shards: int = _OPEN_SHARDS):
        self._layers = tuple(layers)
        self.url, self.settings = layers[0].folder.url, layers[0].settings
        self.shards = list(layers[0].shards)
        self.counts = np.array([info.clips for info in self.shards], dtype=np.int64)
        hashes = [layer.hash for layer in layers]
        self.hash = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        folders, self._open_shards = [layer.folder for layer in layers], open_shards
        self._sidecar = lru_cache(open_shards * len(folders))(lambda layer, name: Sidecar(layer, read_sidecar(folders[layer], name)))
        self._tar = lru_cache(open_shards * len(folders))(lambda layer, name: TarRanges(folders[layer], name))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self._layers, self._open_shards)  # the caches stay behind

    @classmethod
    def open(cls, url: str | os.PathLike[str], split: str | None = None) -> ShardSet:
        """Open an indexed folder, all of it or one split."""
        folder = Folder(url)
        try:
            dataset, index = json.loads(folder.read(DATASET_FILE)), folder.read(INDEX_FILE)
        except FileNotFoundError:
            raise ShardError(f"{folder.url}: no index here; build it with `foleyscale prep index {folder.url}`") from None
        infos = [ShardInfo(**row) for row in parse_parquet(index).to_pylist()]
        chosen = tuple(info for info in infos if split is None or info.split == split)
        if not chosen:
            raise ShardError(f"{folder.url}: no shards of split {split!r}; it has {sorted({info.split for info in infos})}")
        return cls([Layer(folder, chosen, dataset["settings"])])

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def is_local(self) -> bool:
        """Whether all bytes lie on mounted file systems; connections to a remote one must not cross a fork."""
        return all(layer.folder.is_local for layer in self._layers)

    def with_layer(self, other: ShardSet) -> ShardSet:
        """Also read the members of `other`: shards of the same names and keys. This set decides which clips there are."""
        named = {info.name: number for number, info in enumerate(other.shards)}
        if missing := [info.name for info in self.shards if info.name not in named]:
            raise ShardError(f"{other.url}: lacks {_some(missing)} of {self.url}; make these shards, then index the folder again")
        matching = other.select(named[info.name] for info in self.shards)
        joined = ShardSet([*self._layers, *matching._layers], self._open_shards)
        joined._check_names()
        return joined

    def select(self, numbers: Iterable[int]) -> ShardSet:
        """These shards only, in this order."""
        order = list(numbers)
        layers = [Layer(layer.folder, tuple(layer.shards[i] for i in order), layer.settings) for layer in self._layers]
        return ShardSet(layers, self._open_shards)

    def keeping_open(self, shards: int) -> ShardSet:
        """The same set, holding at least this many sidecars and tars open at a time."""
        return ShardSet(self._layers, max(shards, self._open_shards))

    def entry(self, shard: int, row: int) -> Entry:
        """The clip at good row `row` of the set's shard number `shard`, with the members of all layers."""
        name = self.shards[shard].name
        sidecar = self._sidecar(0, name)
        key, members, absent = sidecar.keys[row], sidecar.members(row), []
        for number in range(1, len(self._layers)):
            other = self._sidecar(number, name)
            if key in other.rows:
                members |= other.members(other.rows[key])
            else:
                absent.append(self._layers[number].folder.url)
        return Entry(name, key, members, sidecar.columns(row), tuple(absent))

    def read(self, shard: int, row: int, names: Iterable[str] | None = None) -> dict[str, bytes]:
        """The clip's members, all or those named; ShardError where one is missing, cut short or damaged."""
        return self.read_entry(self.entry(shard, row), names)

    def read_entry(self, entry: Entry, names: Iterable[str] | None = None) -> dict[str, bytes]:
        """As `read`, with the entry at hand."""
        wanted = list(entry.members if names is None else names)
        missing = [name for name in wanted if name not in entry.members]
        if missing or (names is None and entry.absent):
            what = f"has no member {_some(missing)}" if missing else f"is not in {_some(entry.absent)}"
            raise self._error(entry, 0, "missing_member", what)
        contents: dict[str, bytes] = {}
        for layer in {entry.members[name].layer for name in wanted}:
            contents |= self._read_layer(entry, layer, [name for name in wanted if entry.members[name].layer == layer])
        return {name: contents[name] for name in wanted}

    def _read_layer(self, entry: Entry, layer: int, names: list[str]) -> dict[str, bytes]:
        # The members of a clip lie side by side: one range (one request, on object storage) takes them all.
        members = [entry.members[name] for name in names]
        start = min(member.offset for member in members)
        stop = max(member.offset + member.size for member in members)
        data = memoryview(self._tar(layer, entry.shard).read(start, stop))
        contents = {}
        for name, member in zip(names, members, strict=True):
            part = data[member.offset - start : member.offset - start + member.size]
            if len(part) < member.size:
                raise self._error(entry, layer, "truncated", f"ends after {len(part)} of the {member.size} bytes of {name}")
            if zlib.crc32(part) != member.crc32:
                raise self._error(entry, layer, "bad_crc", f"has a damaged {name}: its crc32 is not the sidecar's")
            contents[name] = bytes(part)
        return contents

    def _error(self, entry: Entry, layer: int, reason: str, what: str) -> ShardError:
        url = self._layers[layer].folder.url
        return ShardError(f"{url}/{entry.shard}.tar: clip {entry.key} {what}", entry.shard, entry.key, reason)

    def _check_names(self) -> None:
        """Two layers with a member of one name would hide each other; the first clip shows it, as all clips have the same members."""
        shard = int(np.argmax(self.counts > 0))
        if not self.counts[shard]:
            return
        name, owners = self.shards[shard].name, {}
        for number, layer in enumerate(self._layers):
            sidecar = self._sidecar(number, name)
            for member in sidecar.members(0) if sidecar.keys else ():
                if owners.setdefault(member, layer.folder.url) != layer.folder.url:
                    raise ValueError(f"member {member!r} is in {owners[member]} and in {layer.folder.url}; join layers of other names")


def build_index(url: str | os.PathLike[str], settings: dict[str, Any], expected: int | None = None) -> ShardSet:
    """Write index.parquet and dataset.json over the shards of `url`; ShardError where one of `expected` shards is not there."""
    folder = Folder(url)
    infos = list(_survey(folder))
    if not infos:
        raise ShardError(f"{folder.url}: no shards here; write them with `foleyscale prep shards`")
    if expected is not None:
        _check_expected(folder, {info.name for info in infos}, expected)
    columns = {field.name: [getattr(info, field.name) for info in infos] for field in fields(ShardInfo)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    folder.write(INDEX_FILE, sink.getvalue().to_pybytes())
    totals = {name: sum(columns[name]) for name in ("clips", "rows", "bytes")}
    dataset = {"settings": settings, "shards": len(infos), **totals, "hash": Layer(folder, tuple(infos), settings).hash}
    folder.write(DATASET_FILE, json.dumps(dataset, indent=2, sort_keys=True).encode() + b"\n")
    return ShardSet.open(url)


def _survey(folder: Folder) -> Iterator[ShardInfo]:
    sizes = folder.sizes()
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda name: _summary(folder, name, sizes.get(f"{name}.tar")), _shard_names(sizes))


def _shard_names(files: Iterable[str]) -> list[str]:
    stems = (name.removesuffix(".parquet") for name in files if name.endswith(".parquet"))
    return sorted(stem for stem in stems if SHARD_PATTERN.fullmatch(stem))


def _summary(folder: Folder, name: str, size: int | None) -> ShardInfo:
    if size is None:
        raise ShardError(f"{folder.url}/{name}.tar: missing beside its sidecar; remove {name}.parquet and write the shard again", name)
    table = read_sidecar(folder, name)
    splits = table["split"].unique().to_pylist()
    if len(splits) > 1:
        raise ShardError(f"{folder.url}/{name}: holds rows of the splits {splits}; a shard holds one", name)
    clips = pc.sum(pc.equal(table["status"], "ok")).as_py() or 0
    members = pc.list_flatten(table["members"])
    end = pc.max(pc.add(pc.struct_field(members, "offset"), pc.struct_field(members, "size"))).as_py() or 0
    if size < end:
        remedy = f"copy it again, or remove {name}.parquet and write the shard again"
        raise ShardError(f"{folder.url}/{name}.tar: cut short at {size} of {end} bytes; {remedy}", name)
    return ShardInfo(name, splits[0] if splits else "", clips, len(table), size, sidecar_hash(table))


def _check_expected(folder: Folder, names: set[str], expected: int) -> None:
    wanted = {shard_name(number) for number in range(expected)}
    if missing := sorted(wanted - names):
        raise ShardError(f"{folder.url}: {len(missing)} of {expected} shards missing: {_some(missing)}; run `foleyscale prep shards` again")
    if foreign := sorted(names - wanted):
        raise ShardError(f"{folder.url}: {_some(foreign)} do not belong to a data set of {expected} shards; remove them")


def verify(url: str | os.PathLike[str]) -> list[str]:
    """Read every byte of every shard and name what is wrong: damaged members, tars and sidecars at odds, an index out of date."""
    folder = Folder(url)
    sizes = folder.sizes()
    names = _shard_names(sizes)
    tars = [name.removesuffix(".tar") for name in sizes if name.endswith(".tar")]
    problems = [f"{name}.tar: no sidecar, so the shard was not finished" for name in sorted(set(tars) - set(names))]
    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(lambda name: _verify_shard(folder, name, sizes), names):
            problems += found
    return problems + _verify_index(folder, names)


def _verify_shard(folder: Folder, name: str, sizes: dict[str, int]) -> list[str]:
    if f"{name}.tar" not in sizes:
        return [f"{name}.tar: missing beside its sidecar"]
    try:
        sidecar = Sidecar(0, read_sidecar(folder, name))
    except ShardError as error:
        return [str(error)]
    tar, position, problems = TarRanges(folder, name), 0, []
    for row, key in enumerate(sidecar.keys):
        for extension, member in sidecar.members(row).items():
            data = tar.read(position, member.offset + member.size)
            wrong = _verify_member(f"{key}.{extension}", member, data) if member.offset == position + BLOCK else "not where the tar goes on"
            if wrong:
                problems.append(f"{name}.tar: {key}.{extension}: {wrong}")
            position = member.offset + member.size + -member.size % BLOCK
    if tar.read(position, position + 2 * BLOCK) != bytes(2 * BLOCK):
        problems.append(f"{name}.tar: no end of archive after the last member")
    return problems


def _verify_member(name: str, member: Member, data: bytes) -> str | None:
    """`data` is the tar header and the contents that should follow it."""
    if len(data) < BLOCK + member.size:
        return f"ends after {max(0, len(data) - BLOCK)} of {member.size} bytes"
    try:
        header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "strict")
    except tarfile.HeaderError as error:
        return f"bad tar header ({error})"
    if (header.name, header.size) != (name, member.size):
        return f"the tar header says {header.name} of {header.size} bytes, the sidecar {member.size}"
    return "damaged: its crc32 is not the sidecar's" if zlib.crc32(memoryview(data)[BLOCK:]) != member.crc32 else None


def _verify_index(folder: Folder, names: list[str]) -> list[str]:
    try:
        indexed = {info.name: info for info in ShardSet.open(folder.url).shards}
        current = {info.name: info for info in _survey(folder)}
    except ShardError as error:
        return [str(error)]
    changed = sorted(name for name in indexed.keys() | current.keys() if indexed.get(name) != current.get(name))
    return [f"{INDEX_FILE}: out of date for {_some(changed)}; build it again"] if changed else []


def statistics(url: str | os.PathLike[str]) -> dict[str, Any]:
    """Counts over all sidecars: clips, hours and bytes kept, dropped and failed by reason, splits, labels (most frequent first)."""
    folder = Folder(url)
    sizes = folder.sizes()
    names = _shard_names(sizes)
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("dropped", "failed", "splits", "labels")}
    seconds = 0.0
    with ThreadPoolExecutor(_THREADS) as pool:
        for table in pool.map(lambda name: read_sidecar(folder, name), names):
            good = table.filter(pc.equal(table["status"], "ok"))
            seconds += sum(value or 0.0 for value in _values(good, "duration"))
            counts["labels"].update(label for labels in _values(good, "labels") for label in labels or ())
            counts["splits"].update(good["split"].to_pylist())
            for status, reason in zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True):
                if status != "ok":
                    counts[status][reason] += 1
    clips, skipped = counts["splits"].total(), counts["dropped"].total() + counts["failed"].total()
    totals = {"shards": len(names), "rows": clips + skipped, "clips": clips, "hours": seconds / 3600}
    return {**totals, "bytes": sum(sizes.get(f"{name}.tar", 0) for name in names)} | {k: dict(c.most_common()) for k, c in counts.items()}


def _values(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist() if name in table.column_names else []


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
