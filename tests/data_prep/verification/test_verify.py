from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.index import ShardSet, build_index
from data_prep.shards import ShardWriter
from data_prep.verification.verify import verify
from tests.fixtures.known_shards import write_made_manifest, write_set, write_shards


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write_set(folder)
    return folder


@pytest.fixture
def made(sound, tmp_path):
    """A copy to damage: `made`/set and `made`/manifest.parquet."""
    return Path(shutil.copytree(sound, tmp_path / "made"))


def flip(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def member(folder: Path, shard: int, row: int, name: str):
    return ShardSet.open(folder).entry(shard, row).members[name]


def problems(made: Path) -> list[str]:
    """What is wrong; with the manifest no less is found."""
    found, named = list(verify(made / "set")), list(verify(made / "set", made / "manifest.parquet"))
    assert bool(found) == bool(named)
    return found


def test_nothing_is_wrong_with_sound_shards(sound):
    steps = []
    assert list(verify(sound / "set", sound / "manifest.parquet", lambda *step: steps.append(step))) == []
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert problems(sound) == []


def test_webdataset_reads_what_is_called_sound(sound):
    webdataset = pytest.importorskip("webdataset")
    shards = ShardSet.open(sound / "set")
    assert list(verify(sound / "set")) == []
    for number, count in enumerate(shards.counts):
        samples = list(webdataset.WebDataset(str(sound / "set" / f"shard-{number:06d}.tar"), shardshuffle=False, empty_check=False))
        entries = [shards.entry(number, row) for row in range(count)]
        assert [sample["__key__"] for sample in samples] == [entry.key for entry in entries]
        for sample, entry in zip(samples, entries, strict=True):
            assert {name: sample[name] for name in sample if not name.startswith("__")} == shards.read_entry(entry)


def test_a_flipped_byte_of_data_is_named(made):
    place = member(made / "set", 2, 3, "flac")
    for offset in (0, 9, place.size - 1):
        flip(made / "set" / "shard-000002.tar", place.offset + offset)
        assert problems(made) == ["shard-000002.tar: clip-2-3.flac: damaged: its crc32 is not the sidecar's"]
        flip(made / "set" / "shard-000002.tar", place.offset + offset)


@pytest.mark.parametrize(
    "place, message",
    [
        (0, "bad tar header (bad checksum)"),
        (110, "bad tar header (bad checksum)"),
        (130, "bad tar header (bad checksum)"),
        (150, "bad tar header ("),
        (300, "bad tar header (bad checksum)"),
        (511, "bad tar header (bad checksum)"),
    ],
)
def test_a_flipped_byte_of_a_header_is_named(made, place, message):
    flip(made / "set" / "shard-000000.tar", member(made / "set", 0, 1, "mp4").offset - 512 + place)
    (problem,) = problems(made)
    assert problem.startswith(f"shard-000000.tar: clip-0-1.mp4: {message}")


def test_headers_of_other_names_and_sizes_are_named(made):
    place = member(made / "set", 0, 1, "mp4").offset - 512
    tar = made / "set" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[place + 3], data[place + 4] = data[place + 4], data[place + 3]  # the sum of the bytes stays
    tar.write_bytes(data)
    assert problems(made) == ["shard-000000.tar: clip-0-1.mp4: the tar header says cli-p0-1.mp4 of 307 bytes, the sidecar 307"]


def test_a_flipped_byte_of_padding_or_of_the_end_is_named(made):
    tar = made / "set" / "shard-000002.tar"
    place = member(made / "set", 2, 6, "flac")
    flip(tar, place.offset + place.size)
    assert problems(made) == ["shard-000002.tar: clip-2-6.flac: the padding after it is not empty"]
    flip(tar, place.offset + place.size)
    for offset in (place.offset + place.size + -place.size % 512, tar.stat().st_size - 1):
        flip(tar, offset)
        assert problems(made) == [
            "shard-000002.tar: the end of the archive is not empty: members that the sidecar does not list, or damage"
        ]
        flip(tar, offset)


def test_a_flipped_byte_of_any_file_of_the_index_is_named(made):
    for name in ("shard-000002.parquet", "index.parquet", "dataset.json"):
        path = made / "set" / name
        for place in range(0, path.stat().st_size, 97):
            flip(path, place, 1 << place % 8)
            assert any(name in problem for problem in verify(made / "set")), (name, place)
            flip(path, place, 1 << place % 8)
    assert problems(made) == []


@pytest.mark.parametrize(
    "left, message",
    [
        (0, ": clip-2-0.mp4 and 13 members after it are not whole"),
        (2000, ": clip-2-0.flac and 12 members after it are not whole"),
        (-10240, ": clip-2-5.mp4 and 3 members after it are not whole"),
        (-1, ", within the end of the archive"),
    ],
)
def test_a_truncated_tar_is_named_with_what_is_lost(made, left, message):
    tar = made / "set" / "shard-000002.tar"
    whole = tar.stat().st_size
    os.truncate(tar, left % whole if left < 0 else left)
    assert f"shard-000002.tar: cut short at {tar.stat().st_size} of {whole} bytes{message}" in problems(made)


def test_bytes_after_the_end_are_named(made):
    with open(made / "set" / "shard-000001.tar", "ab") as file:
        file.write(bytes(10240))
    assert problems(made) == ["shard-000001.tar: goes on for 10240 bytes after the end of the archive"]


def test_a_missing_shard_is_named(made):
    for name in ("shard-000002.tar", "shard-000002.parquet"):
        (made / "set" / name).unlink()
    assert list(verify(made / "set")) == [
        "1 of 3 shards missing: shard-000002; run `foleyscale prep shards` again",
        "index.parquet: out of date for shard-000002; build it again",
        "the sidecars that can be read hold 8 rows, the manifest has 22; give the manifest to have the wrong ones named",
    ]
    names = [f"{kind}-2-{i}" for i in range(7) for kind in ("clip", "quiet")]
    shown = f"14 keys ({', '.join(names[:10])} and 4 more)"
    assert list(verify(made / "set", made / "manifest.parquet"))[2] == f"{made}/manifest.parquet: {shown} in no sidecar"


def test_a_tar_or_a_sidecar_without_the_other_is_named(made):
    (made / "set" / "shard-000000.tar").unlink()
    (made / "set" / "shard-000002.parquet").unlink()
    found = problems(made)
    assert "shard-000002.tar: no sidecar, so the shard was not finished" in found
    assert "shard-000000.tar: missing beside its sidecar" in found


def rewrite(path: Path, change) -> None:
    """A sidecar as a program that errs would have written it; the index is built over it."""
    pq.write_table(change(pq.read_table(path)), path)
    build_index(path.parent, ShardSet.open(path.parent).settings)


def test_a_row_that_is_twice_in_one_shard_is_named(made):
    rewrite(made / "set" / "shard-000002.parquet", lambda table: pa.concat_tables([table, table.slice(4, 1)]))
    assert problems(made) == [
        "shard-000002.tar: clip-2-2.mp4: lies at byte 4608 by the sidecar, but the members before it end at 14336",
        "shard-000002.tar: clip-2-2.flac: lies at byte 5632 by the sidecar, but the members before it end at 14336",
        "key clip-2-2 is there 2 times: in shard-000002, shard-000002; a row of the manifest belongs into one shard",
        "the sidecars that can be read hold 23 rows, the manifest has 22; give the manifest to have the wrong ones named",
    ]


def test_a_row_in_two_shards_is_named(made):
    with ShardWriter(made / "set", 1) as writer:
        writer.add("clip-2-2", {"mp4": b"again"})
        writer.skip("quiet-0-0", "dropped", "silent")
    build_index(made / "set", ShardSet.open(made / "set").settings)
    assert problems(made)[:2] == [
        "key clip-2-2 is there 2 times: in shard-000001, shard-000002; a row of the manifest belongs into one shard",
        "key quiet-0-0 is there 2 times: in shard-000000, shard-000001; a row of the manifest belongs into one shard",
    ]


def test_a_row_in_the_place_of_another_is_found_though_the_count_is_right(made):
    rewrite(made / "set" / "shard-000002.parquet", lambda table: with_key(table, 1, "stranger"))
    assert problems(made) == ["the keys in the sidecars are not those of the manifest; give the manifest to have the wrong ones named"]
    assert list(verify(made / "set", made / "manifest.parquet")) == [
        f"{made}/manifest.parquet: key quiet-2-0 in no sidecar",
        f"{made}/set: key stranger in the sidecars, but not in the manifest",
    ]


def with_key(table: pa.Table, row: int, key: str) -> pa.Table:
    keys = table["key"].to_pylist()
    return table.set_column(table.schema.get_field_index("key"), "key", pa.array([*keys[:row], key, *keys[row + 1 :]]))


def test_foreign_files_and_shards_are_named(made):
    for name in ("notes.txt", "shard-000000.tar.bak", ".nfs0001", "shard-12.tar"):
        (made / "set" / name).write_text("?")
    (made / "set" / f".shard-000001.tar.{uuid.uuid4().hex}.tmp").write_text("of a writer at work")
    shutil.copy(made / "set" / "shard-000001.tar", made / "set" / "shard-000009.tar")
    shutil.copy(made / "set" / "shard-000001.parquet", made / "set" / "shard-000009.parquet")
    assert problems(made) == [
        f"{made}/set: foreign files, which are no part of the data: .nfs0001, notes.txt, shard-000000.tar.bak, shard-12.tar",
        "shards that do not belong to a data set of 3: shard-000009; remove them",
        "index.parquet: out of date for shard-000009; build it again",
    ]


def test_a_wrong_manifest_is_named(made):
    other = write_made_manifest(made / "other.parquet", source="b.mp4")
    told = "not the manifest that these shards were made from: its hash is not the one in the settings"
    assert list(verify(made / "set", other)) == [f"{other}: {told}"]
    short = write_made_manifest(made / "short.parquet", clips=(4, 0, 6))
    assert list(verify(made / "set", short)) == [
        f"{short}: {told}",
        f"{made}/set: 2 keys (clip-2-6, quiet-2-6) in the sidecars, but not in the manifest",
    ]
    with pytest.raises(ValueError, match="none.parquet: no such manifest"):
        list(verify(made / "set", made / "none.parquet"))


def test_settings_that_are_not_those_of_the_index_are_named(made):
    settings = made / "set" / "settings.json"
    settings.write_text(settings.read_text().replace('"rows": 22', '"rows": 24'))
    assert problems(made) == [
        "settings.json: not the settings in dataset.json; restore it, or build the index again",
        "the sidecars that can be read hold 22 rows, the manifest has 24; give the manifest to have the wrong ones named",
    ]
    settings.write_text("{")
    assert "settings.json: not readable as JSON" in problems(made)[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table.set_column(0, "key", pa.array(range(len(table)))), "column 'key' holds int64, not string"),
        (lambda table: with_key(table, 0, None), "column 'key' has rows without a value"),
        (lambda table: table.set_column(1, "status", pa.array(["good"] * len(table))), "status 'good' is none of ok, dropped, failed"),
        (lambda table: table.set_column(1, "status", pa.array(["ok"] * len(table))), "a row is ok, but has no members"),
        (lambda table: table.set_column(2, "reason", pa.nulls(len(table), pa.string())), "a row is not ok, but has no reason"),
    ],
)
def test_a_sidecar_that_says_impossible_things_is_named(made, change, message):
    path = made / "set" / "shard-000000.parquet"
    (made / "set" / "index.parquet").unlink()
    pq.write_table(change(pq.read_table(path)), path)
    assert f"shard-000000.parquet: {message}; remove it and write the shard again" in problems(made)


