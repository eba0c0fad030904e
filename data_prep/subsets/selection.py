"""Which clips of finished shards are wanted: by what was measured, by label, key and length, and each recording once."""

from __future__ import annotations

import json
import os
import posixpath
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.digests import keys_digest
from data_prep.filters import DROPPED, FilterConfig, verdict
from data_prep.index import some
from data_prep.storage import Folder
from data_prep.subsets.duplicates import NearDuplicates

SELECTED = {
    "not_listed": "its key is not in Selection.keys",
    "other_label": "it has none of Selection.labels",
    "excluded_label": "it has one of Selection.without_labels",
    "too_short": "it is shorter than Selection.min_seconds",
    "too_long": "it is longer than Selection.max_seconds",
}
"""Why a selection leaves a clip out, beside the reasons of `filters.DROPPED`."""
_REASONS = list(DROPPED | SELECTED)
_NOT_JUDGED = ("status", "reason", "split", "members", "caption", "message")


class SubsetError(ValueError):
    """A subset that cannot be made as asked; nothing has been written."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which clips are wanted, whatever their measurements."""

    labels: tuple[str, ...] = ()
    """Clips with any of these; none for all."""
    without_labels: tuple[str, ...] = ()
    """No clip with any of these."""
    keys: frozenset[str] | None = None
    """Clips of these keys; None for all."""
    min_seconds: float = 0.0
    """Shorter clips are left out."""
    max_seconds: float | None = None
    """Longer clips are left out; None keeps all."""

    def __post_init__(self):
        if self.min_seconds < 0 or (self.max_seconds is not None and self.max_seconds < self.min_seconds):
            raise ValueError(f"Selection.min_seconds, max_seconds are {self.min_seconds}, {self.max_seconds}: need 0 <= min <= max")
        if both := set(self.labels) & set(self.without_labels):
            raise ValueError(f"Selection.labels and without_labels both name {min(both)!r}")

    def record(self) -> dict[str, Any]:
        """What tells this selection from another, for JSON."""
        chosen = asdict(replace(self, keys=None, labels=sorted(self.labels), without_labels=sorted(self.without_labels)))
        return chosen | {"keys": None if self.keys is None else keys_digest(self.keys)}


def read_keys(url: str | os.PathLike[str]) -> frozenset[str]:
    """The keys in a text file, one a line."""
    folder, name = Folder(posixpath.dirname(os.fspath(url)) or "."), posixpath.basename(os.fspath(url))
    try:
        return frozenset(folder.read(name).decode().split())
    except FileNotFoundError:
        raise SubsetError(f"{url}: no such file; give a text file with one key a line") from None
    except UnicodeDecodeError:
        raise SubsetError(f"{url}: not a text file; give one key a line") from None


class Judge:
    """Decides which clips of the parent stay; a number per row, 0 for rows that stay as they are."""

    def __init__(self, filters: FilterConfig | None, selection: Selection, rows: int):
        self._filters, self._selection = filters, selection
        limit = None if filters is None else filters.max_similarity
        self._duplicates = None if limit is None else NearDuplicates(limit)
        self._codes = np.zeros(rows, np.uint8)
        self._unseen = {*selection.labels, *selection.without_labels}
        self._clips = self._listed = 0

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        if self._duplicates is not None:
            self._duplicates.__exit__(*error)

    @property
    def absent(self) -> int:
        """Listed keys that were not among the clips."""
        return 0 if self._selection.keys is None else len(self._selection.keys) - self._listed

    def add(self, table: pa.Table, first: int) -> None:
        """Judge the rows of a shard, of which `first` come before."""
        good = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy(zero_copy_only=False))
        needed = [name for name in table.column_names if name not in _NOT_JUDGED]
        rows = table.select(needed).take(good).to_pylist()
        self._clips += len(rows)
        for place, row in zip((first + good).tolist(), rows, strict=True):
            reason = self._reason(row)
            if reason:
                self._drop(place, reason)
            elif self._duplicates is not None and (fingerprint := _value(row, "fingerprint")) is not None:
                self._duplicates.add(_recording(row), row["start"], row["key"], fingerprint, place)

    def _reason(self, row: dict[str, Any]) -> str | None:
        """The first reason to drop a clip."""
        wanted, labels = self._selection, set(row.get("labels") or ())
        self._unseen -= labels
        listed = wanted.keys is None or row["key"] in wanted.keys
        self._listed += listed
        if self._filters is not None and (reason := self._verdict(row)):
            return reason
        if not listed:
            return "not_listed"
        if wanted.labels and not labels.intersection(wanted.labels):
            return "other_label"
        if labels.intersection(wanted.without_labels):
            return "excluded_label"
        return self._length_reason(row) if wanted.min_seconds or wanted.max_seconds is not None else None

    def _verdict(self, row: dict[str, Any]) -> str | None:
        try:
            return verdict(row, self._filters)
        except (KeyError, TypeError) as error:
            raise SubsetError(f"{row['key']}: lacks a measurement that a filter needs ({error}): make the shards again") from None

    def _length_reason(self, row: dict[str, Any]) -> str | None:
        seconds = _value(row, "duration")
        if seconds < self._selection.min_seconds:
            return "too_short"
        return "too_long" if self._selection.max_seconds is not None and seconds > self._selection.max_seconds else None

    def _drop(self, place: int, reason: str) -> None:
        self._codes[place] = _REASONS.index(reason) + 1

    def decided(self, url: str) -> tuple[np.ndarray, list[str]]:
        """Numbers (rows,) uint8 and the reasons they stand for, from 1; SubsetError where no clip is left or a label is on none."""
        if self._unseen:
            raise SubsetError(f"{url}: no clip has the label {some(sorted(self._unseen))}; `foleyscale prep stats` lists those there are")
        for place in self._duplicates.repeated() if self._duplicates is not None else ():
            self._drop(place, "near_duplicate")
        if np.count_nonzero(self._codes) == self._clips:
            raise SubsetError(f"{url}: no clip is left of {self._clips}; ask for less")
        return self._codes, _REASONS


def _value(row: dict[str, Any], name: str) -> Any:
    try:
        return row[name]
    except KeyError:
        raise SubsetError(f"{row['key']}: the shards have no column {name!r}: make them again with this version") from None


def _recording(row: dict[str, Any]) -> str:
    """What clips of one recording have in common: the id of its video, whichever data set names it, or else its file."""
    video = json.loads(row.get("extra") or "{}").get("video_id")
    return f"video {video}" if video else f"file {_value(row, 'source')}"
