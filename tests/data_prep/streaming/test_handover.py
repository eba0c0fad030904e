from __future__ import annotations

import contextlib
import gc
import os
import pickle

import numpy as np
import pytest
import torch

from data_prep.streaming.handover import pack, unpack

DTYPES = [torch.uint8, torch.int16, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def through(item):
    return unpack(pack(item))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_keep_type_shape_and_values(dtype):
    for tensor in (torch.arange(24).reshape(2, 3, 4).to(dtype), torch.tensor(1).to(dtype), torch.zeros(3, 0, 2, dtype=dtype)):
        other = through(tensor)
        assert other.dtype == dtype and other.shape == tensor.shape and torch.equal(other, tensor)


def test_a_batch_with_all_that_batches_hold():
    frames = torch.randint(0, 255, (4, 5, 3, 16, 16), dtype=torch.uint8)
    batch = {"frames": frames.transpose(1, 2), "array": np.arange(6.0), "labels": [["rain"], None], "key": ["a"]}
    other, bad = through((batch, [ValueError("no")]))
    assert torch.equal(other["frames"], batch["frames"]) and other["labels"] == batch["labels"] and other["key"] == ["a"]
    assert np.array_equal(other["array"], batch["array"]) and isinstance(bad[0], ValueError)
    other["frames"] += 1  # like any other tensor
    assert torch.equal(other["frames"], batch["frames"] + 1)


def memories():
    """Anonymous memories that are mapped or open here, once what nobody holds is gone."""
    gc.collect()
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since by another thread
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum("memfd:" in link for link in links)


def test_memory_goes_with_the_last_tensor():
    before = memories()
    parts = through([torch.ones(1000), torch.zeros(1000)])
    last = parts.pop()
    del parts
    assert torch.equal(last, torch.zeros(1000)) and memories() == before + 1
    del last
    assert memories() == before


def test_what_cannot_be_pickled_leaves_nothing_open():
    before = memories()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pack(lambda: None)
    assert memories() == before
