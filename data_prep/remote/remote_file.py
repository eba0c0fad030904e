"""A remote media file as decoders want it: read little by little, with seeks, over a network that fails now and then."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import fsspec.core

from data_prep.remote.ranges import Range
from data_prep.remote.urls import redacted, without_credentials
from data_prep.storage import read_remote, remote_size

BLOCK = 1 << 22
"""Bytes fetched at a time: what takes about as long to arrive as the answer to begin."""
_KEPT = 8
"""Blocks in memory: a decoder goes to and fro between the header, the pictures and the sound."""


class RemoteFile(io.RawIOBase):
    """The file at a URL, open for reading; its `name` is the URL without credentials.

    FileNotFoundError where there is none; ValueError for credentials in a URL that is not http(s).
    Only the blocks that are read travel: of an hour's video, the header and the clip.
    """

    def __init__(self, url: str):
        self.name = redacted(url)
        if not url.startswith(("http://", "https://")):  # there they are part of the request, elsewhere they would be taken for a name
            without_credentials(url)
        self._url, self._path = url, fsspec.core.url_to_fs(url)[1]
        self.size = remote_size(self._url, self._path)
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def __str__(self) -> str:
        return self.name

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes before the next one to be read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted from the beginning, from here or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self.name}: cannot go {-base - offset} bytes before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of the block at hand."""
        if self._position >= self.size or not len(buffer):
            return 0
        number, offset = divmod(self._position, BLOCK)
        part = self._block(number)[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            wanted = Range(self._path, number * BLOCK, min((number + 1) * BLOCK, self.size))
            (self._blocks[number],) = read_remote(self._url, [wanted])
            if len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]
