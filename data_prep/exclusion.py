"""The leakage guard: clips of videos that a model will be evaluated on stay out of its training data, whatever data set they come in."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.manifest import Manifest, ManifestRow
from data_prep.readers.lines import read_json_list, read_lines
from data_prep.readers.rejects import ReaderError
from data_prep.remote.urls import redacted
from data_prep.youtube import VIDEO_ID, id_in_text, is_video_id

EVALUATION_SPLITS = frozenset({"test", "eval", "evaluation", "val", "valid", "validation", "heldout"})
_ALL = ":all"
_BATCH = 1024
_NAME = re.compile(rf"(?:(?:vggsound|vggss|audioset|panda70m)_|Y|.*\[)?({VIDEO_ID})\]?(?:_\d+){{0,2}}(?:\.\w+)*", re.ASCII)
_VGGSOUND_TRAIN = re.compile(r"[^,]+,\s*\d+\s*,.*,\s*train\s*")
_VGGSS_RULE = (
    "VGG-SS is a part of VGGSound's test split: to train on it, make the manifest for evaluating on VGGSound with "
    f"--exclude vggss.json{_ALL}, and exclude that manifest instead of vggsound.csv here"
)


def youtube_id(text: str) -> str | None:
    """The id in an address, a file name or a key as the data sets' tools give them: ID, ID_30, ID_30000_40000.mp4, Title [ID].webm."""
    if is_video_id(text):
        return text
    named = _NAME.fullmatch(text.rpartition("/")[2])
    return id_in_text(text) or (named and named[1])


@dataclass(frozen=True)
class _Videos:
    """The videos of one list."""

    name: str
    """The list's file."""
    digests: np.ndarray
    """Eight bytes for each, sorted: of 10^8 clips checked against 10^6 videos one is dropped by chance once in 10^5 times."""
    whole: bool
    """All its rows count, and rows of evaluation splits are dropped as well."""

    def has(self, digests: np.ndarray) -> np.ndarray:
        """Which of the digests are among them."""
        places = np.searchsorted(self.digests, digests)
        return self.digests[np.minimum(places, len(self.digests) - 1)] == digests


class ExcludedVideos:
    """Videos whose clips are dropped. A million take 8 MB."""

    def __init__(self, lists: Sequence[_Videos]):
        self._lists = lists
        self._seen: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._by_list = Counter({videos.name: 0 for videos in lists})

    @classmethod
    def read(cls, sources: Sequence[str | os.PathLike[str]]) -> ExcludedVideos:
        """From manifests (.parquet), `vggsound.csv`, AudioSet's and Panda-70M's lists, `vggss.json`, or any list with an id, a file
        name or an address at the start of each line. ReaderError for a line without one, or a list without evaluation rows.

        Where a list tells splits, its evaluation rows count. "PATH:all" takes all its rows, and drops rows of evaluation splits too.
        """
        return cls([_read(os.fspath(source)) for source in sources])

    def apply(self, rows: Iterable[ManifestRow]) -> Iterator[ManifestRow]:
        """The rows less those of excluded videos; rows of evaluation splits stay, but for a list with ":all"."""
        rows = iter(rows)
        while batch := list(itertools.islice(rows, _BATCH)):
            self._seen.update(row.dataset for row in batch)
            for row, found_in in zip(batch, self._look_up(batch), strict=True):
                if found_in:
                    self._by_list.update(found_in)
                    self._dropped[row.dataset] += 1
                else:
                    yield row

    def _look_up(self, rows: Sequence[ManifestRow]) -> list[list[str]]:
        """For each row the names of the lists that forbid it."""
        digests = np.array([_digests(*_names(row)) for row in rows], np.uint64)
        training = np.array([row.split.lower() not in EVALUATION_SPLITS for row in rows])
        found: list[list[str]] = [[] for _ in rows]
        for videos in self._lists:
            for index in np.flatnonzero(videos.has(digests).any(axis=1) & (training | videos.whole)):
                found[index].append(videos.name)
        return found

    @property
    def dropped(self) -> int:
        """Clips dropped so far."""
        return self._dropped.total()

    def report(self) -> str:
        """One line for the user: how many were dropped, by which list (some by several) and of which data set."""
        lists = ", ".join(f"{name} {count:,}" for name, count in self._by_list.items()) or "no list given"
        sets = "; ".join(f"{name}: {self._dropped[name]:,} of {count:,}" for name, count in self._seen.items())
        line = f"dropped {self._dropped.total():,} of {self._seen.total():,} clips whose video is excluded: {lists} ({sets or 'no clips'})"
        return f"{line}. {_VGGSS_RULE}" if self._seen["vggss"] else line


def _names(row: ManifestRow) -> tuple[str, str]:
    """What a clip's video may be known by: its id, or its file as well where there is only a file name to guess an id from."""
    if video_id := row.extra.get("video_id"):
        return str(video_id), str(video_id)
    return youtube_id(row.source) or row.source, row.source


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _digests(name: str, other: str) -> tuple[int, int]:
    digest = _digest(name)
    return digest, digest if other == name else _digest(other)


def _read(source: str) -> _Videos:
    url, whole = source.removesuffix(_ALL), source.endswith(_ALL)
    if url.endswith(".parquet"):
        names = _manifest_names(url, whole)
    elif url.endswith(".json"):
        names = _json_names(url)
    else:
        names = _line_names(url, whole)
    digests = np.unique(np.fromiter(map(_digest, names), np.uint64))
    if not len(digests):
        splits = ", ".join(sorted(EVALUATION_SPLITS))
        remedy = "" if whole else f": it has no row of an evaluation split ({splits}); {redacted(url)}{_ALL} takes all its rows"
        raise ReaderError(f"{redacted(url)}: no videos to exclude{remedy}")
    return _Videos(redacted(url).rpartition("/")[2], digests, whole)


def _manifest_names(url: str, whole: bool) -> Iterator[str]:
    with Manifest(url) as manifest:
        for row in manifest.rows():
            if whole or row.split.lower() in EVALUATION_SPLITS:
                yield from _sure_names(row)


def _sure_names(row: ManifestRow) -> Iterator[str]:
    """`_names`, less ids guessed from names such as clip_000001, which files of other videos may have as well."""
    guess, source = _names(row)
    yield source
    if guess != source and guess != guess.lower():
        yield guess


def _json_names(url: str) -> Iterator[str]:
    for where, item in read_json_list(url, "ids, or of objects with file, as vggss.json is"):
        yield _required_id(where, item.get("file") if isinstance(item, dict) else item)


def _line_names(url: str, whole: bool) -> Iterator[str]:
    lines = ((where, line) for where, line in read_lines(url) if not line.startswith("#"))
    for number, (where, line) in enumerate(lines):
        name = line.partition(",")[0].partition("\t")[0].strip().strip('"')
        if not number and not youtube_id(name):
            continue  # a header
        if whole or not _VGGSOUND_TRAIN.fullmatch(line):
            yield _required_id(where, name)


def _required_id(where: str, text: Any) -> str:
    if not (isinstance(text, str) and (found := youtube_id(text))):
        raise ReaderError(f"{where}: {str(text)[:80]!r} names no video: an id of 11 characters, a file name with one, or an address")
    return found
