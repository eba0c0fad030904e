from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from data_prep import members
from data_prep.index import ShardError, build_index
from data_prep.shards import ShardWriter

CLIPS, SIZE = 24, 100_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Clips so long that a batch of them is read by two threads."""
    folder, noise = tmp_path_factory.mktemp("members") / "set", np.random.default_rng(0)
    for shard in range(2):
        with ShardWriter(folder, shard) as writer:
            for row in range(CLIPS // 2):
                writer.add(f"clip-{shard}-{row}", {"a.bin": noise.bytes(SIZE), "b.bin": noise.bytes(row)})
    return build_index(folder, {})


def entries(shards):
    return [shards.entry(shard, row) for shard in range(2) for row in range(CLIPS // 2)]


def test_long_batches_are_read_as_single_clips_are(shards):
    found = shards.read_many(entries(shards))
    assert found == [shards.read_entry(entry) for entry in entries(shards)]
    assert [(len(clip["a.bin"]), len(clip["b.bin"])) for clip in found] == 2 * [(SIZE, row) for row in range(CLIPS // 2)]
    assert shards.read_many(entries(shards), ["b.bin"])[7] == {"b.bin": found[7]["b.bin"]}


def test_a_batch_is_read_after_a_fork_though_threads_do_not_survive_one(shards):
    found = shards.read_many(entries(shards))
    assert members._helper.cache_info().currsize == 1
    child = os.fork()
    if not child:
        os._exit(0 if shards.read_many(entries(shards)) == found else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_batch_does_not_wait_for_a_helper_that_does_not_come(shards):
    found, late = shards.read_many(entries(shards)), threading.Event()
    held = members._helper().submit(late.wait, 60)
    try:
        assert shards.read_many(entries(shards)) == found and not held.done()
    finally:
        late.set()


@pytest.mark.parametrize("row", [2, 9])
def test_a_damaged_member_spoils_its_own_clip_in_either_half_of_a_batch(shards, tmp_path, row):
    for name in os.listdir(shards.url):
        if not name.endswith(".tar"):
            os.link(os.path.join(shards.url, name), tmp_path / name)
    for shard in range(2):
        data = bytearray(Path(shards.url, f"shard-00000{shard}.tar").read_bytes())
        data[shards.entry(shard, row).members["a.bin"].offset + 5] ^= 1
        (tmp_path / f"shard-00000{shard}.tar").write_bytes(data)
    found = type(shards).open(tmp_path).read_many(entries(shards))
    bad = [(number, clip.key, clip.reason) for number, clip in enumerate(found) if isinstance(clip, ShardError)]
    assert bad == [(row, f"clip-0-{row}", "bad_crc"), (row + CLIPS // 2, f"clip-1-{row}", "bad_crc")]


def test_a_tar_that_cannot_be_opened_costs_its_own_clips(shards, tmp_path):
    for name in os.listdir(shards.url):
        os.link(os.path.join(shards.url, name), tmp_path / name)
    opened = type(shards).open(tmp_path)
    os.remove(tmp_path / "shard-000001.tar")
    found = opened.read_many([opened.entry(shard, row) for shard in range(2) for row in range(CLIPS // 2)])
    assert [clip.reason for clip in found if isinstance(clip, ShardError)] == ["unreadable"] * (CLIPS // 2)
    assert all(isinstance(clip, dict) for clip in found[: CLIPS // 2])
