"""Read a folder of shards: which clips there are, and the bytes of each. The index holds arrays, not an object per shard."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.checksum import crc32
from data_prep.layout import DATASET_FILE, INDEX_FILE, TARS, ShardFolder, read_json, tar_folder, tar_place
from data_prep.members import Fault, MemberReader, Wanted
from data_prep.parallel import in_order
from data_prep.remote.disk_cache import DiskCache
from data_prep.shards import shard_name
from data_prep.sidecar import Member, ShardError, Sidecar, parse_sidecar, sidecar_hash
from data_prep.storage import Folder, parse_parquet

__all__ = ["Entry", "Layer", "Member", "ShardError", "ShardInfo", "ShardSet", "ShardTable", "build_index", "shard_info", "some"]

_OPEN_SHARDS = 48


@dataclass(frozen=True)
class ShardInfo:
    """A row of the index: `clips` counts the good rows, `bytes` the whole tar.

    `hash` stands for what the sidecar says of its clips' bytes, `sidecar_crc32` for the sidecar as a file.
    """

    name: str
    split: str
    clips: int
    rows: int
    bytes: int
    hash: str
    sidecar_crc32: int

    @property
    def number(self) -> int:
        """The number in its name."""
        return int(self.name.rpartition("-")[2])


class ShardTable(Sequence[ShardInfo]):
    """Rows of an index, held as columns: hundreds of thousands of shards open at once and cost tens of megabytes."""

    def __init__(self, table: pa.Table):
        self._table = table.combine_chunks()

    @classmethod
    def of(cls, infos: Iterable[ShardInfo]) -> ShardTable:
        """From single rows."""
        rows = [tuple(getattr(info, name) for name in _INDEX_SCHEMA.names) for info in infos]
        return cls(pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * len(_INDEX_SCHEMA), schema=_INDEX_SCHEMA))

    @classmethod
    def parse(cls, data: bytes) -> ShardTable:
        """From the bytes of index.parquet."""
        return cls(parse_parquet(data).select(_INDEX_SCHEMA.names))

    def to_bytes(self) -> bytes:
        """As a Parquet file."""
        sink = pa.BufferOutputStream()
        pq.write_table(self._table, sink)
        return sink.getvalue().to_pybytes()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, shard: int) -> ShardInfo:
        shard = range(len(self))[shard]
        return ShardInfo(*(column[shard].as_py() for column in self._table.columns))

    def name(self, shard: int) -> str:
        """The name of one shard."""
        return self._table["name"][shard].as_py()

    def column(self, name: str) -> pa.ChunkedArray:
        """One field of all shards."""
        return self._table[name]

    def take(self, numbers: Iterable[int]) -> ShardTable:
        """These rows, in this order."""
        return ShardTable(self._table.take(pa.array(np.fromiter(numbers, np.int64))))

    def of_split(self, split: str) -> ShardTable:
        """The shards of one split."""
        return ShardTable(self._table.filter(pc.equal(self._table["split"], split)))

    def places_in(self, other: ShardTable) -> pa.ChunkedArray:
        """Where in `other` each shard of this table lies, by name; null where it does not."""
        return pc.index_in(self._table["name"], value_set=other._table["name"])


_INDEX_SCHEMA = pa.schema({"name": pa.string(), "split": pa.string(), "clips": pa.int64(), "rows": pa.int64(), "bytes": pa.int64(),
                           "hash": pa.string(), "sidecar_crc32": pa.uint32()})  # fmt: skip
assert _INDEX_SCHEMA.names == [field.name for field in fields(ShardInfo)]


class Entry(NamedTuple):
    """One good clip: its members by extension, the sidecar's other columns, and the URLs of layers that do not hold it."""

    shard: str
    key: str
    members: dict[str, Member]
    columns: Mapping[str, Any]
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """The shards of one folder that a ShardSet reads, the settings they were made with, and the folder of their tars."""

    folder: Folder
    shards: ShardTable
    settings: dict[str, Any]
    tars: Folder

    @property
    def hash(self) -> str:
        """sha256 over the settings and each shard's name, clips and hash: other data, other hash."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for name in ("name", "hash"):
            digest.update(b"\0" + "\n".join(self.shards.column(name).to_pylist()).encode())
        digest.update(self.shards.column("clips").to_numpy().astype("<i8").tobytes())
        return digest.hexdigest()


class ShardSet:
    """The good clips of a folder of shards, each read by its byte range. Pickled with its index; every process opens its own files."""

    def __init__(self, layers: Sequence[Layer], open_shards: int = _OPEN_SHARDS, cache: DiskCache | None = None):
        self._layers, self._open_shards, self._cache = tuple(layers), open_shards, cache
        self.url, self.settings = layers[0].folder.url, layers[0].settings
        self.shards = layers[0].shards
        self.counts: np.ndarray = self.shards.column("clips").to_numpy()
        self._readers = [MemberReader(layer.tars, open_shards, cache) for layer in self._layers]
        self._sidecar = lru_cache(open_shards * len(layers))(partial(_sidecar_of, self._layers))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self._layers, self._open_shards, self._cache)  # open files and sidecars stay behind

    @classmethod
    def open(cls, url: str | os.PathLike[str], split: str | None = None) -> ShardSet:
        """Open an indexed folder, all of it or one split."""
        folder = Folder(url)
        try:
            dataset, index = read_json(folder, DATASET_FILE), folder.read(INDEX_FILE)
        except FileNotFoundError:
            raise ShardError(f"{folder.url}: no index here; build it with `foleyscale prep index {folder.url}`") from None
        if dataset.get("index_crc32") != crc32(index):
            problem = f"not the file that {DATASET_FILE} tells of: damaged, or of another version"
            raise ShardError(f"{folder.url}/{INDEX_FILE}: {problem}; build it again with `foleyscale prep index`")
        shards = ShardTable.parse(index)
        chosen = shards if split is None else shards.of_split(split)
        if not len(chosen):
            splits = sorted(pc.unique(shards.column("split")).to_pylist())
            raise ShardError(f"{folder.url}: no shards of split {split!r}; it has {splits}")
        return cls([Layer(folder, chosen, dataset.get("settings", {}), tar_folder(folder, dataset))])

    @cached_property
    def hash(self) -> str:
        """Stands for the clips of all layers and how they were made."""
        hashes = [layer.hash for layer in self._layers]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def is_local(self) -> bool:
        """Whether all bytes lie on mounted file systems; connections to a remote one must not cross a fork."""
        return all(layer.folder.is_local and layer.tars.is_local for layer in self._layers)

    def with_layer(self, other: ShardSet) -> ShardSet:
        """Also read the members of `other`: shards of the same names and keys. This set decides which clips there are."""
        places = self.shards.places_in(other.shards)
        if places.null_count:
            missing = self.shards.column("name").filter(pc.is_null(places)).to_pylist()
            raise ShardError(f"{other.url}: lacks {some(missing)} of {self.url}; make these shards, then index the folder again")
        joined = ShardSet([*self._layers, *other.select(places.to_pylist())._layers], self._open_shards, self._cache)
        joined._check_names()
        return joined

    def select(self, numbers: Iterable[int]) -> ShardSet:
        """These shards only, in this order."""
        order = list(numbers)
        return ShardSet([replace(layer, shards=layer.shards.take(order)) for layer in self._layers], self._open_shards, self._cache)

    def keeping_open(self, shards: int) -> ShardSet:
        """The same set, holding at least this many sidecars and tars open at a time."""
        return ShardSet(self._layers, max(shards, self._open_shards), self._cache)

    def cached(self, root: str | os.PathLike[str], limit: int) -> ShardSet:
        """The same set, keeping what it reads of remote tars in the local folder `root`, which grows to `limit` bytes at most."""
        keep = {layer.tars.url for layer in self._layers} | (self._cache.keep if self._cache else frozenset())
        return ShardSet(self._layers, self._open_shards, DiskCache(root, limit, frozenset(keep)))

    def entry(self, shard: int, row: int) -> Entry:
        """The clip at good row `row` of the set's shard number `shard`, with the members of all layers."""
        sidecar = self._sidecar(0, shard)
        key, members, absent = sidecar.keys[row], sidecar.members(row), []
        for number in range(1, len(self._layers)):
            other = self._sidecar(number, shard)
            if key in other.rows:
                members |= other.members(other.rows[key])
            else:
                absent.append(self._layers[number].folder.url)
        return Entry(sidecar.shard, key, members, sidecar.columns(row), tuple(absent))

    def load(self, shard: int) -> None:
        """Read a shard's sidecars now; `entry` then finds them in memory for as long as no more than the open shards are in use."""
        for number in range(len(self._layers)):
            self._sidecar(number, shard)

    def read(self, shard: int, row: int, names: Iterable[str] | None = None) -> dict[str, bytes]:
        """The clip's members, all or those named; ShardError where one is missing, cut short or damaged."""
        return self.read_entry(self.entry(shard, row), names)

    def read_entry(self, entry: Entry, names: Iterable[str] | None = None) -> dict[str, bytes]:
        """As `read`, with the entry at hand."""
        (found,) = self.read_many([entry], names)
        if isinstance(found, ShardError):
            raise found
        return found

    def read_many(self, entries: Sequence[Entry], names: Iterable[str] | None = None) -> list[dict[str, bytes] | ShardError]:
        """The members of each clip; where one is missing, cut short or damaged, its ShardError stands in the clip's place.

        Remote clips come together: requests run at once, neighbours share one, and only those that failed are repeated.
        """
        names = None if names is None else tuple(names)
        found: list[dict[str, bytes] | ShardError] = [self._lacking(entry, names) or {} for entry in entries]
        clips: list[list[int]] = [[] for _ in self._readers]
        wanted: list[list[Wanted]] = [[] for _ in self._readers]
        for clip, entry in enumerate(entries):
            for name in () if found[clip] else entry.members if names is None else names:
                member = entry.members[name]
                clips[member.layer].append(clip)
                wanted[member.layer].append(Wanted(entry.shard, name, member))
        for layer, reader in enumerate(self._readers):
            for clip, (_, name, _), data in zip(clips[layer], wanted[layer], reader.read(wanted[layer]), strict=True):
                if isinstance(data, Fault):
                    found[clip] = self._error(entries[clip], layer, *data)
                elif not isinstance(found[clip], ShardError):
                    found[clip][name] = data
        return found

    def _lacking(self, entry: Entry, names: Sequence[str] | None) -> ShardError | None:
        """The error where the clip has not all wanted members."""
        if names is None:
            return self._error(entry, 0, "missing_member", f"is not in {some(entry.absent)}") if entry.absent else None
        missing = [name for name in names if name not in entry.members]
        return self._error(entry, 0, "missing_member", f"has no member {some(missing)}") if missing else None

    def _error(self, entry: Entry, layer: int, reason: str, what: str) -> ShardError:
        url = self._layers[layer].tars.url
        return ShardError(f"{url}/{entry.shard}.tar: clip {entry.key} {what}", entry.shard, entry.key, reason)

    def _check_names(self) -> None:
        """Two layers with a member of one name would hide each other; the first clip shows it, as all clips have the same members."""
        shard = int(np.argmax(self.counts > 0))
        if not self.counts[shard]:
            return
        owners: dict[str, str] = {}
        for number, layer in enumerate(self._layers):
            sidecar = self._sidecar(number, shard)
            for member in sidecar.members(0) if sidecar.keys else ():
                if owners.setdefault(member, layer.folder.url) != layer.folder.url:
                    raise ValueError(f"member {member!r} is in {owners[member]} and in {layer.folder.url}; join layers of other names")


