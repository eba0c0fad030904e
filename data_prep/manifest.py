"""The manifest: one row per wanted clip, as a Parquet table. It is written and read in pieces, however long it is."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.digests import ContentHash, KeyLedger, key_digest
from data_prep.storage import Folder, StagedFile

__all__ = ["Manifest", "ManifestRow", "make_key", "read_manifest", "write_manifest"]

LONGEST_KEY = 72
"""Characters: a tar takes names of 100, and the extension of a feature comes after the key."""
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")
_BATCH = 1 << 14
_PIECE = 1 << 26

SCHEMA = pa.schema([
    pa.field("key", pa.string(), nullable=False),
    pa.field("dataset", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("start", pa.float64(), nullable=False),
    pa.field("end", pa.float64()),
    pa.field("labels", pa.list_(pa.string()), nullable=False),
    pa.field("caption", pa.string(), nullable=False),
    pa.field("extra", pa.string(), nullable=False),
])  # fmt: skip


@dataclass(kw_only=True)
class ManifestRow:
    """One wanted clip."""

    key: str
    """Unique and the same in every run: letters, digits, '-' and '_'; see `make_key`."""
    dataset: str
    """Name of the collection."""
    split: str = "train"
    """Name of the split: letters, digits, '-' and '_'."""
    source: str
    """Path or URL of the media file, absolute or below a media root."""
    start: float = 0.0
    """Seconds from the beginning of the file."""
    end: float | None = None
    """Seconds; None or NaN for the end of the file."""
    labels: list[str] = field(default_factory=list)
    """Classes, if any."""
    caption: str = ""
    """A sentence, if any."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the collection knows, as JSON can hold it."""

    def __post_init__(self):
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"key {self.key!r} must be 1 to {LONGEST_KEY} letters, digits, '-' or '_': make it with make_key()")
        if not _KEY.fullmatch(self.split):
            raise ValueError(f"{self.key}: split {self.split!r} may hold only letters, digits, '-' and '_'")
        if not self.source:
            raise ValueError(f"{self.key}: source is empty; give the path or URL of the media file")
        if isinstance(self.labels, str):
            raise ValueError(f"{self.key}: labels is the text {self.labels!r}; give a list of texts")
        if self.end is not None and math.isnan(self.end):
            self.end = None
        if not (0 <= self.start < math.inf and (self.end is None or self.start < self.end < math.inf)):
            raise ValueError(f"{self.key}: start and end are {self.start} and {self.end} s; need 0 <= start < end")


def make_key(text: str) -> str:
    """`text` as a key: other characters become '_'; a text that is too long keeps its head and a hash of the whole."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", unicodedata.normalize("NFC", text)) or "_"
    return key if len(key) <= LONGEST_KEY else f"{key[: LONGEST_KEY - 9]}-{short_hash(text)}"


def short_hash(text: str) -> str:
    """Eight hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(unicodedata.normalize("NFC", text).encode(), digest_size=4).hexdigest()


def write_manifest(
    rows: Iterable[ManifestRow], url: str | os.PathLike[str], set_aside: Callable[[ManifestRow], None] | None = None
) -> int:
    """Write rows in the order given; returns how many. Nothing appears under the name before all is written.

    Of rows with one key the first stays and the others go to `set_aside`; without it they raise ValueError, as do no rows at all.
    """
    folder, name = _locate(os.fspath(url))
    with StagedFile(folder, name) as staged, KeyLedger() as ledger:
        _write(_noted(rows, ledger), staged)
        if not len(ledger):
            raise ValueError(f"no clips for {url}: the reader found none")
        repeated = ledger.repeated()
        if not repeated:
            staged.publish()
            return len(ledger)
        staged.file.flush()
        with Manifest(staged.file.name) as first, StagedFile(folder, name) as cleaned:
            count = _write(_once(first.rows(), repeated, set_aside or _refuse), cleaned)
            cleaned.publish()
            return count


def _noted(rows: Iterable[ManifestRow], ledger: KeyLedger) -> Iterator[ManifestRow]:
    for row in rows:
        ledger.add(row.key)
        yield row


def _once(rows: Iterable[ManifestRow], repeated: set[bytes], set_aside: Callable[[ManifestRow], None]) -> Iterator[ManifestRow]:
    seen: set[str] = set()
    for row in rows:
        if row.key in seen:
            set_aside(row)
            continue
        if key_digest(row.key) in repeated:
            seen.add(row.key)
        yield row


def _refuse(row: ManifestRow) -> None:
    raise ValueError(f"key {row.key!r} is given twice (again for {row.source}); keys must be unique")


