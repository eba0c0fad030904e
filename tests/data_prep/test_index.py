from __future__ import annotations

import json
import os
import pickle
import threading
import tracemalloc
import uuid
import zlib

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep import storage
from data_prep.index import Layer, Member, ShardError, ShardInfo, ShardSet, ShardTable, build_index
from data_prep.storage import Folder
from tests.fixtures.known_shards import expected
from tests.fixtures.known_shards import write_shards as write


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return tmp_path / "set" if request.param == "local" else f"memory://{uuid.uuid4().hex}/set"


def test_every_clip_is_read_back(url):
    built = build_index(write(url), {"fps": 25}, expected=3)
    opened = ShardSet.open(url)
    assert opened.hash == built.hash and opened.settings == {"fps": 25} and len(opened) == 11 and opened.counts.tolist() == [4, 0, 7]
    for (shard, row), members in expected().items():
        entry = opened.entry(shard, row)
        assert entry.key == f"clip-{shard}-{row}" and entry.columns["duration"] == 1.8 and entry.columns["labels"][0] == "dog"
        assert opened.read(shard, row) == members
        assert opened.read(shard, row, ["flac"]) == {"flac": members["flac"]}
    assert opened.entry(0, 0).members == {"mp4": Member(512, 300, opened.entry(0, 0).members["mp4"].crc32),
                                          "flac": Member(1536, 300, opened.entry(0, 0).members["flac"].crc32)}  # fmt: skip


def test_index_files_say_what_there_is(tmp_path):
    build_index(write(tmp_path), {"fps": 25})
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    sizes = [(tmp_path / f"shard-00000{n}.tar").stat().st_size for n in range(3)]
    totals = {"settings": {"fps": 25}, "shards": 3, "clips": 11, "rows": 22, "bytes": sum(sizes)}
    assert {name: dataset[name] for name in totals} == totals
    assert dataset["index_crc32"] == zlib.crc32((tmp_path / "index.parquet").read_bytes())
    index = pq.read_table(tmp_path / "index.parquet").to_pylist()
    assert [(row["name"], row["split"], row["clips"], row["rows"], row["bytes"]) for row in index] == [
        ("shard-000000", "train", 4, 8, sizes[0]),
        ("shard-000001", "", 0, 0, sizes[1]),
        ("shard-000002", "train", 7, 14, sizes[2]),
    ]


def test_hash_follows_the_contents_alone(tmp_path):
    first = build_index(write(tmp_path / "a"), {"fps": 25}).hash
    assert build_index(write(tmp_path / "b"), {"fps": 25}).hash == first
    assert build_index(tmp_path / "b", {"fps": 24}).hash != first
    for change in ({"seed": 1}, {"clips": (4, 0, 6)}, {"missing": ("clip-2-6",)}):
        assert build_index(write(tmp_path / str(change), **change), {"fps": 25}).hash != first
    table = pq.read_table(tmp_path / "a" / "shard-000002.parquet")
    pq.write_table(table, tmp_path / "a" / "shard-000002.parquet", compression="none", row_group_size=3)
    assert build_index(tmp_path / "a", {"fps": 25}).hash == first


def test_a_split_is_a_set_of_its_own(tmp_path):
    whole = build_index(write(tmp_path, splits={2: "test"}), {})
    test = ShardSet.open(tmp_path, split="test")
    assert [info.name for info in test.shards] == ["shard-000002"] and len(test) == 7 and test.hash != whole.hash
    assert test.read(0, 3) == whole.read(2, 3) == expected()[2, 3]
    with pytest.raises(ShardError, match=r"no shards of split 'val'; it has \['', 'test', 'train'\]|no shards of split 'val'"):
        ShardSet.open(tmp_path, split="val")


def test_missing_and_foreign_shards_are_named(tmp_path):
    with pytest.raises(ShardError, match="no shards here"):
        build_index(tmp_path, {})
    with pytest.raises(ShardError, match="no index here; build it with `foleyscale prep index"):
        ShardSet.open(tmp_path)
    write(tmp_path)
    with pytest.raises(ShardError, match="2 of 5 shards missing: shard-000003, shard-000004"):
        build_index(tmp_path, {}, expected=5)
    with pytest.raises(ShardError, match="shard-000002 do not belong to a data set of 2 shards"):
        build_index(tmp_path, {}, expected=2)


