"""One manifest of everything that collections hold, through `prepare_shards`: each row ends with the right verdict."""

import os
import socket

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.index import ShardSet
from data_prep.manifest import ManifestRow, write_manifest
from data_prep.media import ClipFormat, decode_audio
from data_prep.prepare import prepare_shards
from data_prep.settings import PrepareConfig
from tests.fixtures.made_media import TICKS, decode_frames, numbers, spoil_packets, tick_times, write_large, write_media

FORMAT = ClipFormat(short_side=48, sample_rate=16000, crf=4, min_seconds=0.5, max_lost=0.03)

GOOD = {
    # duration, source_fps, channels, (width, height), lost
    "plain.mkv": (2.0, 25.0, 1, (64, 48), 0.0),
    "matroska.mp4": (2.0, 25.0, 1, (64, 48), 0.0),
    "a:colon.mkv": (2.0, 25.0, 1, (64, 48), 0.0),
    "surround.mkv": (2.0, 25.0, 6, (64, 48), 0.0),
    "telephone.mkv": (2.0, 25.0, 1, (64, 48), 0.0),
    "slower.mp4": (2.0, 21.5, 1, (64, 48), 0.0),
    "variable.mkv": (1.88, None, 1, (64, 48), 0.0),
    "rotated.mp4": (2.0, 25.0, 1, (48, 64), 0.0),
    "ten_bit.mkv": (2.0, 25.0, 1, (64, 48), 0.0),
    "odd.mkv": (2.0, 25.0, 1, (66, 48), 0.0),
    "one_spoilt.mp4": (2.0, 25.0, 1, (64, 48), 0.02),
    "cut_off_later.mp4": (0.5, 25.0, 1, (64, 48), 0.0),
}
BAD = {
    "truncated.mp4": "undecodable", "no_moov.mp4": "undecodable", "empty.mp4": "undecodable", "page.mp4": "undecodable",
    "three_spoilt.mp4": "undecodable", "sound_spoilt.mp4": "undecodable", "no_frames.mkv": "undecodable", "tail_spoilt.mp4": "undecodable",
    "sound_only.mp4": "no_video", "mute.mp4": "no_audio", "huge.mkv": "too_large", "absent.mp4": "missing", "dir/../absent.mp4": "missing",
    "../outside.mkv": "unreadable", "dir/../../outside.mkv": "unreadable", "folder.mp4": "unreadable", "pipe.mp4": "unreadable",
    "socket.mp4": "unreadable", "zero\0byte.mp4": "unreadable", "endless.mkv": "timeout", "greedy.mkv": "memory",
}  # fmt: skip


def make_good(root):
    plain = write_media(root / "plain.mkv")
    (root / "matroska.mp4").write_bytes(plain.read_bytes())
    (root / "a:colon.mkv").write_bytes(plain.read_bytes())
    (root.parent / "outside.mkv").write_bytes(plain.read_bytes())
    write_media(root / "surround.mkv", layout="5.1")
    write_media(root / "telephone.mkv", rate=8000)
    write_media(root / "slower.mp4", fps=21.5, audio="aac")
    write_media(root / "variable.mkv", [0.0, 0.04, 0.2, 0.24, 0.6, 1.0, 1.4, 1.8, 1.84])
    write_media(root / "rotated.mp4", rotation=90, audio="aac")
    write_media(root / "ten_bit.mkv", pix_fmt="yuv420p10le")
    write_media(root / "odd.mkv", pix_fmt="yuv444p", size=(61, 45))


