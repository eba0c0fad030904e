from __future__ import annotations

import io
import itertools
import json
import random
import shutil
import uuid
from dataclasses import asdict, replace

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.decoding import TensorDecoder
from data_prep.filters import FilterConfig
from data_prep.index import ShardError, ShardSet, build_index
from data_prep.layout import tar_folder, tar_place
from data_prep.reports.statistics import statistics
from data_prep.shards import ShardWriter
from data_prep.sidecar import read_sidecar
from data_prep.storage import Folder
from data_prep.stream import ClipStream
from data_prep.subsets.duplicates import NearDuplicates
from data_prep.subsets.selection import Selection, SubsetError, read_keys
from data_prep.subsets.subset import filters_of, make_subset
from data_prep.verification.verify import verify

FILTERS = FilterConfig(min_loudness=-60.0, max_silence=0.9, min_motion=0.0)
CLIPS = 18


def print_of(seed: int, turned: int = 0) -> bytes:
    """A fingerprint of random bits; of those of the pictures the first so many are turned."""
    bits = np.unpackbits(np.frombuffer(random.Random(seed).randbytes(64), np.uint8))
    bits[:turned] ^= 1
    return np.packbits(bits).tobytes()


def columns(number: int) -> dict:
    """Clip `number`: louder and longer than the one before. Of each three from one source the third repeats the first but for 4 bits."""
    repeats = number % 3 == 2
    return {
        "dataset": "made", "source": f"{number // 3}.mp4", "start": 10.0 * (number % 3), "end": 10.0 * (number % 3) + 10, "extra": "{}",
        "labels": ["dog"] if number % 2 else ["cat", "rain"], "duration": 5.0 + number / 10, "loudness": -50.0 + number, "silence": 0.0,
        "motion": 0.01 * number, "source_side": 480, "source_fps": 25.0, "av_offset": 0.01 * number - 0.09,
        "fingerprint": print_of(number - 2, turned=4) if repeats else print_of(number),
    }  # fmt: skip