def _sidecar_of(layers: Sequence[Layer], layer: int, shard: int) -> Sidecar:
    """The sidecar that was indexed; RuntimeError where another has come in its place, as the order counts on the index's clips."""
    folder, info = layers[layer].folder, layers[layer].shards[shard]
    data, place = folder.read(f"{info.name}.parquet"), f"{folder.url}/{info.name}.parquet"
    if crc32(data) != info.sidecar_crc32:
        # No ShardError, as it is no fault of one clip: all of them would go to the quarantine one by one.
        raise RuntimeError(f"{place}: not the file that was indexed; index again with `foleyscale prep index {folder.url}`, "
                           "or where nobody wrote it again, look with `foleyscale prep verify`")  # fmt: skip
    return Sidecar(layer, info.name, parse_sidecar(data, place))


def build_index(url: str | os.PathLike[str], settings: dict[str, Any], expected: int | None = None, tars: Folder | None = None) -> ShardSet:
    """Write index.parquet and dataset.json over the shards of `url`; ShardError where one of `expected` shards is not there.

    `tars` is the folder of the tars, where they do not lie beside their sidecars; an index that is built again knows it.
    """
    shards = ShardFolder.open(url)
    if tars is not None:
        shards = replace(shards, tars=tars, tar_files=tars.sizes())
    folder = shards.folder
    if not shards.names:
        raise ShardError(f"{folder.url}: no shards here; write them with `foleyscale prep shards`")
    if expected is not None:
        _check_expected(folder, set(shards.names), expected)
    index = ShardTable.of(in_order(lambda name: _survey(shards, name), shards.names))
    data, layer = index.to_bytes(), Layer(folder, index, settings, shards.tars)
    folder.write(INDEX_FILE, data)
    totals = {name: pc.sum(index.column(name)).as_py() for name in ("clips", "rows", "bytes")}
    dataset = {"settings": settings, "shards": len(index), **totals, "hash": layer.hash, "index_crc32": crc32(data)}
    if shards.tars.root != folder.root:
        dataset[TARS] = tar_place(folder, shards.tars)
    folder.write(DATASET_FILE, json.dumps(dataset, indent=2, sort_keys=True).encode() + b"\n")
    return ShardSet.open(url)


