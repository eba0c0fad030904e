"""Read every byte of a folder of shards and name what is wrong, down to the file, the member and the key."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.checksum import crc32
from data_prep.index import ShardInfo, ShardSet, shard_info, some
from data_prep.layout import DATASET_FILE, INDEX_FILE, SETTINGS_FILE, ShardFolder, read_json
from data_prep.manifest import Manifest
from data_prep.parallel import in_order
from data_prep.shards import CORE_COLUMNS, SHARD_PATTERN, shard_name
from data_prep.sidecar import ShardError, TarRanges, parse_sidecar
from data_prep.verification.accounts import RowAccounts
from data_prep.verification.tarcheck import tar_problems

_TOLD = 10
"""Problems of one kind that are told one by one; the others are counted."""
_KNOWN = (INDEX_FILE, DATASET_FILE, SETTINGS_FILE)
_SHARD_FILE = re.compile(rf"{SHARD_PATTERN.pattern}\.(tar|parquet)")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def verify(
    url: str | os.PathLike[str], manifest: str | os.PathLike[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """What is wrong with a folder of shards, a line each, as soon as it is found; nothing where all is sound.

    The tars are such as plain WebDataset reads and hold what the sidecars say, the sidecars are those of the index, and every
    row of the manifest is in exactly one of them: by count and digest of settings.json or, with `manifest`, by name.
    `progress` is told (shards done, shards to do). ValueError where `manifest` is not one.
    """
    try:
        shards = ShardFolder.open(url)
    except ShardError as error:
        yield str(error)
        return
    yield from _file_problems(shards)
    if not shards.names:
        yield f"{shards.folder.url}: no shards here; write them with `foleyscale prep shards`"
        return
    with ExitStack() as stack:
        wanted = None if manifest is None else stack.enter_context(Manifest(manifest))
        accounts = stack.enter_context(RowAccounts(shards, wanted))
        yield from accounts.manifest_problems()
        index = _Index(shards)
        yield from index.problems()
        checks = in_order(lambda name: _check_shard(shards, index.get(name), name), shards.names)
        for done, (keys, problems) in enumerate(checks, start=1):
            name = shards.names[done - 1]
            accounts.add(name, keys)
            yield from problems[:_TOLD]
            if len(problems) > _TOLD:
                yield f"{name}: {len(problems) - _TOLD} more problems"
            if progress:
                progress(done, len(shards.names))
        yield from accounts.problems()


def _file_problems(shards: ShardFolder) -> Iterator[str]:
    apart = shards.tars is not shards.folder
    for name in shards.unfinished:
        yield f"{name}.tar: no sidecar, so the shard was not finished"
    foreign = [name for name in shards.files if name not in _KNOWN and not _TEMPORARY.fullmatch(name)]
    foreign = sorted(name for name in foreign if not _SHARD_FILE.fullmatch(name) or (apart and name.endswith(".tar")))
    if foreign:
        yield f"{shards.folder.url}: foreign files, which are no part of the data: {some(foreign, _TOLD)}"
    if not isinstance(expected := shards.settings.get("shards"), int):
        return
    wanted = [shard_name(number) for number in range(expected)]
    if missing := sorted(set(wanted) - set(shards.names)):
        yield f"{len(missing)} of {expected} shards missing: {some(missing, _TOLD)}; run `foleyscale prep shards` again"
    if extra := sorted(set(shards.names) - set(wanted)):
        yield f"shards that do not belong to a data set of {expected}: {some(extra, _TOLD)}; remove them"


class _Index:
    """The index beside the shards, as far as it can be read."""

    def __init__(self, shards: ShardFolder):
        self._shards, self._places = shards, {}
        try:
            self._set, self._error = ShardSet.open(shards.folder.url), None
            self._places = {name: place for place, name in enumerate(self._set.shards.column("name").to_pylist())}
        except ShardError as error:
            self._set, self._error = None, str(error)

    def get(self, name: str) -> ShardInfo | None:
        """What the index says of a shard."""
        return self._set.shards[self._places[name]] if name in self._places else None

    def problems(self) -> Iterator[str]:
        """Index, dataset.json and settings that are not of one piece."""
        if self._set is None:
            yield self._error
            return
        folder, here = self._shards.folder, set(self._shards.names)
        if changed := sorted(here ^ self._places.keys()):
            yield f"{INDEX_FILE}: out of date for {some(changed, _TOLD)}; build it again"
        dataset, columns = read_json(folder, DATASET_FILE), self._set.shards.column
        expected = {name: pc.sum(columns(name)).as_py() for name in ("clips", "rows", "bytes")}
        expected |= {"shards": len(self._set.shards), "hash": self._set.hash}
        if wrong := sorted(name for name, value in expected.items() if dataset.get(name) != value):
            yield f"{DATASET_FILE}: its {', '.join(wrong)} are not those of {INDEX_FILE}; build the index again"
        if dataset.get("settings", {}) != self._shards.settings:
            yield f"{SETTINGS_FILE}: not the settings in {DATASET_FILE}; restore it, or build the index again"


def _check_shard(shards: ShardFolder, indexed: ShardInfo | None, name: str) -> tuple[list[str], list[str]]:
    """The keys of a shard, and what is wrong with it."""
    try:
        data = shards.folder.read(f"{name}.parquet")
        if indexed and crc32(data) != indexed.sidecar_crc32:
            # Its contents are not looked at: what a Parquet reader makes of damaged bytes is anybody's guess.
            return [], [f"{name}.parquet: not the file that was indexed: damaged, or written since; restore it or build the index again"]
        table = parse_sidecar(data, f"{shards.folder.url}/{name}.parquet")
        if wrong := list(_row_problems(table)):
            return [], [f"{name}.parquet: {problem}; remove it and write the shard again" for problem in wrong]
        return table["key"].to_pylist(), _check_tar(shards, indexed, name, table, crc32(data))
    except (ShardError, OSError, ValueError) as error:
        return [], [f"{name}: cannot be checked: {error}"]


def _check_tar(shards: ShardFolder, indexed: ShardInfo | None, name: str, table: pa.Table, checksum: int) -> list[str]:
    if (size := shards.tar_files.get(f"{name}.tar")) is None:
        return [f"{name}.tar: missing beside its sidecar" if shards.tars is shards.folder else f"{name}.tar: missing in {shards.tars.url}"]
    problems = [f"{name}.tar: {problem}" for problem in tar_problems(TarRanges(shards.tars, name), size, table)]
    if not problems and indexed and shard_info(name, table, checksum, size) != indexed:
        return [f"{INDEX_FILE}: out of date for {name}; build it again"]
    return problems


def _row_problems(table: pa.Table) -> Iterator[str]:
    """What makes a table no sidecar, though it has the columns of one."""
    for name, kind in CORE_COLUMNS.items():
        if table.schema.field(name).type != kind:
            yield f"column {name!r} holds {table.schema.field(name).type}, not {kind}"
            return
    members = pc.list_flatten(table["members"])
    columns = {name: table[name] for name in ("key", "status", "split", "members")}
    columns |= {f"members.{field.name}": pc.struct_field(members, field.name) for field in CORE_COLUMNS["members"].value_type}
    if empty := [name for name, column in columns.items() if column.null_count]:
        yield f"column {empty[0]!r} has rows without a value"
        return
    kept = pc.equal(table["status"], "ok")
    if unknown := set(table["status"].unique().to_pylist()) - {"ok", "dropped", "failed"}:
        yield f"status {min(unknown)!r} is none of ok, dropped, failed"
    if pc.any(pc.and_(kept, pc.equal(pc.list_value_length(table["members"]), 0))).as_py():
        yield "a row is ok, but has no members"
    if pc.any(pc.and_(pc.invert(kept), pc.is_null(table["reason"]))).as_py():
        yield "a row is not ok, but has no reason"