def _write(rows: Iterable[ManifestRow], staged: StagedFile) -> int:
    rows, count = iter(rows), 0
    with pq.ParquetWriter(staged.file, SCHEMA, compression="zstd") as writer:
        while batch := list(itertools.islice(rows, _BATCH)):
            writer.write_table(pa.Table.from_pylist([_record(row) for row in batch], schema=SCHEMA))
            count += len(batch)
    return count


def _record(row: ManifestRow) -> dict[str, Any]:
    return asdict(row) | {"extra": json.dumps(row.extra, sort_keys=True, ensure_ascii=False)}


class Manifest:
    """A manifest file, read in pieces. ValueError naming what is missing where the file is no manifest.

    A remote one is copied to the local temporary folder first: it is read more than once.
    """

    def __init__(self, url: str | os.PathLike[str]):
        self.url = os.fspath(url)

    def __enter__(self) -> Manifest:
        with ExitStack() as stack:
            try:
                copy = stack.enter_context(_local_copy(*_locate(self.url)))
                self._file = stack.enter_context(pq.ParquetFile(copy))
            except FileNotFoundError as error:
                raise ValueError(f"{self.url}: no such manifest") from error
            except pa.ArrowInvalid as error:
                raise ValueError(f"{self.url}: not a Parquet file; make a manifest with `foleyscale prep manifest`") from error
            self._check_columns()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def _check_columns(self) -> None:
        if missing := [name for name in SCHEMA.names if name not in self._file.schema_arrow.names]:
            raise ValueError(f"{self.url}: no column {missing[0]!r}; a manifest has the columns {', '.join(SCHEMA.names)}")

    def tables(self, columns: Sequence[str] = SCHEMA.names, row_groups: Sequence[int] | None = None) -> Iterator[pa.Table]:
        """The rows in order, some thousands at a time, all columns or some, of all row groups or some."""
        wanted = pa.schema([SCHEMA.field(name) for name in columns])
        # One thread: Arrow's pool does not survive a fork into a worker process.
        for batch in self._file.iter_batches(_BATCH, row_groups, columns=list(columns), use_threads=False):
            try:
                yield pa.Table.from_batches([batch]).select(columns).cast(wanted)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
                raise ValueError(f"{self.url}: a column has the wrong type or misses values: {error}") from error

    def rows(self) -> Iterator[ManifestRow]:
        """All rows in order; ValueError naming the key where one is not valid."""
        return itertools.chain.from_iterable(map(_to_rows, self.tables()))

    def take(self, numbers: np.ndarray) -> dict[int, ManifestRow]:
        """The rows of these numbers, by number: one walk over the row groups that hold them."""
        numbers, found = np.unique(numbers), {}
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.metadata.num_row_groups)]
        ends = np.cumsum(sizes)
        for group in np.unique(np.searchsorted(ends, numbers, side="right")).tolist():
            first = int(ends[group]) - sizes[group]
            for table in self.tables(row_groups=[group]):
                inside = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, first + len(table))]
                found.update(zip(inside.tolist(), _to_rows(table.take(inside - first)), strict=True))
                first += len(table)
        return found

    def hash(self) -> str:
        """SHA-256 of the contents, whatever wrote the file and however it is compressed."""
        contents = ContentHash()
        for table in self.tables():
            contents.update(table)
        return contents.hexdigest()


def _locate(url: str) -> tuple[Folder, str]:
    parent, slash, name = url.rpartition("/")
    return Folder(parent or slash or "."), name


@contextmanager
def _local_copy(folder: Folder, name: str) -> Iterator[str | BinaryIO]:
    """The path of the file, or a copy on this machine, which has no name: it goes with the process, however that ends."""
    if folder.is_local:
        yield folder.path(name)
        return
    size = folder.size(name)
    with tempfile.TemporaryFile() as copy:
        for start in range(0, size, _PIECE):
            copy.write(folder.read_range(name, start, min(start + _PIECE, size)))
        yield copy


def _to_rows(table: pa.Table) -> list[ManifestRow]:
    return [ManifestRow(**record | {"extra": _parse(record["key"], record["extra"])}) for record in table.to_pylist()]


def _parse(key: str, extra: str) -> dict[str, Any]:
    try:
        return json.loads(extra)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: extra {extra[:60]!r} is not JSON: {error}") from error


def read_manifest(url: str | os.PathLike[str]) -> list[ManifestRow]:
    """All rows of a manifest at once; for millions of them walk over `Manifest.rows`."""
    with Manifest(url) as manifest:
        return list(manifest.rows())
