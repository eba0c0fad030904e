import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.filters import FilterConfig
from data_prep.index import ShardError, ShardSet
from data_prep.manifest import ManifestRow, read_manifest, write_manifest
from data_prep.media import ClipFormat, decode_audio, transcode
from data_prep.prepare import PrepareError, bytes_per_second, index_shards, prepare_shards
from data_prep.readers.folder import read_folder
from data_prep.reports.statistics import statistics
from data_prep.settings import PrepareConfig
from data_prep.verification.verify import verify
from tests.fixtures.made_media import decode_frames, ticking, write_media

FORMAT = ClipFormat(short_side=32, sample_rate=8000, crf=18)
SETTINGS = PrepareConfig(format=FORMAT, rows_per_shard=3)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Eight clips of two good files, and one file for every way to fail; the manifest lies beside them."""
    root = tmp_path_factory.mktemp("collection")
    (root / "videos").mkdir()
    write_media(root / "videos" / "one.mkv")
    write_media(root / "videos" / "two.mp4", fps=21.5, audio="aac", layout="stereo")
    write_media(root / "videos" / "mute.mp4", audio=None)
    (root / "videos" / "empty.mp4").write_bytes(b"")
    (root / "videos" / "page.mp4").write_bytes(b"<html></html>")
    write_media(root / "videos" / "silent.mkv", seconds=0.5, volume=0.0)
    rows = list(read_folder(root / "videos", heldout=0.3, clip_seconds=0.5, min_seconds=0.5))
    rows.append(ManifestRow(key="absent", dataset="folder", source=str(root / "videos" / "absent.mp4"), labels=["ghost"]))
    write_manifest(rows, root / "manifest.parquet")
    return root


def sidecars(folder):
    rows = [row for path in sorted(folder.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["key"]: row for row in rows}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


@pytest.fixture(scope="module")
def prepared(collection):
    settings = dataclasses.replace(SETTINGS, format=dataclasses.replace(FORMAT, min_seconds=0.25))
    told = []
    summary = prepare_shards(
        collection / "manifest.parquet", collection / "out", settings, workers=2, progress=lambda done, total: told.append((done, total))
    )
    return collection / "out", settings, summary, told


def test_every_row_ends_as_ok_dropped_or_failed(prepared, collection):
    out, _, summary, told = prepared
    rows, wanted = sidecars(out), read_manifest(collection / "manifest.parquet")
    assert sorted(rows) == sorted(row.key for row in wanted)
    outcomes = {row.source.rsplit("/", 1)[-1]: (rows[row.key]["status"], rows[row.key]["reason"]) for row in wanted}
    assert outcomes == {
        "one.mkv": ("ok", None), "two.mp4": ("ok", None), "mute.mp4": ("dropped", "no_audio"), "silent.mkv": ("dropped", "silent"),
        "empty.mp4": ("failed", "undecodable"), "page.mp4": ("failed", "undecodable"), "absent.mp4": ("failed", "missing"),
    }  # fmt: skip
    assert (summary.ok, summary.dropped, summary.failed) == (8, 5, 3)
    assert summary.reasons == {"no_audio": 4, "undecodable": 2, "silent": 1, "missing": 1}
    assert "8 kept, 5 dropped, 3 failed (no_audio 4" in str(summary)
    assert told == [(done, 16) for done in range(1, 17)]
    assert rows["absent"]["labels"] == ["ghost"] and "absent.mp4: no such file" in rows["absent"]["message"]
    silent = rows["folder_silent_0"]
    assert silent["loudness"] == -120.0 and silent["silence"] == 1.0 and silent["members"] == []


def test_clips_are_what_transcode_makes(prepared, collection):
    out, settings, _, _ = prepared
    shards = ShardSet.open(str(out))
    places = [(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]
    clips = {shards.entry(*place).key: (shards.entry(*place), shards.read(*place)) for place in places}
    assert len(clips) == len(shards) == 8
    entry, members = clips["folder_two_500"]
    direct = transcode(str(collection / "videos" / "two.mp4"), 0.5, 1.0, settings.format)
    assert sorted(members) == ["flac", "json", "mp4"]
    assert members["mp4"] == direct.mp4 and members["flac"] == direct.flac
    described = json.loads(members["json"])
    assert described["key"] == "folder_two_500" and described["start"] == 0.5 and described["end"] == 1.0 and described["extra"] == {}
    assert described["duration"] == 0.5 == entry.columns["duration"] and described["source_fps"] == pytest.approx(21.5)
    assert len(decode_frames(members["mp4"])) == 12 and len(decode_audio(members["flac"])) == 4000
    assert np.abs(decode_audio(clips["folder_one_0"][1]["flac"])[:3000] - ticking(0.5, 8000)[:3000]).max() < 2e-3


def test_index_is_written_and_the_shards_are_sound(prepared):
    out, _, _, _ = prepared
    assert list(verify(str(out))) == []
    totals = statistics(str(out))
    assert (totals.rows, totals.clips) == (16, 8) and totals.reasons["failed"] == {"undecodable": 2, "missing": 1}
    settings = ShardSet.open(str(out)).settings
    assert settings["format"]["short_side"] == 32 and settings["rows_per_shard"] == 3 and settings["shards"] == 6


def test_what_is_there_is_not_made_again(prepared, collection):
    out, settings, _, _ = prepared
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("shard-*")}
    lost = out / "shard-000001.parquet"
    lost.unlink()
    relaxed = dataclasses.replace(settings, clip_timeout=77.0, media_root="/elsewhere")
    summary = prepare_shards(collection / "manifest.parquet", out, relaxed, workers=1)
    assert (summary.shards, summary.skipped) == (1, 5)
    for path, (time, data) in before.items():
        assert path.read_bytes() == data
        assert (path.stat().st_mtime_ns == time) == (not path.name.startswith("shard-000001"))


def test_tasks_make_the_same_shards_between_them(prepared, collection, tmp_path):
    out, settings, _, _ = prepared
    with pytest.raises(PrepareError, match="no settings.json"):
        index_shards(tmp_path)
    prepare_shards(collection / "manifest.parquet", tmp_path, settings, task=(1, 2), workers=2)
    with pytest.raises(ShardError, match="3 of 6 shards missing"):
        index_shards(tmp_path)
    prepare_shards(collection / "manifest.parquet", tmp_path, settings, task=(0, 2), workers=2)
    assert not (tmp_path / "dataset.json").exists()
    assert len(index_shards(tmp_path)) == 8
    assert contents(tmp_path) == contents(out)


def test_other_settings_are_not_mixed_in(prepared, collection, tmp_path):
    out, settings, _, _ = prepared
    other = dataclasses.replace(settings, format=dataclasses.replace(settings.format, fps=12.5), filters=FilterConfig(max_silence=0.5))
    with pytest.raises(PrepareError, match=r"out holds shards made with format.fps 25.0 \(now 12.5\), filters.max_silence 0.9 \(now 0.5\)"):
        prepare_shards(collection / "manifest.parquet", out, other)
    write_manifest(read_manifest(collection / "manifest.parquet")[1:], tmp_path / "less.parquet")
    with pytest.raises(PrepareError, match="manifest"):
        prepare_shards(tmp_path / "less.parquet", out, settings)


def test_shards_with_passing_failures_are_made_again_when_asked(collection, tmp_path):
    rows = [ManifestRow(key=f"k{index}", dataset="d", source=f"{name}.mkv", end=1.0) for index, name in enumerate(["one", "late", "one"])]
    write_manifest(rows, tmp_path / "m.parquet")
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "one.mkv").symlink_to(collection / "videos" / "one.mkv")
    settings = PrepareConfig(format=FORMAT, media_root=str(tmp_path / "media"), rows_per_shard=1)

    def run(*redo):
        summary = prepare_shards(tmp_path / "m.parquet", tmp_path / "out", settings, redo=redo)
        return summary.shards, summary.ok, summary.reasons

    assert run() == (3, 2, {"missing": 1})
    (tmp_path / "media" / "late.mkv").symlink_to(collection / "videos" / "one.mkv")
    assert run() == run("network") == (0, 0, {})
    assert run("network", "missing") == (1, 1, {})
    assert len(ShardSet.open(tmp_path / "out")) == 3 and list(verify(tmp_path / "out")) == []


def test_a_shard_that_would_lose_clips_is_not_made_again(collection, tmp_path):
    (tmp_path / "media").mkdir()
    link = tmp_path / "media" / "one.mkv"
    link.symlink_to(collection / "videos" / "one.mkv")
    rows = [ManifestRow(key=name, dataset="d", source=f"{name}.mkv", end=1.0) for name in ("one", "never")]
    write_manifest(rows, tmp_path / "m.parquet")
    settings = PrepareConfig(format=FORMAT, media_root=str(tmp_path / "media"))
    prepare_shards(tmp_path / "m.parquet", tmp_path / "out", settings)
    before = contents(tmp_path / "out")
    link.unlink()
    summary = prepare_shards(tmp_path / "m.parquet", tmp_path / "out", settings, redo=["missing"])
    assert (summary.shards, summary.worse) == (0, 1) and "1 left as they were" in str(summary)
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="redo: no clip fails for 'mising'; choose from missing, "):
        prepare_shards(tmp_path / "m.parquet", tmp_path / "out", settings, redo=["mising"])


def test_a_wrong_media_root_stops_the_run_and_the_right_one_is_used(collection, tmp_path):
    rows = [ManifestRow(key=f"k{index}", dataset="d", source="videos/one.mkv", end=1.0) for index in range(8)]
    write_manifest(rows, tmp_path / "m.parquet")
    settings = PrepareConfig(format=FORMAT, media_root=str(tmp_path))
    with pytest.raises(PrepareError, match="shard-000000: none of its 8 clips could be made.*videos/one.mkv: no such file"):
        prepare_shards(tmp_path / "m.parquet", tmp_path / "out", settings)
    assert not list((tmp_path / "out").glob("*shard*"))
    summary = prepare_shards(tmp_path / "m.parquet", tmp_path / "out", dataclasses.replace(settings, media_root=f"{collection}/"))
    assert (summary.shards, summary.ok) == (1, 8)


def test_estimate_of_a_clip_size_follows_its_format():
    plain = bytes_per_second(ClipFormat())
    assert 60e3 < plain < 120e3
    assert bytes_per_second(ClipFormat(crop=True)) < plain < bytes_per_second(ClipFormat(sample_rate=44100))
    assert bytes_per_second(ClipFormat(short_side=128)) < 0.6 * plain < plain < bytes_per_second(ClipFormat(crf=18))


@pytest.mark.parametrize(("field", "value"), [("rows_per_shard", 0), ("shard_mb", 0), ("clip_timeout", 0.0)])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        PrepareConfig(**{field: value})


@pytest.mark.parametrize("task", [(1, 1), (-1, 2), (0, 0)])
def test_impossible_tasks_are_refused(collection, tmp_path, task):
    with pytest.raises(ValueError, match="task"):
        prepare_shards(collection / "manifest.parquet", tmp_path, SETTINGS, task=task)