def test_a_tar_that_is_gone_or_cut_is_refused_by_the_index(tmp_path):
    write(tmp_path)
    tar = tmp_path / "shard-000002.tar"
    os.truncate(tar, 2000)
    with pytest.raises(ShardError, match=r"shard-000002\.tar: cut short at 2000 of \d+ bytes"):
        build_index(tmp_path, {})
    tar.unlink()
    with pytest.raises(ShardError, match="missing beside its sidecar; remove shard-000002.parquet"):
        build_index(tmp_path, {})


def test_damage_is_found_and_named_and_stays_with_its_clip(tmp_path):
    shards = build_index(write(tmp_path), {})
    member = shards.entry(2, 3).members["flac"]
    with open(tmp_path / "shard-000002.tar", "r+b") as file:
        file.seek(member.offset + 9)
        file.write(b"\0damage\0")
    with pytest.raises(ShardError, match="clip clip-2-3 has a damaged flac") as caught:
        shards.read(2, 3)
    assert (caught.value.shard, caught.value.key, caught.value.reason) == ("shard-000002", "clip-2-3", "bad_crc")
    assert shards.read(2, 3, ["mp4"]) and all(shards.read(2, row) for row in (0, 1, 2, 4, 5, 6))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.reason) == (str(caught.value), "bad_crc")
    os.truncate(tmp_path / "shard-000002.tar", member.offset + 5)
    with pytest.raises(ShardError, match="ends after 5 of the 321 bytes of flac") as caught:
        shards.read(2, 3)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("clips", [(4, 0, 7), (4, 0, 3)], ids=["as_many", "fewer"])
def test_a_shard_that_was_written_again_is_named_until_it_is_indexed_again(url, clips):
    build_index(write(url), {})
    shards = ShardSet.open(url)  # as a run that is in work
    assert shards.read(0, 1) == expected()[0, 1]
    write(url, clips=clips, seed=1)
    for stale in (ShardSet.open(url), pickle.loads(pickle.dumps(shards)), shards):  # the last has shard 0 in memory
        with pytest.raises(RuntimeError, match=r"shard-000002\.parquet: not the file that was indexed; index again with") as caught:
            stale.read(2, 6)
        assert not isinstance(caught.value, ShardError)  # or a stream would set the shard's clips aside one by one
    again = build_index(url, {})
    assert {place: again.read(*place) for place in expected(clips, seed=1)} == expected(clips, seed=1)


def test_layers_add_members_and_the_first_set_decides(tmp_path):
    clips = build_index(write(tmp_path / "clips"), {})
    features = build_index(write(tmp_path / "features", members=("latent.npy",), missing=("clip-2-1",), seed=5), {})
    joined = clips.with_layer(features)
    wanted = expected(members=("latent.npy",), seed=5)
    assert joined.read(2, 4) == expected()[2, 4] | wanted[2, 4]
    assert joined.read(2, 2, ["latent.npy"]) == wanted[2, 2]
    assert joined.read(2, 1, ["mp4"]) == {"mp4": expected()[2, 1]["mp4"]}
    for names in (None, ["latent.npy"]):
        with pytest.raises(ShardError, match="clip-2-1") as caught:
            joined.read(2, 1, names)
        assert caught.value.reason == "missing_member"
    assert len(joined) == len(clips) and joined.hash not in (clips.hash, features.hash)
    again = pickle.loads(pickle.dumps(joined))
    assert again.hash == joined.hash and again.read(0, 0) == joined.read(0, 0)
    part = joined.select([2])
    assert len(part) == 7 and part.read(0, 4) == joined.read(2, 4)


def test_layers_that_do_not_fit_are_refused(tmp_path):
    clips = build_index(write(tmp_path / "clips"), {})
    with pytest.raises(ShardError, match="lacks shard-000002 of"):
        clips.with_layer(build_index(write(tmp_path / "short", clips=(4, 0), members=("x.npy",)), {}))
    with pytest.raises(ValueError, match="member 'mp4' is in .*clips and in .*same"):
        clips.with_layer(build_index(write(tmp_path / "same"), {}))