def write_parent(url) -> ShardSet:
    """Clips 0 to 17 in three shards, clip n in shard n % 3, with a dropped and a failed row in the first."""
    for shard in range(3):
        with ShardWriter(url, shard) as writer:
            for number in range(shard, CLIPS, 3):
                file = io.BytesIO()
                np.save(file, np.array([number], np.float32))
                writer.add(f"clip-{number}", {"value.npy": file.getvalue()}, **columns(number))
            if shard == 0:
                writer.skip("quiet", "dropped", "silent", **columns(0) | {"loudness": -70.0})
                writer.skip("gone", "failed", "missing", dataset="made", source="gone.mp4", start=0.0, labels=[], extra="{}")
    made = {"shards": 3, "filters": asdict(FILTERS), "rows": CLIPS + 2}
    with fsspec.open(f"{url}/settings.json", "w") as file:
        json.dump(made, file)
    return build_index(url, made, expected=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    write_parent(folder / "all")
    return folder


@pytest.fixture
def parent(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "data") / "all"


def kept(shards: ShardSet) -> set[int]:
    entries = [shards.entry(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]
    return {int(entry.key.removeprefix("clip-")) for entry in entries}


def reasons(url) -> dict[str, str]:
    """Key -> reason of every row that is not ok."""
    tables = [read_sidecar(Folder(url), f"shard-{number:06d}") for number in range(3)]
    return {row["key"]: row["reason"] for table in tables for row in table.to_pylist() if row["status"] != "ok"}


@pytest.mark.parametrize(
    "change, reason, left",
    [
        ({"min_loudness": -45.5}, "silent", range(5, 18)),
        ({"min_motion": 0.1}, "still", range(10, 18)),
        ({"max_offset": 0.055}, "out_of_step", range(4, 15)),
        ({"min_loudness": -45.5, "max_offset": 0.055}, "silent", range(5, 15)),
    ],
)
def test_stricter_bounds_drop_clips_with_the_reason_of_the_rule(parent, change, reason, left):
    out = parent.parent / "some"
    summary = make_subset(parent, out, replace(FILTERS, **change))
    assert kept(ShardSet.open(out)) == set(left) and summary.clips == len(left) and sum(summary.dropped.values()) == CLIPS - len(left)
    found = reasons(out)
    assert found.pop("quiet") == "silent" and found.pop("gone") == "missing"
    assert found.keys() == {f"clip-{number}" for number in set(range(CLIPS)) - set(left)} and found["clip-0"] == reason
    assert list(verify(out)) == [] and not list(out.glob("*.tar"))


def test_a_subset_is_read_like_any_set_and_the_parent_is_as_it_was(parent):
    before = {path.name: path.read_bytes() for path in parent.iterdir()}
    steps = []
    make_subset(parent, parent.parent / "some", replace(FILTERS, min_motion=0.1), progress=lambda *step: steps.append(step))
    assert steps == [(step, 6) for step in range(1, 7)]
    assert {path.name: path.read_bytes() for path in parent.iterdir()} == before
    whole, some = ShardSet.open(parent), ShardSet.open(parent.parent / "some")
    assert some.hash != whole.hash and some.settings["subset"]["parent"] == whole.hash
    stream = ClipStream(some, TensorDecoder(("value",)), batch_size=4)
    batches = list(itertools.islice(stream.batches(workers=1), 2))
    assert sorted(int(value) for batch in batches for value in batch["value"].flatten()) == list(range(10, 18))
    assert len(some.with_layer(feature_layer(parent.parent / "features"))) == 8
    found = statistics(parent.parent / "some")
    assert (found.clips, found.rows, found.reasons["dropped"]) == (8, CLIPS + 2, {"still": 10, "silent": 1})
    assert found.filters["min_motion"] == 0.1 and found.bytes == statistics(parent).bytes


def feature_layer(url) -> ShardSet:
    for shard in range(3):
        with ShardWriter(url, shard) as writer:
            for number in range(shard, CLIPS, 3):
                writer.add(f"clip-{number}", {"feature.npy": b"x"})
    return build_index(url, {})


def test_damage_to_the_tars_is_found_through_the_subset(parent):
    out = parent.parent / "some"
    make_subset(parent, out, replace(FILTERS, min_motion=0.1))
    places = {row["key"]: row["members"][0] for row in read_sidecar(Folder(out), "shard-000000").to_pylist() if row["members"]}
    for key in ("clip-0", "clip-12"):  # a clip that the subset dropped, and one that it kept
        with open(parent / "shard-000000.tar", "r+b") as file:
            file.seek(places[key]["offset"] + 3)
            file.write(b"?")
    told = "damaged: its crc32 is not the sidecar's"
    assert list(verify(out)) == [f"shard-000000.tar: {key}.value.npy: {told}" for key in ("clip-0", "clip-12")]
    with pytest.raises(ShardError, match="all/shard-000000.tar: clip clip-12 has a damaged value.npy"):
        ShardSet.open(out).read(0, 0)
    (parent / "shard-000001.tar").rename(out / "shard-000001.tar")
    assert list(verify(out))[0].endswith("foreign files, which are no part of the data: shard-000001.tar")


def test_near_duplicates_of_one_source_are_dropped_but_for_the_first(parent):
    summary = make_subset(parent, parent.parent / "some", replace(FILTERS, max_similarity=0.9))
    assert kept(ShardSet.open(parent.parent / "some")) == {number for number in range(CLIPS) if number % 3 != 2}
    assert summary.dropped == {"near_duplicate": 6}
    make_subset(parent, parent.parent / "alike", replace(FILTERS, max_similarity=0.99))  # 252 of 256 bits are 0.984
    assert len(ShardSet.open(parent.parent / "alike")) == CLIPS
    # Of a pair whose first clip a rule drops, the second one stays.
    make_subset(parent, parent.parent / "late", replace(FILTERS, max_similarity=0.9, min_motion=0.01))
    assert kept(ShardSet.open(parent.parent / "late")) == {number for number in range(1, CLIPS) if number % 3 != 2 or number == 2}


def duplicates(clips, limit=0.9) -> list[int]:
    with NearDuplicates(limit) as found:
        for place, (source, start, key, fingerprint) in enumerate(clips):
            found.add(source, start, key, fingerprint, place)
        return sorted(found.repeated())


def test_what_is_nearly_the_same_is_told_within_a_source_only():
    same = print_of(1)
    assert duplicates([("a", 0.0, "k", same), ("b", 0.0, "l", same), ("c", 0.0, "m", print_of(2))]) == []
    assert duplicates([("a", 5.0, "k", same), ("a", 0.0, "l", same), ("a", 2.0, "m", same)]) == [0, 2]
    assert duplicates([("a", 0.0, "l", same), ("a", 0.0, "k", same)]) == [0]
    # 20 bits from each to the next: the third is too far from the first, and the second no longer counts.
    steps = [("a", float(number), "k", print_of(1, turned=20 * number)) for number in range(3)]
    assert duplicates(steps) == [1]
    assert duplicates([("a", 0.0, "k", bytes(64)), ("a", 1.0, "l", bytes(64))]) == [1]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 4)), max_size=30), st.randoms())