def make_bad(root):
    plain = write_media(root / "no_moov.mp4", audio="aac")
    plain.write_bytes(plain.read_bytes()[: plain.stat().st_size // 2])
    fast = write_media(root / "truncated.mp4", audio="aac", options={"movflags": "faststart"})
    fast.write_bytes(fast.read_bytes()[: fast.stat().st_size * 6 // 10])
    (root / "cut_off_later.mp4").write_bytes(fast.read_bytes())
    (root / "empty.mp4").write_bytes(b"")
    (root / "page.mp4").write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 50)
    spoil_packets(write_media(root / "one_spoilt.mp4", audio="aac"), [20])
    spoil_packets(write_media(root / "three_spoilt.mp4", audio="aac"), [1, 20, 30])
    spoil_packets(write_media(root / "tail_spoilt.mp4", audio="aac"), range(40, 50))
    spoil_packets(write_media(root / "sound_spoilt.mp4", audio="aac"), range(30, 36), "audio")
    write_media(root / "no_frames.mkv", [])
    with av.open(str(root / "sound_only.mp4"), "w", format="wav") as target:
        stream = target.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        target.mux(stream.encode(frame))
    write_media(root / "mute.mp4", audio=None)
    write_large(root / "huge.mkv", (12000, 8000), 0)
    write_large(root / "greedy.mkv", (8192, 4320), 20)
    (root / "folder.mp4").mkdir()
    (root / "dir").mkdir()
    os.mkfifo(root / "pipe.mp4")
    # Its second picture comes after a thousand hours, in which the first is to be shown 90 million times.
    write_media(root / "endless.mkv", [0.0, 3.6e6])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out, root = tmp_path_factory.mktemp("damaged"), tmp_path_factory.mktemp("m") / "root"
    root.mkdir()
    make_good(root)
    make_bad(root)
    names = [*GOOD, *BAD]
    rows = [ManifestRow(key=f"k{i}", dataset="d", source=name, end=0.5 if "later" in name else None) for i, name in enumerate(names)]
    write_manifest(rows, out / "manifest.parquet")
    settings = PrepareConfig(format=FORMAT, rows_per_shard=50, clip_timeout=6.0, clip_memory_mb=128, media_root=str(root))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "socket.mp4"))
        summary = prepare_shards(out / "manifest.parquet", out / "shards", settings, workers=2)
    rows = [row for path in sorted((out / "shards").glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]
    return out / "shards", {row["source"]: row for row in rows}, summary


def test_each_row_has_its_verdict(prepared):
    _, rows, summary = prepared
    bad = {name: ("dropped" if reason == "no_audio" else "failed", reason) for name, reason in BAD.items()}
    assert {name: (row["status"], row["reason"]) for name, row in rows.items()} == dict.fromkeys(GOOD, ("ok", None)) | bad
    assert (summary.ok, summary.dropped, summary.failed) == (len(GOOD), 1, len(BAD) - 1)


def test_good_ones_are_measured_right(prepared):
    url, rows, _ = prepared
    shards = ShardSet.open(str(url))
    members = {shards.entry(0, row).columns["source"]: shards.read(0, row) for row in range(shards.counts[0])}
    for name, (duration, source_fps, channels, size, lost) in GOOD.items():
        row, frames, sound = rows[name], decode_frames(members[name]["mp4"]), decode_audio(members[name]["flac"])
        assert (row["duration"], row["fps"], row["channels"], (row["width"], row["height"])) == (duration, 25.0, channels, size), name
        assert len(frames) == round(duration * 25) and len(sound) == round(duration * 16000)
        assert row["lost"] == pytest.approx(lost, abs=1e-4) and len(row["fingerprint"]) == 64
        if source_fps is not None:
            shown = numbers(frames) / source_fps
            assert row["source_fps"] == pytest.approx(source_fps, abs=0.01)
            # The picture before a spoilt one stands a frame longer; the patched picture may show anything.
            assert np.sum(np.abs(shown - np.arange(len(shown)) / 25) > 0.5 / source_fps + 0.021) <= (name == "one_spoilt.mp4"), name
        ticks = [tick for tick in TICKS if tick < duration]
        assert np.abs(tick_times(sound, 16000, len(ticks)) - ticks).max(initial=0.0) <= 0.002, name


def test_messages_say_what_to_do(prepared):
    _, rows, _ = prepared
    said = {
        "../outside.mkv": "../outside.mkv: leads out of media_root", "dir/../../outside.mkv": "leads out of media_root",
        "pipe.mp4": "not a regular file", "huge.mkv": "pictures of 12000x8000, ClipFormat.max_pixels is 35389440",
        "three_spoilt.mp4": "6.0% of the clip is damaged, ClipFormat.max_lost is 3.0%", "endless.mkv": "no result within 6 s",
        "greedy.mkv": "clip_memory_mb, 128 MB", "absent.mp4": "absent.mp4: no such file", "truncated.mp4": "of the clip is damaged",
    }  # fmt: skip
    assert {name: text in rows[name]["message"] for name, text in said.items()} == dict.fromkeys(said, True)
