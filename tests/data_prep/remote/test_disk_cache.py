from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import time
import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.checksum import crc32
from data_prep.index import ShardSet
from data_prep.remote.disk_cache import DiskCache
from data_prep.stream import ClipStream
from tests.fixtures.made_shards import DECODE, take, values, write

FORK, SPAWN = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
SIZE, CLIPS = 50_000, 40


def clip(url, number):
    return random.Random(f"{url}/{number}").randbytes(SIZE)


def fill(root, limit, url, keep=()):
    """Keep clips that lie one after the other in one file; how many of them are there afterwards."""
    cache = DiskCache(root, limit, frozenset(keep))
    for number in range(CLIPS):
        cache.add(url, "shard.tar", number * SIZE, clip(url, number))
    return sum(kept(root, url))


def kept(root, url):
    """Which clips a new process would find."""
    cache, found = DiskCache(root, 0), []
    for number in range(CLIPS):
        data = cache.read(url, "shard.tar", number * SIZE, (number + 1) * SIZE)
        found.append(len(data) == SIZE and crc32(data) == crc32(clip(url, number)))
    return found


def used(root):
    return sum(path.stat().st_blocks * 512 for path in root.glob("*/*"))


def test_what_was_kept_is_read_and_the_rest_is_not_there(tmp_path):
    cache = DiskCache(tmp_path, 10**6)
    cache.add("s3://a", "x.tar", 10_000, b"data" * 1000)
    for opened in (cache, pickle.loads(pickle.dumps(cache)), DiskCache(tmp_path, 10**6)):
        assert opened.read("s3://a", "x.tar", 10_000, 14_000) == b"data" * 1000
        assert opened.read("s3://a", "x.tar", 13_996, 14_004) == b"data"
        assert opened.read("s3://a", "x.tar", 0, 100) == bytes(100)  # a hole
        assert opened.read("s3://b", "x.tar", 10_000, 14_000) == opened.read("s3://a", "y.tar", 0, 10) == b""


def test_the_limit_holds_and_what_came_first_stays(tmp_path):
    limit = 10 * SIZE + 60_000
    assert 8 <= fill(tmp_path, limit, "s3://a", keep=["s3://a"]) <= 11
    first = kept(tmp_path, "s3://a")
    assert used(tmp_path) <= limit and fill(tmp_path, limit, "s3://a", keep=["s3://a"]) == sum(first) and kept(tmp_path, "s3://a") == first


def test_full_it_drops_other_sets_the_least_recently_used_first(tmp_path):
    limit = 2 * CLIPS * (SIZE + 8192)
    for age, url in ((300, "s3://old"), (600, "s3://older")):
        assert fill(tmp_path, limit, url) == CLIPS
        for path in tmp_path.glob("*/shard.tar"):
            if path.stat().st_mtime > time.time() - 100:
                os.utime(path, (time.time() - age,) * 2)
    assert fill(tmp_path, limit, "s3://new", keep=["s3://new"]) == CLIPS
    assert not any(kept(tmp_path, "s3://older")) and all(kept(tmp_path, "s3://old")) and used(tmp_path) <= limit


def test_processes_share_the_limit(tmp_path):
    limit = 60 * SIZE
    processes = [FORK.Process(target=fill, args=(tmp_path, limit, f"s3://{i % 2}", ["s3://0", "s3://1"])) for i in range(4)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert used(tmp_path) <= limit
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0] * 4
    assert used(tmp_path) > limit // 4 and sum(kept(tmp_path, "s3://0")) + sum(kept(tmp_path, "s3://1")) > 10


def fill_for_ever(root, limit):
    while True:
        fill(root, limit, "s3://a", ["s3://a"])


def test_killed_writers_leave_nothing_that_passes_for_a_clip(tmp_path):
    limit = CLIPS * (SIZE + 8192)
    for _ in range(3):
        process = FORK.Process(target=fill_for_ever, args=(tmp_path, limit))
        process.start()
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert used(tmp_path) <= limit
    (tmp_path / "used").write_text("9" * 20)  # as if many had been killed before they wrote what they had counted
    assert fill(tmp_path, limit, "s3://a", ["s3://a"]) == CLIPS and used(tmp_path) <= limit


def test_a_count_that_a_crash_of_the_machine_zeroed_is_made_anew(tmp_path):
    cache = DiskCache(tmp_path, 10**6)
    cache.add("s3://a", "x.tar", 0, b"data")
    (tmp_path / "used").write_bytes(bytes(20))
    cache.add("s3://a", "x.tar", 4, b"more")
    assert cache.read("s3://a", "x.tar", 0, 8) == b"datamore" and used(tmp_path) <= int((tmp_path / "used").read_text()) < 10**5


def test_a_disk_that_fails_costs_the_cache_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file", 10**6)
    cache.add("s3://a", "x.tar", 0, b"data")
    cache.add("s3://a", "x.tar", 0, b"data")
    assert cache.read("s3://a", "x.tar", 0, 4) == b"" and caplog.text.count("nothing more is cached there") == 1


class Counting(MemoryFileSystem):
    """A store that counts the bytes it gives of tars."""

    protocol, given = "counting", 0

    def cat_file(self, path, start=None, end=None, **options):
        data = super().cat_file(path, start, end, **options)
        Counting.given += len(data) if path.endswith(".tar") else 0
        return data


fsspec.register_implementation("counting", Counting, clobber=True)


def test_a_second_epoch_asks_the_store_for_damaged_copies_only(tmp_path):
    shards = write(f"counting://{uuid.uuid4().hex}")
    whole = values(take(ClipStream(shards, DECODE, batch_size=8), 12))
    stream = ClipStream(shards.cached(tmp_path, 10**7), DECODE, batch_size=8)
    seen = values(take(stream, 6))
    (copy, *_) = sorted(tmp_path.glob("*/*.tar"))
    Counting.given = 0
    assert [*seen, *values(take(stream, 6))] == whole and Counting.given == 0
    copy.write_bytes(b"junk" * 1000)
    stream.position = 48
    assert values(take(stream, 6)) == whole[48:] and Counting.given > 0  # the junk is noticed, and replaced
    Counting.given = 0
    stream.position = 48
    assert values(take(stream, 6)) == whole[48:] and Counting.given == 0 and stream.bad == 0


def epoch(url, root, rank, world, position, results):
    stream = ClipStream(ShardSet.open(url).cached(root, 10**7), DECODE, batch_size=6, rank=rank, world_size=world, position=position)
    results.put((rank, values(take(stream, 8, workers=rank)), stream.bad))


@pytest.mark.slow
def test_ranks_with_workers_share_what_others_fetched(tmp_path):
    write(tmp_path / "set")
    url = f"simplecache::file://{tmp_path}/set"
    whole = values(take(ClipStream(ShardSet.open(tmp_path / "set"), DECODE, batch_size=6), 16))
    for number, world in enumerate((2, 1)):
        results = SPAWN.SimpleQueue()
        processes = [SPAWN.Process(target=epoch, args=(url, tmp_path / "cache", r, world, 48 * number, results)) for r in range(world)]
        for process in processes:
            process.start()
        parts = sorted(results.get() for _ in processes)
        for process in processes:
            process.join()
        size = 6 // world
        found = [value for step in range(8) for _, seen, _ in parts for value in seen[step * size : (step + 1) * size]]
        assert found == whole[48 * number :][:48] and all(bad == 0 for *_, bad in parts)
        for path in (tmp_path / "set").glob("*.tar"):
            path.write_bytes(bytes(path.stat().st_size))  # from now on the cache alone has the clips
