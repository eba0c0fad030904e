"""The manifest: one row per wanted clip, as a Parquet table."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.storage import Folder, parse_parquet

__all__ = ["ManifestRow", "make_key", "manifest_hash", "read_manifest", "read_table", "to_rows", "write_manifest"]

LONGEST_KEY = 72
"""Characters: a tar takes names of 100, and the extension of a feature comes after the key."""
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}")
_BATCH = 1 << 14

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


def write_manifest(rows: Iterable[ManifestRow], url: str | os.PathLike[str]) -> int:
    """Write rows in the order given; returns how many. ValueError for a key given twice or for no rows at all."""
    url, keys, rows, buffer = os.fspath(url), set(), iter(rows), io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA, compression="zstd") as writer:
        while batch := list(itertools.islice(rows, _BATCH)):
            for row in batch:
                if row.key in keys:
                    raise ValueError(f"key {row.key!r} is given twice (again for {row.source}); keys must be unique")
                keys.add(row.key)
            writer.write_table(pa.Table.from_pylist([_record(row) for row in batch], schema=SCHEMA))
    if not keys:
        raise ValueError(f"no clips for {url}: the reader found none")
    folder, name = _locate(url)
    folder.write(name, buffer.getvalue())
    return len(keys)


def _record(row: ManifestRow) -> dict[str, Any]:
    return asdict(row) | {"extra": json.dumps(row.extra, sort_keys=True, ensure_ascii=False)}


def read_table(url: str | os.PathLike[str]) -> pa.Table:
    """A manifest as a table of `SCHEMA`; ValueError naming what is missing where the file is no manifest."""
    url = os.fspath(url)
    folder, name = _locate(url)
    try:
        table = parse_parquet(folder.read(name))
    except FileNotFoundError as error:
        raise ValueError(f"{url}: no such manifest") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{url}: not a Parquet file; make a manifest with `foleyscale prep manifest`") from error
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise ValueError(f"{url}: no column {missing[0]!r}; a manifest has the columns {', '.join(SCHEMA.names)}")
    try:
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise ValueError(f"{url}: a column has the wrong type or misses values: {error}") from error


def _locate(url: str) -> tuple[Folder, str]:
    parent, slash, name = url.rpartition("/")
    return Folder(parent or slash or "."), name


def to_rows(table: pa.Table) -> list[ManifestRow]:
    """The rows of a table, or of a part of it; ValueError naming the key where one is not valid."""
    return [ManifestRow(**record | {"extra": _parse(record["key"], record["extra"])}) for record in table.to_pylist()]


def _parse(key: str, extra: str) -> dict[str, Any]:
    try:
        return json.loads(extra)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: extra {extra[:60]!r} is not JSON: {error}") from error


def read_manifest(url: str | os.PathLike[str]) -> list[ManifestRow]:
    """All rows of a manifest; for millions of them take `read_table` and convert parts."""
    return to_rows(read_table(url))


def manifest_hash(manifest: str | os.PathLike[str] | pa.Table) -> str:
    """SHA-256 of the contents, whatever wrote the file and however it is compressed."""
    table = manifest if isinstance(manifest, pa.Table) else read_table(manifest)
    digest = hashlib.sha256()
    for start in range(0, len(table), _BATCH):
        for column in table.slice(start, _BATCH).columns:
            digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()
