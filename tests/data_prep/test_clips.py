import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from textwrap import indent

import av
import numpy as np
import pytest

from data_prep.clips import make_clip, make_clips
from data_prep.downloads.download import DownloadConfig
from data_prep.filters import FilterConfig
from data_prep.limits import MEMORY_EXIT
from data_prep.manifest import ManifestRow
from data_prep.media import ClipFormat
from data_prep.settings import PrepareConfig
from data_prep.shards import CLIP_COLUMNS
from tests.fixtures.made_media import write_media

FORMAT = ClipFormat(short_side=32, sample_rate=8000, crf=18)
MEASURED = {"loudness", "peak", "silence", "motion", "lost", "av_offset", "source_fps", "source_side", "fingerprint"}


def row(source, **fields):
    return ManifestRow(key="k", dataset="d", source=str(source), **fields)


def has_open(process, path):
    try:
        return str(path) in (os.path.realpath(f"/proc/{process.pid}/fd/{name}") for name in os.listdir(f"/proc/{process.pid}/fd"))
    except OSError:
        return False


def kill_the_reader_of(path):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in multiprocessing.active_children():
            if has_open(process, path):
                return os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)


def test_a_decoder_that_hangs_or_dies_costs_one_clip(tmp_path):
    good = write_media(tmp_path / "good.mkv")
    for name in ("hang.mkv", "die.mkv"):  # the first picture is to be shown 90 million times
        write_media(tmp_path / name, [0.0, 3.6e6])
    sources = {"a": good, "hang": tmp_path / "hang.mkv", "b": good, "die": tmp_path / "die.mkv", "c": good}
    rows = [ManifestRow(key=key, dataset="d", source=str(source)) for key, source in sources.items()]
    threading.Thread(target=kill_the_reader_of, args=[tmp_path / "die.mkv"], daemon=True).start()
    with closing(make_clips(rows, PrepareConfig(format=FORMAT, clip_timeout=4.0), workers=1)) as clips:
        outcomes = {row.key: (outcome.status, outcome.reason) for row, outcome in clips}
    assert outcomes == {key: ("ok", None) for key in "abc"} | {"hang": ("failed", "timeout"), "die": ("failed", "crashed")}
    assert not multiprocessing.active_children()


CREEPING = "kept = []\nwhile True: kept.append(bytearray(1 << 20))"
AT_ONCE = "try: bytearray(1 << 30)\nexcept MemoryError: print('refused')"
WITHIN = "kept = bytearray(150 << 20); time.sleep(0.1); print('kept')"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the data of a process")
@pytest.mark.parametrize(("work", "code", "said"), [(CREEPING, MEMORY_EXIT, ""), (AT_ONCE, 0, "refused\n"), (WITHIN, 0, "kept\n")])
def test_memory_is_limited(work, code, said):
    begin = "import time\nfrom data_prep.limits import limit_memory, memory_watched\nlimit_memory(200)\nwith memory_watched():\n"
    script = begin + indent(work, "    ")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, said), result.stderr


@pytest.mark.parametrize("source", ["../a.mkv", "b/../../a.mkv", "..", "./../a.mkv"])
def test_a_source_may_not_lead_out_of_its_root(tmp_path, source):
    (tmp_path / "root").mkdir()
    write_media(tmp_path / "a.mkv")
    settings = PrepareConfig(format=FORMAT, media_root=str(tmp_path / "root"))
    outcome = make_clip(row(source), settings)
    assert (outcome.status, outcome.reason) == ("failed", "unreadable") and "leads out of media_root" in outcome.columns["message"]
    (tmp_path / "root" / "b").mkdir()
    write_media(tmp_path / "root" / "a.mkv")
    assert make_clip(row("b/../a.mkv"), settings).status == make_clip(row(tmp_path / "a.mkv"), settings).status == "ok"


def test_sources_on_the_web_are_downloaded_first(tmp_path):
    pytest.importorskip("yt_dlp")
    kept = write_media(tmp_path / "aaaaaaaaaaa.mkv")
    known = {
        "aaaaaaaaaaa": {"file": kept.name, "bytes": kept.stat().st_size},
        "bbbbbbbbbbb": {"reason": "private", "message": "a private video", "asked": time.time(), "cookies": False},
    }
    for name, record in known.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    settings = PrepareConfig(format=FORMAT, download=DownloadConfig(folder=str(tmp_path)), media_root=str(tmp_path))
    outcomes = [make_clip(row(f"https://www.youtube.com/watch?v={name}"), settings) for name in known]
    assert [(outcome.status, outcome.reason) for outcome in outcomes] == [("ok", None), ("failed", "private")]
    assert outcomes[0].columns["source"].endswith("aaaaaaaaaaa") and "a private video" in outcomes[1].columns["message"]


def write_still(path):
    """A photograph-like picture that does not move, at a bit rate that makes the codec refine it again and again."""
    noise = np.random.default_rng(0).integers(0, 256, (18, 32, 3)).astype(np.uint8)
    picture = av.VideoFrame.from_ndarray(noise, "rgb24").reformat(320, 180, "yuv420p", interpolation="BICUBIC")
    with av.open(str(path), "w") as target:
        video = target.add_stream("libx264", rate=25, width=320, height=180)
        sound = target.add_stream("pcm_s16le", rate=8000, layout="mono")
        video.bit_rate, video.options = 120_000, {"g": "25", "preset": "veryfast"}
        for number in range(75):
            picture.pts = number
            target.mux(video.encode(picture))
        target.mux(video.encode())
        hiss = np.random.default_rng(1).integers(-3000, 3000, (1, 24000)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(hiss, "s16", "mono")
        frame.sample_rate = 8000
        target.mux(sound.encode(frame))
    return path


def test_dropped_clips_are_measured_as_kept_ones_are(tmp_path):
    plain, still, silent = write_media(tmp_path / "a.mkv"), write_still(tmp_path / "still.mkv"), write_media(tmp_path / "s.mkv", volume=0.0)
    kept, *dropped = (make_clip(row(source), PrepareConfig(format=FORMAT)) for source in (plain, still, silent))
    assert (kept.status, [outcome.reason for outcome in dropped]) == ("ok", ["still", "silent"])
    assert 0 < dropped[0].columns["motion"] < 0.0002 < kept.columns["motion"]
    for outcome in (kept, *dropped):
        assert outcome.columns.keys() - {"message"} == CLIP_COLUMNS.keys() - {"message"} and outcome.columns.keys() >= MEASURED
    assert all(not outcome.members for outcome in dropped)
    relaxed = PrepareConfig(format=FORMAT, filters=FilterConfig(min_motion=0.0))
    again = make_clip(row(still), relaxed)
    assert again.status == "ok" and again.columns == dropped[0].columns
    described = json.loads(kept.members["json"])
    assert "fingerprint" not in described and described["motion"] == kept.columns["motion"]


def test_a_signature_is_struck_out_of_what_a_row_says(tmp_path):
    source = write_media(tmp_path / "a.mkv")
    extra = {"note": 'http://host/a?key=hid"den', "page": "http://host/b?x=1&X-Amz-Signature=hidden&y=2"}
    outcome = make_clip(ManifestRow(key="k", dataset="d", source=str(source), end=1.0, extra=extra), PrepareConfig(format=FORMAT))
    assert outcome.status == "ok"
    assert json.loads(outcome.columns["extra"]) == json.loads(outcome.members["json"])["extra"]
    assert json.loads(outcome.columns["extra"])["page"] == "http://host/b?x=1&X-Amz-Signature=***&y=2"
