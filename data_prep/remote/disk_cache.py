"""Ranges of remote files kept on a local disk, up to a number of bytes, shared by all processes of a machine.

Of each file there is a sparse copy that holds what was read of it, each byte at its own place. Nothing says which parts are there:
the reader knows the checksum of what it asks for, and a hole, a write cut short by a crash or a decayed disk all fail it. So there
is no list to keep in step with the bytes, and processes that write the same range at the same time write the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from data_prep.storage import read_descriptor

_PAGE = 4096
_OPEN_FILES = 128
_ROOM = 16
"""A full cache drops copies until one part in so many is free: every look for room goes through all files while the others wait."""
_log = logging.getLogger(__name__)


@dataclass
class DiskCache:
    """A folder of sparse copies, never larger than `limit` bytes; cheap to pickle, every process opens its own files.

    Full, it drops copies of files in folders other than `keep`, the least recently used first. Its own stay, and what comes later is
    not kept: every epoch visits each clip once in a new order, so throwing one out for another would gain nothing. Copies go by URL:
    where shards are made anew under the same one, stale copies keep their place, and the folder is best deleted.
    """

    root: Path
    limit: int
    keep: frozenset[str] = frozenset()
    """URLs of the folders that this run reads."""

    def __post_init__(self) -> None:
        self.root, self._full = Path(self.root), False
        self._file = lru_cache(_OPEN_FILES)(partial(_opened, self.root))

    def __reduce__(self) -> tuple[type[DiskCache], tuple[Path, int, frozenset[str]]]:
        return DiskCache, (self.root, self.limit, self.keep)  # open files stay behind

    def read(self, url: str, name: str, start: int, stop: int) -> bytes:
        """What the copy of file `name` of the folder `url` has at [start, stop): the bytes, fewer, or zeros where nothing was kept."""
        try:
            return read_descriptor(self._file(url, name).fileno(), start, stop)
        except OSError:  # a broken disk makes the cache useless, and harms nothing else
            return b""

    def add(self, url: str, name: str, start: int, data: bytes) -> None:
        """Keep bytes of a file if there is room."""
        if self._full or not data:
            return
        pages = (start + len(data) - 1) // _PAGE - start // _PAGE + 1
        try:
            with self._locked() as count:
                if self._reserve(count, (pages + 1) * _PAGE):  # one for the file system's own list of extents
                    os.pwrite(self._file(url, name).fileno(), data, start)
        except OSError as error:
            self._full = True
            _log.warning("%s: nothing more is cached there (%s)", self.root, error.strerror)

    def _reserve(self, count: int, size: int) -> bool:
        """Count `size` bytes more as used if they fit, after making room where that can be done."""
        text = os.pread(count, 32, 0)
        used = int(text) if text.isdigit() else self._measured()  # empty, or what a crash of the machine left
        if used + size > self.limit:
            # The count says too much: bytes are counted by the page, and by processes that were killed before they wrote them.
            used = self._with_room(size)
        self._full = used + size > self.limit
        os.pwrite(count, b"%020d" % (used if self._full else used + size), 0)
        return not self._full

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The file that says how many bytes are used, for one process at a time."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / "used", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _with_room(self, size: int) -> int:
        """Drop copies that this run does not read until there is room for more than `size` bytes, or none is left; the bytes used then."""
        used, own, wanted = self._measured(), set(map(_folder_name, self.keep)), max(size, self.limit // _ROOM)
        foreign = [path for path in self._copies() if path.parent.name not in own]
        for path in sorted(foreign, key=lambda path: path.stat().st_mtime):
            if used + wanted <= self.limit:
                break
            used -= _size(path)
            path.unlink()
        return used

    def _measured(self) -> int:
        return sum(map(_size, self._copies()))

    def _copies(self) -> list[Path]:
        return list(self.root.glob("*/*"))


def _opened(root: Path, url: str, name: str) -> io.FileIO:
    folder = root / _folder_name(url)
    folder.mkdir(parents=True, exist_ok=True)
    file = io.FileIO(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    os.utime(file.fileno())  # used now: reading alone would not tell
    return file


def _folder_name(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _size(path: Path) -> int:
    """Bytes on the disk, without the holes."""
    return path.stat().st_blocks * 512
