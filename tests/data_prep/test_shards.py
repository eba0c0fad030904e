from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tarfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from data_prep.shards import ShardWriter, shard_name, tar_header
from data_prep.storage import Folder

ROOT = Path(__file__).parents[2]


def fill(writer: ShardWriter, clips: int = 5) -> None:
    source = random.Random(writer.name)
    for i in range(clips):
        writer.add(f"k-{i}", {"mp4": source.randbytes(1000 + i), "flac": b"", "json": b"{}"}, labels=["dog", "rain"], caption=None, fps=25)
    writer.skip("gone", "failed", "undecodable", labels=[])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_tar_holds_what_was_added_and_the_sidecar_says_where(tmp_path):
    with ShardWriter(tmp_path, 7, split="test") as writer:
        fill(writer)
    assert sorted(contents(tmp_path)) == ["shard-000007.parquet", "shard-000007.tar"]
    data = (tmp_path / "shard-000007.tar").read_bytes()
    rows = pq.read_table(tmp_path / "shard-000007.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["failed"]
    assert rows[5] == {"key": "gone", "status": "failed", "reason": "undecodable", "split": "test", "members": [],
                       "labels": [], "caption": None, "fps": None}  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:4]] == ["k-0.mp4", "k-0.flac", "k-0.json", "k-1.mp4"]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.type) for m in members} == {(0, 0, 0, 0o644, tarfile.REGTYPE)}
        listed = {f"{row['key']}.{m['name']}": data[m["offset"] :][: m["size"]] for row in rows for m in row["members"]}
        assert listed == {m.name: tar.extractfile(m).read() for m in members}
    assert len(data) % 10240 == 0


def test_webdataset_reads_the_shard(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with ShardWriter(tmp_path, 0) as writer:
        fill(writer)
        writer.add("features", {"latent_mean.npy": b"abc"})
    samples = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"k-{i}" for i in range(5)] + ["features"]
    assert len(samples[3]["mp4"]) == 1003 and samples[5]["latent_mean.npy"] == b"abc"


@pytest.mark.parametrize("url", ["memory://shards-test/deep", "local"])
def test_equal_rows_give_equal_bytes_wherever_they_are_written(tmp_path, url):
    for target in (tmp_path / "a", url if "://" in url else tmp_path / "b"):
        with ShardWriter(target, 1) as writer:
            fill(writer)
    filesystem, root = fsspec.core.url_to_fs(url if "://" in url else str(tmp_path / "b"))
    for name in ("shard-000001.tar", "shard-000001.parquet"):
        assert filesystem.cat_file(f"{root}/{name}") == (tmp_path / "a" / name).read_bytes()


def test_clips_of_very_many_members_are_written(tmp_path):
    members = {f"f{i}.npy": bytes([i % 256]) * (i % 5 * 300) for i in range(1000)}
    with ShardWriter(tmp_path, 0) as writer:
        writer.add("many", members)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert {name.removeprefix("many."): tar.extractfile(name).read() for name in tar.getnames()} == members
    (row,) = pq.read_table(tmp_path / "shard-000000.parquet").to_pylist()
    assert {member["name"]: member["crc32"] for member in row["members"]} == {name: zlib.crc32(data) for name, data in members.items()}


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, 0) as writer:
        fill(writer)
        raise KeyError
    assert contents(tmp_path) == {}


def test_types_are_fixed_even_where_all_values_are_missing(tmp_path):
    with ShardWriter(tmp_path, 0) as writer:
        writer.skip("a", "dropped", "silent", caption=None, loudness=None, labels=None, own=3)
    schema = pq.read_schema(tmp_path / "shard-000000.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names[5:]} == {
        "labels": "list<element: string>", "caption": "string", "loudness": "double", "own": "int64"}  # fmt: skip
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getmembers() == []