def _survey(shards: ShardFolder, name: str) -> ShardInfo:
    data, size = shards.folder.read(f"{name}.parquet"), shards.tar_files.get(f"{name}.tar")
    if size is None:
        remedy = f"remove {name}.parquet and write the shard again" if shards.tars is shards.folder else "bring back that folder"
        raise ShardError(f"{shards.tars.url}/{name}.tar: missing beside its sidecar; {remedy}", name)
    table = parse_sidecar(data, f"{shards.folder.url}/{name}.parquet")
    info = shard_info(name, table, crc32(data), size)
    members = pc.list_flatten(table["members"])
    end = pc.max(pc.add(pc.struct_field(members, "offset"), pc.struct_field(members, "size"))).as_py() or 0
    if size < end:
        remedy = f"copy it again, or remove {name}.parquet and write the shard again"
        raise ShardError(f"{shards.tars.url}/{name}.tar: cut short at {size} of {end} bytes; {remedy}", name)
    return info


def shard_info(name: str, table: pa.Table, checksum: int, size: int) -> ShardInfo:
    """The index row of a shard: its sidecar's rows, the crc32 of the sidecar's bytes, the size of its tar."""
    splits = table["split"].unique().to_pylist()
    if len(splits) > 1:
        raise ShardError(f"{name}.parquet: holds rows of the splits {splits}; a shard holds one", name)
    clips = pc.sum(pc.equal(table["status"], "ok")).as_py() or 0
    return ShardInfo(name, splits[0] if splits else "", clips, len(table), size, sidecar_hash(table), checksum)


def _check_expected(folder: Folder, names: set[str], expected: int) -> None:
    wanted = {shard_name(number) for number in range(expected)}
    if missing := sorted(wanted - names):
        raise ShardError(f"{folder.url}: {len(missing)} of {expected} shards missing: {some(missing)}; run `foleyscale prep shards` again")
    if foreign := sorted(names - wanted):
        raise ShardError(f"{folder.url}: {some(foreign)} do not belong to a data set of {expected} shards; remove them")


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
