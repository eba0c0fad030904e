"""Where the media of a data set lie: a root and the naming customs of those who downloaded it, tried on the first rows."""

from __future__ import annotations

import itertools
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from data_prep.readers.rejects import ReaderError
from data_prep.remote.urls import without_credentials
from data_prep.storage import is_remote_file
from data_prep.youtube import youtube_url

PROBES = 256
"""Rows on which the patterns are tried: clips of one video stand side by side in some lists, and many a video is gone."""
_THREADS = 32
_FIELDS_OF_A_VIDEO = {"id", "split", "list", "row", "shard"}
_LEADS_ELSEWHERE = re.compile(r"[/\\\0]|\.\.")
_Row = TypeVar("_Row")


class Located(NamedTuple):
    """The file of one row."""

    source: str
    """Path or URL."""
    cut: bool
    """The file is the clip itself; otherwise it is the whole video, and the clip's times apply."""

    def span(self, start: float, end: float) -> dict[str, float]:
        """Start and end in the file, seconds, of a clip with these times in the video.

        A cut file keeps the end as a bound: it may be cut some frames too long; one that is too short ends where it ends.
        """
        return {"start": 0.0, "end": round(end - start, 6)} if self.cut else {"start": float(start), "end": float(end)}


@dataclass(frozen=True)
class Pattern:
    """A naming custom, such as "{split}/{id}_{start:06d}.mp4"."""

    text: str
    """Path below the root, with fields of the row in braces."""
    fields: tuple[str, ...]
    """Their names."""
    cut: bool
    """See `Located`."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Files are cut where a field tells the clips of one video apart; "cut:" or "whole:" before the pattern says otherwise."""
        kind, _, rest = text.partition(":")
        stated = kind in ("cut", "whole")
        pattern = rest if stated else text
        try:
            fields = tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None))
        except ValueError as error:
            raise ReaderError(f"pattern {text!r}: {error}") from error
        if not fields or not all(name.isidentifier() for name in fields):
            raise ReaderError(f"pattern {text!r}: name fields in braces, as in '{{id}}_{{start:06d}}.mp4'")
        return cls(pattern, fields, kind == "cut" if stated else not _FIELDS_OF_A_VIDEO.issuperset(fields))

    def name(self, row: Mapping[str, Any]) -> str:
        """The path of a row's file below the root; ReaderError where a value would lead out of it."""
        for field in self.fields:
            if field not in row:
                raise ReaderError(f"pattern {self.text!r}: no field {field!r}; there are {', '.join(row)}")
            if _LEADS_ELSEWHERE.search(str(row[field])):
                raise ReaderError(f"{field} {str(row[field])[:80]!r} cannot be part of a file's name")
        try:
            return self.text.format_map(row)
        except ValueError as error:
            raise ReaderError(f"pattern {self.text!r}: {error}") from error


class MediaLocator:
    """Finds the files of rows below `root`, a local folder or an fsspec URL, by `patterns`; never lists the root."""

    def __init__(self, root: str | os.PathLike[str], patterns: Sequence[str]):
        if not patterns:
            raise ReaderError(f"{root}: no pattern to find media by; give one with --pattern, such as '{{id}}.mp4'")
        root = without_credentials(os.fspath(root))
        self._filesystem, path = fsspec.core.url_to_fs(root)
        self._is_local = isinstance(self._filesystem, LocalFileSystem)
        # Local roots become absolute: shards may be written from another working directory.
        self.root = (path if self._is_local else root).rstrip("/")
        self.patterns = [Pattern.parse(text) for text in patterns]

    def choose(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the patterns by which files of the first rows are found, those that find most first; ReaderError where none does.

        A pattern that finds nothing but what those before it find is dropped: every one more costs a look per row.
        """
        rows = rows[:PROBES]
        found = {pattern: self._present(pattern, rows) for pattern in self.patterns}
        kept, missing = [], set(range(len(rows)))
        while missing:
            best = max(found, key=lambda pattern: len(found[pattern] & missing))
            if not found[best] & missing:
                break
            kept.append(best)
            missing -= found[best]
        if rows and not kept:
            raise ReaderError(
                f"{self.root}: none of the first {len(rows)} rows has a file here, such as {self._source(self.patterns[0], rows[0])}; "
                f"tried {', '.join(pattern.text for pattern in self.patterns)}: "
                "check the root, or tell how the files are named with --pattern"
            )
        self.patterns = kept or self.patterns

    def locate(self, row: Mapping[str, Any]) -> Located:
        """The file of one row: by the first of several patterns whose file is there, else by the last, without a look."""
        return self.locate_many([row])[0]

    def locate_many(self, rows: Sequence[Mapping[str, Any]]) -> list[Located]:
        """`locate` for several rows at once: a remote root is asked for many files at a time."""
        *looked_at, last = self.patterns
        chosen = [last] * len(rows)
        left = list(range(len(rows)))
        for pattern in looked_at:
            present = self._present(pattern, [rows[index] for index in left])
            for place in present:
                chosen[left[place]] = pattern
            left = [index for place, index in enumerate(left) if place not in present]
        return [Located(self._source(pattern, row), pattern.cut) for pattern, row in zip(chosen, rows, strict=True)]

    def _source(self, pattern: Pattern, row: Mapping[str, Any]) -> str:
        return f"{self.root}/{pattern.name(row)}"

    def _present(self, pattern: Pattern, rows: Sequence[Mapping[str, Any]]) -> set[int]:
        """Which of the rows, by position, have a file by this pattern."""
        sources = [self._source(pattern, row) for row in rows]
        if self._is_local:
            return {index for index, source in enumerate(sources) if os.path.isfile(source)}
        with ThreadPoolExecutor(_THREADS) as pool:
            return set(itertools.compress(itertools.count(), pool.map(self._is_file, sources)))

    def _is_file(self, source: str) -> bool:
        return is_remote_file(self.root, source)


def locate_rows(
    rows: Iterable[tuple[Mapping[str, Any], _Row]], media: str | os.PathLike[str] | None, patterns: Sequence[str]
) -> Iterator[tuple[Located, _Row]]:
    """Each row with its file below `media`, or with its address on YouTube where that is None; holds `PROBES` rows at a time.

    `rows` are pairs: the fields that patterns may name, `id` (of the video) among them, and anything else.
    """
    rows = iter(rows)
    if media is None:
        yield from ((Located(youtube_url(fields["id"]), cut=False), row) for fields, row in rows)
        return
    locator = MediaLocator(media, patterns)
    batch = list(itertools.islice(rows, PROBES))
    locator.choose([fields for fields, _ in batch])
    while batch:
        located = locator.locate_many([fields for fields, _ in batch])
        yield from zip(located, (row for _, row in batch), strict=True)
        batch = list(itertools.islice(rows, PROBES))
