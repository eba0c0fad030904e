"""Files of a checkpoint: written whole, checked and on the disk before anybody is told of them; in the background where wanted."""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import torch

from data_prep.checksum import crc32

_CHUNK = 1 << 24
"""Bytes written and summed at a time, outside Python's lock."""
_RESERVE = 1 << 20
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_Result = TypeVar("_Result")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write a new safetensors file of CPU tensors to the disk; its bytes and crc32.

    OSError where that fails, above all for want of room, which is claimed before the first byte; then no file is left.
    """
    header = _header(tensors, metadata)
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    try:
        with open(path, "xb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            checksum = 0
            for piece in _pieces(header, tensors):
                checksum = crc32(piece, checksum)
                _write_all(file, piece)
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # writing alone would not name the file
    return {"bytes": size, "crc32": checksum}


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    entries, offset = {"__metadata__": dict(metadata)}, 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(header: bytes, tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors.values():
        data = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), _CHUNK):
            yield data[start:start + _CHUNK]


def _write_all(file, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data):]


def file_matches(path: Path, expected: Mapping[str, int]) -> bool:
    """Whether a file has the bytes and the crc32 that `write_tensors` gave."""
    try:
        if path.stat().st_size != expected["bytes"]:
            return False
        checksum = 0
        with open(path, "rb", buffering=0) as file:
            while data := file.read(_CHUNK):
                checksum = crc32(data, checksum)
    except OSError:
        return False
    return checksum == expected["crc32"]


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")  # stages of one run may start on several nodes at once
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def missing_room(folder: Path, size: int) -> str:
    """One line where `size` more bytes, and a little for logs, do not fit on the disk of `folder`, else an empty string."""
    free = shutil.disk_usage(folder).free
    return "" if size + _RESERVE <= free else f"{folder}: a checkpoint needs {size / 1e9:.3g} GB and {free / 1e9:.3g} GB are free"


class HostCopies:
    """Copies of tensors in the host's memory, the same memory at every call: page-locked where they come from a GPU."""

    def __init__(self):
        self._copies: dict[str, torch.Tensor] = {}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy them all; valid until the next call."""
        for name, tensor in tensors.items():
            own = self._copies.get(name)
            if own is None or (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
                own = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            own.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._copies[name] for name in tensors}


def in_background(function: Callable[..., _Result], *arguments: object) -> Future[_Result]:
    """Run it in a thread that does not keep the process alive: one that waits for a dead process must not."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