def test_near_duplicates_do_not_depend_on_the_order_in_which_clips_come(drawn, source):
    clips = [(name, float(start), f"key-{number}", print_of(kind)) for number, (name, start, kind) in enumerate(drawn)]
    first = {clips[place][2] for place in duplicates(clips)}
    source.shuffle(clips)
    assert {clips[place][2] for place in duplicates(clips)} == first
    assert len(clips) - len(first) == len({(name, fingerprint) for name, _, _, fingerprint in clips})


def test_clips_of_one_video_are_one_source_whatever_their_files(tmp_path):
    with ShardWriter(tmp_path / "all", 0) as writer:
        for number, video in enumerate(["x", "x", "y", None]):
            own = {"source": f"{number}.mp4", "fingerprint": print_of(7), "extra": json.dumps({"video_id": video} if video else {})}
            writer.add(f"clip-{number}", {"mp4": b"1"}, **columns(0) | own)
        writer.add("clip-4", {"mp4": b"1"}, **columns(1) | {"fingerprint": None})
    build_index(tmp_path / "all", {})
    make_subset(tmp_path / "all", tmp_path / "some", replace(FILTERS, max_similarity=0.9))
    assert kept(ShardSet.open(tmp_path / "some")) == {0, 2, 3, 4}


@pytest.mark.parametrize(
    "selection, reason, left",
    [
        (Selection(labels=("dog",)), "other_label", range(1, 18, 2)),
        (Selection(without_labels=("rain", "dog")), None, ()),
        (Selection(labels=("dog", "cat"), without_labels=("rain",)), "excluded_label", range(1, 18, 2)),
        (Selection(keys=frozenset({"clip-0", "clip-7", "quiet", "other"})), "not_listed", (0, 7)),
        (Selection(min_seconds=5.55), "too_short", range(6, 18)),
        (Selection(max_seconds=5.55), "too_long", range(6)),
    ],
)
def test_clips_are_chosen_by_label_key_and_length(parent, selection, reason, left):
    out = parent.parent / "some"
    if not left:
        with pytest.raises(SubsetError, match="no clip is left of 18"):
            make_subset(parent, out, selection=selection)
        assert not out.exists()
        return
    summary = make_subset(parent, out, selection=selection)
    assert kept(ShardSet.open(out)) == set(left) and summary.dropped == {reason: CLIPS - len(left)}
    assert summary.absent == (2 if selection.keys else 0)


def test_what_was_dropped_or_failed_never_comes_back_and_laxer_bounds_are_told(parent):
    summary = make_subset(parent, parent.parent / "some", FilterConfig(min_loudness=-80.0, max_silence=1.0, min_motion=0.05))
    assert summary.laxer == ("min_loudness -80.0 (was -60.0)", "max_silence 1.0 (was 0.9)")
    first, second = str(summary).splitlines()
    assert first == f"{parent.parent}/some: 13 clips kept, 5 dropped now (still 5)"
    assert second.startswith("min_loudness -80.0 (was -60.0), max_silence 1.0 (was 0.9): laxer than for the shards; ")
    assert reasons(parent.parent / "some")["quiet"] == "silent" and reasons(parent.parent / "some")["gone"] == "missing"


def test_a_subset_of_a_subset_reads_the_same_tars(parent):
    some, fewer = parent.parent / "some", parent.parent / "deep" / "fewer"
    make_subset(parent, some, replace(filters_of(parent), min_motion=0.05))
    assert filters_of(some) == replace(FILTERS, min_motion=0.05)
    make_subset(some, fewer, selection=Selection(labels=("dog",)))
    shards = ShardSet.open(fewer)
    assert kept(shards) == {5, 7, 9, 11, 13, 15, 17} and shards.read(2, 0)
    assert json.loads((fewer / "dataset.json").read_text())["tars"] == "../../all"
    assert shards.settings["subset"]["of"] == ShardSet.open(some).settings["subset"] and filters_of(fewer).min_motion == 0.05
    assert list(verify(fewer)) == []


