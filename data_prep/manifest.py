"""The manifest: one row per wanted clip, as Parquet."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

KEY = re.compile(r"[A-Za-z0-9_-]+")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")

SCHEMA = pa.schema([
    ("key", pa.string()), ("dataset", pa.string()), ("split", pa.string()), ("source", pa.string()), ("start", pa.float64()),
    ("end", pa.float64()), ("labels", pa.list_(pa.string())), ("caption", pa.string()), ("extra", pa.string()),
])


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the row or file and what to do."""


@dataclass(kw_only=True)
class ManifestRow:
    """One wanted clip."""

    key: str
    """Unique and stable across runs; letters, digits, `-` and `_` only: a dot or slash would break WebDataset's grouping."""
    source: str
    """Path or URL of the file that holds the clip."""
    dataset: str = "folder"
    """Where it comes from."""
    split: str = "train"
    """train, heldout, test, ..."""
    start: float = 0.0
    """Seconds into the source."""
    end: float | None = None
    """Seconds into the source; None is the source's end."""
    labels: list[str] = field(default_factory=list)
    """What is heard or seen."""
    caption: str = ""
    """The same as a sentence."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else the data set knows; stored as JSON."""

    def __post_init__(self):
        if not KEY.fullmatch(self.key):
            raise ManifestError(f"key {self.key!r}: only letters, digits, - and _ are allowed; make it with make_key()")
        if not (math.isfinite(self.start) and self.start >= 0):
            raise ManifestError(f"{self.key}: start is {self.start}: give seconds of at least 0")
        if self.end is not None and not self.end > self.start:
            raise ManifestError(f"{self.key}: end {self.end} is not after start {self.start}")


def make_key(text: str) -> str:
    """A key out of any text: what a key may not hold becomes `_`, and a short hash keeps two such texts apart."""
    safe = _UNSAFE.sub("_", text)
    return safe if safe == text and text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_manifest(rows: Iterable[ManifestRow], url: str | os.PathLike) -> int:
    """Write a manifest (a path or fsspec URL) and return its number of rows; ManifestError where a key comes twice or there is none."""
    columns = [asdict(row) | {"extra": json.dumps(row.extra, sort_keys=True)} for row in rows]
    if not columns:
        raise ManifestError(f"{url}: no clips found, nothing to write")
    _check_unique([row["key"] for row in columns], url)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(columns, schema=SCHEMA), sink, compression="zstd")
    filesystem, path = fsspec.core.url_to_fs(os.fspath(url))
    filesystem.makedirs(filesystem._parent(path), exist_ok=True)
    filesystem.pipe_file(path, sink.getvalue())
    return len(columns)


def read_manifest(url: str | os.PathLike) -> list[ManifestRow]:
    """The rows of a manifest; ManifestError where it is missing or not one."""
    try:
        with fsspec.open(os.fspath(url), "rb") as file:
            table = pq.read_table(pa.BufferReader(file.read()))
    except FileNotFoundError:
        raise ManifestError(f"{url}: no such manifest; make it with `foleyscale prep manifest`") from None
    except pa.ArrowInvalid:
        raise ManifestError(f"{url}: not a manifest (Parquet); make it with `foleyscale prep manifest`") from None
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise ManifestError(f"{url}: column {missing[0]} is missing; make it with `foleyscale prep manifest`")
    rows = table.select(SCHEMA.names).to_pylist()
    _check_unique([row["key"] for row in rows], url)
    return [ManifestRow(**row | {"extra": json.loads(row["extra"] or "{}"), "labels": row["labels"] or []}) for row in rows]


def manifest_hash(rows: Iterable[ManifestRow]) -> str:
    """sha256 over the rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode())
    return digest.hexdigest()


def _check_unique(keys: list[str], url: str | os.PathLike) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ManifestError(f"{url}: key {key} comes twice; keys must be unique")
        seen.add(key)