def test_only_some_shards_stay_open(tmp_path):
    shards = ShardSet(build_index(write(tmp_path, clips=(1,) * 30), {})._layers, open_shards=4)
    before = len(os.listdir("/proc/self/fd"))
    for shard in range(30):
        shards.read(shard, 0)
    assert len(os.listdir("/proc/self/fd")) - before == 4
    shards = pickle.loads(pickle.dumps(shards))
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(pickle.dumps(shards)) < 10_000


def test_a_set_read_before_a_fork_is_read_after_it(tmp_path):
    shards = build_index(write(tmp_path), {})
    assert shards.read(2, 0)
    child = os.fork()
    if not child:
        ok = all(shards.read(*place) == members for place, members in expected().items())
        os._exit(0 if ok else 1)
    assert all(shards.read(*place) == members for place, members in expected().items())
    assert os.waitpid(child, 0)[1] == 0


class UnsteadyFileSystem(MemoryFileSystem):
    """Memory that fails twice before each answer, as a busy object store does."""

    protocol = "unsteady"
    counted = threading.local()
    left = 2

    def cat_file(self, path, start=None, end=None, **kwargs):
        # Counted per thread: what another thread asks must not make one call fail more often than it is tried.
        failed = getattr(self.counted, "failed", 0)
        if failed < type(self).left:
            self.counted.failed = failed + 1
            raise ConnectionResetError("try again")
        self.counted.failed = 0
        return super().cat_file(path, start, end, **kwargs)


def test_a_remote_store_that_fails_now_and_then_is_asked_again(monkeypatch):
    fsspec.register_implementation("unsteady", UnsteadyFileSystem, clobber=True)
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.001)
    url = write(f"unsteady://{uuid.uuid4().hex}")
    shards = build_index(url, {})
    assert {place: shards.read(*place) for place in expected()} == expected()
    monkeypatch.setattr(UnsteadyFileSystem, "left", 1000)
    with pytest.raises(ConnectionResetError):
        shards.read(0, 0)


def test_a_sidecar_without_its_columns_is_named(tmp_path):
    write(tmp_path)
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "shard-000000.parquet")
    with pytest.raises(ShardError, match="shard-000000.parquet: lacks the column 'members'"):
        build_index(tmp_path, {})


def test_an_index_that_is_damaged_or_of_another_version_is_named(tmp_path):
    build_index(write(tmp_path), {"fps": 25})
    data = bytearray((tmp_path / "index.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "index.parquet").write_bytes(data)
    with pytest.raises(ShardError, match="index.parquet: not the file that dataset.json tells of.*build it again with"):
        ShardSet.open(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ShardError, match="dataset.json: (not readable as JSON|holds no JSON object)"):
            ShardSet.open(tmp_path)


def test_shards_are_a_sequence_over_columns(tmp_path):
    shards = build_index(write(tmp_path, splits={2: "test"}), {}).shards
    assert len(shards) == 3 and [info.number for info in shards] == [0, 1, 2] == [shards[-3].number, shards[1].number, shards[-1].number]
    assert shards[2] == list(shards)[2] and shards[2].sidecar_crc32 == zlib.crc32((tmp_path / "shard-000002.parquet").read_bytes())
    assert [shards.name(2), shards[2].split, shards[2].clips, shards[2].rows] == ["shard-000002", "test", 7, 14]
    assert [info.name for info in shards.take([2, 0])] == ["shard-000002", "shard-000000"]
    with pytest.raises(IndexError):
        shards[3]


def test_a_long_index_takes_the_memory_of_its_columns(tmp_path):
    count = 20_000
    infos = [ShardInfo(f"shard-{number:06d}", "train", number % 300, 300, 2**28, f"{number:064x}", number) for number in range(count)]
    table = ShardTable.of(infos)
    assert ShardTable.parse(table.to_bytes())[count - 1] == infos[-1]
    shards = ShardSet([Layer(Folder(tmp_path), table, {}, Folder(tmp_path))])
    assert len(shards) == sum(number % 300 for number in range(count)) and shards.counts.dtype == "int64"
    assert len(pickle.dumps(shards)) < 130 * count
    tracemalloc.start()
    again = ShardSet([Layer(Folder(tmp_path), table, {}, Folder(tmp_path))])
    assert again.select(range(0, count, 2)).shards[1].number == 2 and tracemalloc.get_traced_memory()[1] < 40 * count
    tracemalloc.stop()