KILLED = """
import os, signal, sys
from data_prep.shards import ShardWriter
from tests.data_prep.test_shards import fill
with ShardWriter(sys.argv[1], 2) as writer:
    fill(writer)
    writer._tar.file.flush()
    if sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    writer._sidecar = lambda made=writer._sidecar: (writer._tar.publish(), os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_killed_writer_leaves_no_shard_and_a_rerun_makes_it(tmp_path, moment):
    folder = tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, moment], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -9
    names = sorted(contents(folder))
    assert "shard-000002.parquet" not in names and ("shard-000002.tar" in names) == (moment == "between")
    assert any(name.endswith(".tmp") for name in names) == (moment == "before")
    for path in folder.glob(".*.tmp"):
        os.utime(path, (0, 0))  # a fresh one might be a living writer's on another machine
    for target in (folder, tmp_path / "clean"):
        with ShardWriter(target, 2) as writer:
            fill(writer)
    assert contents(folder) == contents(tmp_path / "clean")


@pytest.mark.parametrize("url", ["{tmp_path}/shards", "memory://twice"])
def test_a_sidecar_never_stands_beside_the_tar_of_another_outcome(tmp_path, url):
    url = url.format(tmp_path=tmp_path)
    slow, quick = ShardWriter(url, 4), ShardWriter(url, 4)
    with pytest.raises(OSError, match="shard-000004: another task wrote it at the same time with other outcomes; run again"), slow:
        slow.skip("a", "failed", "network")
        slow.add("b", {"txt": bytes(20_000)})
        publish = slow._tar.publish

        def overtaken():
            publish()
            with quick:
                quick.add("a", {"txt": bytes(30_000)})
                quick.add("b", {"txt": bytes(20_000)})

        slow._tar.publish = overtaken
    assert Folder(url).sizes().keys() == {"shard-000004.tar"}
    with ShardWriter(url, 4) as again:
        again.add("a", {"txt": bytes(30_000)})
    assert Folder(url).sizes().keys() == {"shard-000004.tar", "shard-000004.parquet"}


def test_writers_of_one_shard_at_once_leave_one_good_shard(tmp_path):
    def write(_: int) -> None:
        with ShardWriter(tmp_path / "many", 3) as writer:
            fill(writer, clips=40)

    with ThreadPool(8) as pool:
        pool.map(write, range(24), chunksize=1)
    with ShardWriter(tmp_path / "one", 3) as writer:
        fill(writer, clips=40)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_shard_written_again_with_other_rows_replaces_the_old_one(tmp_path):
    for clips in (3, 5):
        with ShardWriter(tmp_path, 0) as writer:
            fill(writer, clips)
    assert pq.read_table(tmp_path / "shard-000000.parquet")["key"].to_pylist() == [f"k-{i}" for i in range(5)] + ["gone"]


def test_long_names_up_to_the_limit_are_written(tmp_path):
    key = "k" * 96
    with ShardWriter(tmp_path, 0) as writer:
        writer.add(key, {"mp4": b"1"})
        with pytest.raises(ValueError, match="has 101 characters, a tar takes 100; shorten the key"):
            writer.add(key, {"mp4": b"1", "flac": b"2"})
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        assert tar.getnames() == [f"{key}.mp4"]
    assert pq.read_table(tmp_path / "shard-000000.parquet")["key"].to_pylist() == [key]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.add("a.b", {"mp4": b""}), "key 'a.b' may hold only letters"),
        (lambda w: w.add("k-0", {"mp4": b""}), "key 'k-0' is given twice"),
        (lambda w: w.add("a", {}), "key 'a' has no members"),
        (lambda w: w.add("a", {"../mp4": b""}), "member name 'a.../mp4' may hold only"),
        (lambda w: w.add("a", {"mp4": b""}, status="ok"), "column 'status' is the shard's own"),
        (lambda w: w.skip("a", "lost", "why"), "status of 'a' must be 'dropped' or 'failed'"),
        (lambda w: w.skip("a", "failed", ""), "'a' is failed without a reason"),
    ],
)
def test_bad_input_is_named(tmp_path, call, message):
    with ShardWriter(tmp_path, 0) as writer:
        fill(writer)
        with pytest.raises(ValueError, match=message):
            call(writer)
    assert pq.read_table(tmp_path / "shard-000000.parquet").num_rows == 6


def test_a_value_of_the_wrong_type_names_its_column(tmp_path):
    with pytest.raises(ValueError, match="shard-000000: column 'fps' holds values of the wrong type"), ShardWriter(tmp_path, 0) as writer:
        writer.add("a", {"mp4": b""}, fps="fast")
    assert contents(tmp_path) == {}


def test_headers_equal_those_of_tarfile():
    for name, size in (("a.mp4", 0), ("k" * 96 + ".mp4", 8**11 - 1)):
        info = tarfile.TarInfo.frombuf(tar_header(name, size), "ascii", "strict")
        assert (info.name, info.size, info.isreg()) == (name, size, True)
    with pytest.raises(ValueError, match="a tar takes 8589934591; cut the clip shorter"):
        tar_header("a.mp4", 8**11)


def test_shards_are_numbered_in_six_digits():
    assert [shard_name(0), shard_name(123), shard_name(1234567)] == ["shard-000000", "shard-000123", "shard-1234567"]
