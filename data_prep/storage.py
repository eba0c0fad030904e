"""One folder, local or behind any fsspec URL; a file appears under its final name whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec.core
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

_TRIES = 5
_FIRST_WAIT = 0.5
_Result = TypeVar("_Result")


class Folder:
    """A folder of data. Holds only strings, so it pickles into workers and each process opens its own connections."""

    def __init__(self, url: str | os.PathLike[str]):
        self.url = os.fspath(url).rstrip("/")
        filesystem, root = fsspec.core.url_to_fs(self.url)
        self.root = root.rstrip("/")
        self.is_local = isinstance(filesystem, LocalFileSystem)

    @property
    def _filesystem(self) -> Any:
        # fsspec keeps one instance per process and thread: asking again after a fork never reuses the parent's connections.
        return fsspec.core.url_to_fs(self.url)[0]

    def path(self, name: str) -> str:
        """The path of `name` in the terms of the file system behind the URL."""
        return f"{self.root}/{name}"

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file directly in the folder; empty where the folder does not exist."""
        filesystem = self._filesystem
        filesystem.invalidate_cache()
        try:
            found = _retry(lambda: filesystem.ls(self.root, detail=True))
        except FileNotFoundError:
            return {}
        return {item["name"].rsplit("/", 1)[-1]: item["size"] for item in found if item["type"] == "file"}

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError where there is none."""
        if self.is_local:
            return Path(self.path(name)).read_bytes()
        return _retry(lambda: self._filesystem.cat_file(self.path(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; shorter where the file ends before."""
        if self.is_local:
            with open(self.path(name), "rb") as file:
                return os.pread(file.fileno(), stop - start, start)
        return _retry(lambda: self._filesystem.cat_file(self.path(name), start=start, end=stop))

    def write(self, name: str, data: bytes) -> None:
        """Put a whole small file in place at once."""
        if not self.is_local:
            return _retry(lambda: self._filesystem.pipe_file(self.path(name), data))
        with StagedFile(self, name) as staged:
            staged.file.write(data)
            staged.publish()

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self.path(name))

    def upload(self, local_path: str, name: str) -> None:
        """Send a local file to a remote folder; object stores show it only once it is complete."""
        _retry(lambda: self._filesystem.put_file(local_path, self.path(name)))


def parse_parquet(data: bytes) -> pa.Table:
    """The table of a Parquet file's bytes.

    Not `pq.read_table`: its background threads may let go of the bytes after the interpreter has ended, which aborts the process.
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


class StagedFile:
    """A file under a temporary name no other task uses; `publish` gives it its final one, leaving the block without discards it.

    Local folders stage beside the target so that the rename is atomic; remote ones stage in the local temporary folder.
    """

    def __init__(self, folder: Folder, name: str):
        self._folder, self._name = folder, name

    def __enter__(self) -> StagedFile:
        parent = Path(self._folder.root if self._folder.is_local else tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        if self._folder.is_local:
            _remove_orphans(parent, self._name)
        while True:
            self._temporary = parent / f".{self._name}.{uuid.uuid4().hex}.tmp"
            self.file = open(self._temporary, "xb", buffering=1 << 20)
            with contextlib.suppress(OSError):  # some network file systems have no locks: there orphans stay until removed by hand
                fcntl.flock(self.file, fcntl.LOCK_EX)
            if self._temporary.exists():
                return self
            self.file.close()  # another task took it for an orphan in the moment before the lock

    def publish(self) -> None:
        """Flush to the disk, then show the file under its final name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if not self._folder.is_local:
            return self._folder.upload(str(self._temporary), self._name)
        os.replace(self._temporary, self._folder.path(self._name))
        directory = os.open(self._folder.root, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._temporary.unlink(missing_ok=True)


def _remove_orphans(parent: Path, name: str) -> None:
    """Delete the temporary files of killed writers: a living writer holds the lock on its own."""
    for path in parent.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _retry(call: Callable[[], _Result]) -> _Result:
    """Repeat a remote call that failed for a passing reason, waiting longer each time with jitter, then let the error out."""
    for attempt in range(_TRIES - 1):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except (OSError, FSTimeoutError):
            time.sleep(_FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.5))
    return call()
