"""One folder, local or behind any fsspec URL; a file appears under its final name whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec.core
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from data_prep.remote.ranges import Range, cut, merged
from data_prep.remote.urls import redacted, without_credentials

_ORPHANED = 3600.0
"""Seconds since it was last written after which a temporary file may be a killed writer's."""
_TRIES = 5
_FIRST_WAIT = 0.5
_SILENCE = 60.0
"""Seconds after which a remote call is given up and made again, beside the time for its bytes."""
_SLOWEST = 1e6
"""Bytes a second below which a connection counts as stalled."""
_CONNECTIONS = 10
"""Requests under way at once: as many connections as botocore keeps."""
_PART = 1 << 24
"""Bytes of one part of a multipart upload: with those of the same moment it is in memory."""
_PARTS_AT_ONCE = 4
_PIECES = 1024
"""Pieces that one writev takes."""

# Beside OSError, what a network or a busy store that fails looks like in the libraries behind the URLs.
_PASSING = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("ConnectionError", "HTTPClientError", "IncompleteReadError", "ChecksumError", "FlexibleChecksumError"),
    "botocore.parsers": ("ResponseParserError",),
}
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_WAIT_AND_ASK = (408, 425, 429)
_Result = TypeVar("_Result")


class Folder:
    """A folder of data. Holds only strings, so it pickles into workers and each process opens its own connections.

    ValueError where the URL holds credentials. Remote calls that fail are repeated, those that stall are given up and repeated.
    """

    def __init__(self, url: str | os.PathLike[str]):
        url = without_credentials(os.fspath(url))
        self.url = url.rstrip("/") if url.rstrip("/").rpartition(":")[2] else url  # of "/" and "file:///" nothing would be left
        filesystem, root = fsspec.core.url_to_fs(self.url)
        self.root = root.rstrip("/") or root
        self.is_local = isinstance(filesystem, LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of `name` in the terms of the file system behind the URL."""
        return f"{self.root.rstrip('/')}/{name}"

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file directly in the folder; empty where the folder does not exist."""
        try:
            found = _retry(self._list)
        except FileNotFoundError:
            return {}
        return {item["name"].rsplit("/", 1)[-1]: item["size"] for item in found if item["type"] == "file"}

    def _list(self) -> list[dict[str, Any]]:
        filesystem = fsspec.core.url_to_fs(self.url)[0]
        filesystem.invalidate_cache()
        try:
            return _call(self.url, "ls", self.root, detail=True)
        finally:
            filesystem.invalidate_cache()  # a size asked for later must not be the one of this moment

    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError where there is none."""
        return os.stat(self.path(name)).st_size if self.is_local else remote_size(self.url, self.path(name))

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError where there is none."""
        if self.is_local:
            return Path(self.path(name)).read_bytes()
        return self.read_range(name, 0, self.size(name))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; shorter where the file ends before."""
        return self.read_ranges([(name, start, stop)])[0]

    def read_ranges(self, ranges: Iterable[tuple[str, int, int]]) -> list[bytes]:
        """Bytes [start, stop) of files, in the order of `ranges`; shorter where a file ends before.

        Remote neighbours come in one request, requests run at once, and only those that failed are repeated.
        """
        wanted = [Range(self.path(name), start, stop) for name, start, stop in ranges]
        return [_read_local(*each) for each in wanted] if self.is_local else read_remote(self.url, wanted)

    def write(self, name: str, data: bytes) -> None:
        """Put a whole small file in place at once."""
        if self.is_local:
            with StagedFile(self, name) as staged:
                staged.file.write(data)
                staged.publish()
        else:
            _retry(lambda: _call(self.url, "pipe_file", self.path(name), data, size=len(data)))

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            _retry(lambda: _call(self.url, "rm_file", self.path(name)))

    def upload(self, local_path: str, name: str) -> None:
        """Send a local file to a remote folder, a large one in parts; object stores show it only once it is complete."""
        size, path = os.path.getsize(local_path), self.path(name)
        parts = {"chunksize": _PART, "max_concurrency": _PARTS_AT_ONCE} if self.url.startswith(("s3://", "s3a://")) else {}

        def send() -> None:
            _call(self.url, "put_file", local_path, path, size=size, **parts)
            if (arrived := _call(self.url, "info", path)["size"]) != size:
                raise OSError(f"{self.url}/{name}: {arrived} of {size} bytes arrived")

        # The store forgets an upload once it is complete: where that answer got lost, the next one is "no such upload".
        _retry(send, lasting=(PermissionError,))


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
        _remove_orphans(parent, self._name)
        while True:
            self._temporary = parent / f".{self._name}.{uuid.uuid4().hex}.tmp"
            self.file = open(self._temporary, "x+b", buffering=1 << 20)
            with contextlib.suppress(OSError):  # some network file systems have no locks: there orphans stay until removed by hand
                fcntl.flock(self.file, fcntl.LOCK_EX)
            if self._temporary.exists():
                return self
            self.file.close()  # another task took it for an orphan in the moment before the lock

    def append(self, pieces: Sequence[bytes]) -> None:
        """Write these pieces one after the other, without a copy that joins them: it would cost as much as the write."""
        self.file.flush()
        done = os.writev(self.file.fileno(), pieces[:_PIECES])
        if done < sum(map(len, pieces)):  # a full disk, or too many pieces for one call
            self.file.write(b"".join(pieces)[done:])

    def publish(self) -> None:
        """Show the file under its final name: locally once the disk has it, remotely once the store has all of it."""
        self.file.flush()
        if not self._folder.is_local:
            return self._folder.upload(str(self._temporary), self._name)
        os.fsync(self.file.fileno())
        os.replace(self._temporary, self._folder.path(self._name))
        directory = os.open(self._folder.root, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def stands(self) -> bool:
        """Whether the final name holds what was published, and not other contents that another task has put there since.

        Locally to the byte; in an object store by size.
        """
        if not self._folder.is_local:
            return self._folder.size(self._name) == os.fstat(self.file.fileno()).st_size
        with open(self._folder.path(self._name), "rb") as there:
            if os.path.samestat(os.fstat(there.fileno()), os.fstat(self.file.fileno())):
                return True
            self.file.seek(0)
            pieces = iter(lambda: self.file.read(_PART), b"")
            return all(piece == there.read(len(piece)) for piece in pieces) and not there.read(1)

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._temporary.unlink(missing_ok=True)


def _remove_orphans(parent: Path, name: str) -> None:
    """Delete the temporary files of killed writers: a living writer holds the lock on its own.

    Some cluster file systems keep locks within a machine: there only its age tells a file from that of a writer elsewhere.
    """
    for path in parent.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime < _ORPHANED:
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _read_local(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        return read_descriptor(file.fileno(), start, stop)


def read_descriptor(descriptor: int, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an open local file; shorter where it ends before."""
    data = os.pread(descriptor, stop - start, start) if start < stop else b""
    while start + len(data) < stop and (part := os.pread(descriptor, stop - start - len(data), start + len(data))):
        data += part  # one call gives no more than 2 GB
    return data


def remote_size(url: str, path: str) -> int:
    """Bytes of the file at `path`, in the terms of the file system behind `url`; OSError where the server does not tell."""
    size = _retry(lambda: _call(url, "info", path)["size"])
    if size is None:
        raise OSError(f"{redacted(url)}: the server does not tell how long it is; download it first")
    return size


def is_remote_file(url: str, path: str) -> bool:
    """Whether there is a file at `path`; an OSError where the store does not tell, where fsspec's `exists` would say no."""
    try:
        return _retry(lambda: _call(url, "info", path)["type"]) == "file"
    except FileNotFoundError:
        return False


def read_remote(url: str, ranges: Sequence[Range]) -> list[bytes]:
    """As `Folder.read_ranges`; the names of `ranges` are paths in the terms of the file system behind `url`."""
    requests, contents = merged(ranges), dict[Range, bytes]()
    _retry(lambda: _fetch(url, [request for request in requests if request not in contents], contents))
    return cut(ranges, contents)


def _fetch(url: str, requests: Sequence[Range], contents: dict[Range, bytes]) -> None:
    """Add what the requests bring to `contents`; the error of one that failed, once all have had their turn."""
    if not requests:
        return
    paths, starts, stops = map(list, zip(*requests, strict=True))
    size = sum(request.size for request in requests)
    answers = _call(url, "cat_ranges", paths, starts, stops, on_error="return", batch_size=_CONNECTIONS, size=size)
    failures = {}
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, bytes) and len(answer) == request.size:
            contents[request] = answer
        else:
            failures[request] = answer
    contents |= _ends(url, failures)
    for request, answer in failures.items():
        if request in contents:
            continue
        # A body may be short without an error: where what stands between mends the headers, or breaks off at a chunk.
        raise answer if isinstance(answer, Exception) else OSError(
            f"{redacted(request.name)}: {len(answer)} of the {request.size} bytes from {request.start} on came"
        )


