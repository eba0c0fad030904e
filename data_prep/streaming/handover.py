"""Batches from one process to another through anonymous memory.

The memory has no name and no owner: a process killed at any moment leaves nothing behind, and what it had handed over stays good.
It is not the shared memory of /dev/shm either, of which containers have little.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from itertools import accumulate
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 64
_COUNT = np.dtype("<i8")


def pack(item: Any) -> int:
    """A descriptor of anonymous memory that holds `item`; its tensors and arrays are copied once."""
    head, buffers = io.BytesIO(), []
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(item)
    parts = [head.getbuffer(), *(buffer.raw() for buffer in buffers)]
    sizes = np.array([len(parts), *map(len, parts)], dtype=_COUNT)
    descriptor = os.memfd_create("batch", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(sizes)
            for part, start in zip(parts, _starts(sizes[1:].tolist()), strict=True):
                file.seek(start)
                file.write(part)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def unpack(descriptor: int) -> Any:
    """What `pack` put there. Tensors and arrays lie in the memory itself, which goes with the last of them; closes the descriptor."""
    try:
        memory = memoryview(mmap.mmap(descriptor, 0))
    finally:
        os.close(descriptor)
    count = int(np.frombuffer(memory, _COUNT, 1)[0])
    sizes = np.frombuffer(memory, _COUNT, count, _COUNT.itemsize).tolist()
    head, *buffers = (memory[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=True))
    return pickle.loads(head, buffers=buffers)


def _starts(sizes: list[int]) -> list[int]:
    """Where each part begins, behind the table of sizes."""
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    table = -(-(len(sizes) + 1) * _COUNT.itemsize // _ALIGNMENT) * _ALIGNMENT
    return list(accumulate(padded, initial=table))[:-1]


class _Pickler(pickle.Pickler):
    """Leaves the values of tensors out of the pickle, as protocol 5 does with those of arrays."""

    def reducer_override(self, item: Any) -> Any:
        if type(item) is not torch.Tensor or not item.numel():
            return NotImplemented
        values = item.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (item.dtype, tuple(item.shape), pickle.PickleBuffer(values))


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], values: Any) -> torch.Tensor:
    return torch.frombuffer(values, dtype=dtype).view(shape)