def test_it_is_made_again_or_completed_but_nothing_else_is_overwritten(parent):
    out, stricter = parent.parent / "some", replace(FILTERS, min_motion=0.1)
    make_subset(parent, out, stricter)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("dataset.json", "index.parquet", "shard-000002.parquet"):
        (out / name).unlink()
    make_subset(parent, out, stricter)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    for target, change in ((out, FILTERS), (parent, stricter), (shutil.copytree(parent, parent.parent / "copy"), stricter)):
        with pytest.raises(SubsetError, match="choose another folder|a folder of its own"):
            make_subset(parent, target, change)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    build_index(out, ShardSet.open(out).settings)  # an index that is built again knows where the tars lie
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_both_folders_may_move_together(parent):
    make_subset(parent, parent.parent / "some", replace(FILTERS, min_motion=0.1))
    moved = parent.parent.rename(parent.parent.parent / "elsewhere")
    assert ShardSet.open(moved / "some").read(0, 0) and list(verify(moved / "some")) == []


def test_mistakes_are_told_before_anything_is_written(parent, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SubsetError, match="no clip has the label dgo; `foleyscale prep stats` lists those there are"):
        make_subset(parent, out, selection=Selection(labels=("dgo", "dog")))
    with pytest.raises(SubsetError, match="no clip is left of 18; ask for less"):
        make_subset(parent, out, replace(FILTERS, min_loudness=-1.0))
    with pytest.raises(SubsetError, match="keys.txt: no such file"):
        read_keys(tmp_path / "keys.txt")
    with pytest.raises(ValueError, match="Selection.min_seconds, max_seconds are 3.0, 2.0: need 0 <= min <= max"):
        Selection(min_seconds=3.0, max_seconds=2.0)
    with pytest.raises(ValueError, match="labels and without_labels both name 'dog'"):
        Selection(labels=("dog",), without_labels=("dog", "cat"))
    with ShardWriter(tmp_path / "old", 0) as writer:
        writer.add("a", {"mp4": b"1"}, **{name: value for name, value in columns(0).items() if name not in ("motion", "fingerprint")})
    build_index(tmp_path / "old", {})
    with pytest.raises(SubsetError, match="a: lacks a measurement that a filter needs .'motion'.: make the shards again"):
        make_subset(tmp_path / "old", out, FILTERS)
    with open(parent / "shard-000002.parquet", "r+b") as file:
        file.write(b"P?")
    with pytest.raises(ShardError, match="shard-000002.parquet: not the file that was indexed; look with `foleyscale prep verify`"):
        make_subset(parent, out, FILTERS)
    assert not out.exists()


def test_keys_are_read_one_a_line(tmp_path):
    (tmp_path / "keys.txt").write_text("clip-1\r\n\n-clip_2\n")
    assert read_keys(tmp_path / "keys.txt") == {"clip-1", "-clip_2"}
    (tmp_path / "keys.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SubsetError, match="not a text file"):
        read_keys(tmp_path / "keys.txt")


def test_a_remote_parent_is_read_from_a_remote_or_a_local_subset(tmp_path):
    root = f"memory://{uuid.uuid4().hex}"
    write_parent(f"{root}/data/all")
    for out in (f"{root}/some", tmp_path / "some"):
        make_subset(f"{root}/data/all", out, replace(FILTERS, min_motion=0.1))
        assert kept(ShardSet.open(out)) == set(range(10, 18)) and ShardSet.open(out).read(1, 0) and not ShardSet.open(out).is_local
        assert list(verify(out)) == []


@pytest.mark.parametrize(
    "subset, tars, place",
    [
        ("/data/set/some", "/data/set/all", "../all"),
        ("/data/some", "/scratch/all", "/scratch/all"),
        ("memory://bucket/some", "memory://bucket/deep/all", "../deep/all"),
        ("memory://bucket/some", "memory://other/all", "memory://other/all"),
        ("memory://bucket/some", "/data/all", "/data/all"),
        ("/data/some", "memory://bucket/all", "memory://bucket/all"),
        ("file:///data/some", "file:///data/all", "../all"),
    ],
)
def test_the_place_of_the_tars_is_relative_where_it_can_be(subset, tars, place):
    assert tar_place(Folder(subset), Folder(tars)) == place
    found = tar_folder(Folder(subset), {"tars": place})
    assert (found.root, found.is_local) == (Folder(tars).root, Folder(tars).is_local)