def _ends(url: str, failures: Mapping[Range, Any]) -> dict[Range, bytes]:
    """Those failures that are none, as the file ends there: with what there is of them."""
    sizes = {path: _call(url, "info", path)["size"] for path in {request.name for request in failures}}
    ends = {}
    for request, answer in failures.items():
        left = min(request.stop, sizes[request.name]) - request.start
        if left <= 0 or (isinstance(answer, bytes) and len(answer) == left):
            ends[request] = b"" if left <= 0 else answer
    return ends


def _call(url: str, method: str, *arguments: Any, size: int = 0, **options: Any) -> Any:
    """One call of the file system behind `url`, given up where it stalls: `size` is how many bytes it moves.

    The libraries' own limits do not do: a store that never asks for the body of an upload holds it for ever, and one that sends
    a byte now and then is never silent for long.
    """
    # fsspec keeps one instance per process and thread: asking again after a fork never reuses the parent's connections.
    filesystem = fsspec.core.url_to_fs(url)[0]
    if filesystem.async_impl:
        options["timeout"] = _SILENCE + size / _SLOWEST
    return getattr(filesystem, method)(*arguments, **options)


def _retry(call: Callable[[], _Result], lasting: tuple[type[Exception], ...] = _LASTING) -> _Result:
    """Repeat a remote call that failed for a passing reason, waiting longer each time with jitter, then let the error out."""
    for attempt in range(_TRIES - 1):
        try:
            return call()
        except Exception as error:
            if isinstance(error, lasting) or not _is_passing(error):
                raise
        time.sleep(_FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.5))
    return call()


def _is_passing(error: Exception) -> bool:
    if 400 <= getattr(error, "status", 500) < 500 and error.status not in _WAIT_AND_ASK:
        return False  # an HTTP server that means it
    # A library that is not imported has raised nothing.
    named = (getattr(sys.modules.get(module), name, None) for module, names in _PASSING.items() for name in names)
    return isinstance(error, (OSError, *filter(None, named)))