def test_a_sidecar_of_other_bytes_is_named_whoever_indexed_it(tmp_path):
    write_shards(tmp_path / "a", clips=(6,))
    write_shards(tmp_path / "b", clips=(6,), seed=3)
    (tmp_path / "b" / "shard-000000.parquet").rename(tmp_path / "a" / "shard-000000.parquet")
    build_index(tmp_path / "a", {})
    names = [f"clip-0-{i}.{name}" for i in range(6) for name in ("mp4", "flac")]
    damaged = [f"shard-000000.tar: {name}: damaged: its crc32 is not the sidecar's" for name in names]
    assert list(verify(tmp_path / "a")) == [*damaged[:10], "shard-000000: 2 more problems"]


def test_without_an_index_the_shards_are_read_all_the_same(made):
    (made / "set" / "index.parquet").unlink()
    (made / "set" / "dataset.json").unlink()
    (made / "set" / "shard-000002.parquet").write_bytes(b"junk")
    found = list(verify(made / "set"))
    assert found[0].endswith(f"no index here; build it with `foleyscale prep index {made}/set`")
    assert "shard-000002.parquet: not a readable sidecar" in found[1] and "hold 8 rows, the manifest has 22" in found[2]


def test_an_empty_folder_has_one_problem(tmp_path):
    assert list(verify(tmp_path)) == [f"{tmp_path}: no shards here; write them with `foleyscale prep shards`"]


def test_remote_shards_are_read_in_pieces(sound):
    url = f"memory://{uuid.uuid4().hex}/set"
    files = fsspec.filesystem("memory")
    for path in (sound / "set").iterdir():
        files.pipe_file(f"{url}/{path.name}", path.read_bytes())
    assert list(verify(url, sound / "manifest.parquet")) == []
    data = bytearray(files.cat_file(f"{url}/shard-000002.tar"))
    data[600] ^= 4
    files.pipe_file(f"{url}/shard-000002.tar", bytes(data))
    assert list(verify(url)) == ["shard-000002.tar: clip-2-0.mp4: damaged: its crc32 is not the sidecar's"]


def test_members_longer_than_a_piece_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.verification.tarcheck._PIECE", 700)
    write_set(tmp_path)
    assert list(verify(tmp_path / "set")) == []
    flip(tmp_path / "set" / "shard-000002.tar", member(tmp_path / "set", 2, 6, "flac").offset + 300)
    assert list(verify(tmp_path / "set")) == ["shard-000002.tar: clip-2-6.flac: damaged: its crc32 is not the sidecar's"]
