"""Rendered clips as files and rows: pure functions of seed, split and index, whoever draws them."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig

ROOT = Path(__file__).parents[3]
SMALL = RenderConfig(size=32)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.mp4"))}


def decoded(path):
    with av.open(io.BytesIO(Path(path).read_bytes())) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(io.BytesIO(Path(path).read_bytes())) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return frames, sound


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    return folder, list(read_rendered(folder, 6, seed=3, heldout=2, settings=SMALL, workers=1))


def test_rows_and_files_belong_together(rendered):
    folder, rows = rendered
    assert [row.split for row in rows] == ["train"] * 6 + ["heldout"] * 2
    assert len({row.key for row in rows}) == 8 and rows[0].key == "rendered_3_train_000000"
    for row in rows:
        assert (row.dataset, row.start, row.end) == ("rendered", 0.0, 3.84)
        assert row.labels == row.extra["kinds"] and {event["kind"] for event in row.extra["events"]} == set(row.labels)
        frames, sound = decoded(row.source)
        assert frames.shape == (96, 32, 32, 3) and sound.shape == (61440,)
    assert len(contents(folder)) == 8


def test_truth_holds_in_the_encoded_files(tmp_path):
    kinds = ("ball", "drum", "clap", "bell", "camera")
    for row in read_rendered(tmp_path, 10, settings=RenderConfig(kinds=kinds, multi_share=0.3), workers=1):
        frames, sound = decoded(row.source)
        rise = np.diff(frames.astype(float).mean(-1), axis=0, prepend=frames[:1].mean(-1)).clip(min=0).mean((1, 2))
        power = np.convolve(np.square(sound.astype(float)), np.ones(32) / 32)
        for event in row.extra["events"]:
            start, frame = round(event["time"] * 16000), int(event["time"] * 25 + 1e-6)
            near = power[start - 480 : start + 480]
            assert abs(np.argmax(near > 0.15 * near.max()) - 480) < 160, "sound within 10 ms"
            assert abs(rise[frame - 2 : frame + 3].argmax() - 2) <= 1, "picture within one frame"


def test_another_process_draws_the_same_bytes(rendered, tmp_path):
    folder, rows = rendered
    again = list(read_rendered(tmp_path, 20, seed=3, heldout=2, settings=SMALL, workers=2))
    drawn = contents(tmp_path)
    assert {name: drawn[name] for name in contents(folder)} == contents(folder)
    assert [(row.key, row.extra, row.caption) for row in again[:6]] == [(row.key, row.extra, row.caption) for row in rows[:6]]


def test_splits_and_seeds_differ(rendered, tmp_path):
    _, rows = rendered
    other = next(read_rendered(tmp_path, 1, seed=4, settings=SMALL, workers=1))
    assert len({Path(row.source).read_bytes() for row in (rows[0], rows[6], other)}) == 3


def test_complete_files_are_kept_and_missing_ones_drawn(rendered, tmp_path):
    folder, _ = rendered
    rows = list(read_rendered(tmp_path, 3, seed=3, settings=SMALL, workers=1))
    kept, lost = Path(rows[0].source), Path(rows[1].source)
    os.utime(kept, (1000, 1000))
    lost.unlink()
    list(read_rendered(tmp_path, 4, seed=3, settings=SMALL, workers=1))
    assert kept.stat().st_mtime == 1000
    assert contents(tmp_path) == {name: data for name, data in contents(folder).items() if name in contents(tmp_path)}
    assert len(contents(tmp_path)) == 4


def test_rows_come_while_later_clips_are_drawn(tmp_path):
    rows = list(itertools.islice(read_rendered(tmp_path, 10**4, settings=SMALL, workers=1), 5))
    assert len(rows) == 5 and len(contents(tmp_path)) < 100


def test_a_killed_run_leaves_only_complete_files(tmp_path):
    command = f"from data_prep.readers.rendered import *; list(read_rendered({str(tmp_path)!r}, 400, workers=1))"
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(contents(tmp_path)) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = contents(tmp_path)
    assert 5 <= len(found) < 400
    for name in found:
        assert decoded(tmp_path / name)[0].shape == (96, 48, 48, 3)


def test_other_settings_need_another_folder(rendered):
    with pytest.raises(ValueError, match=r"holds clips of other settings .* \(settings.json\): choose another folder"):
        read_rendered(rendered[0], 1, settings=RenderConfig(size=48))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "count, heldout and seed are -1, 0, 0"),
        ({"count": 1, "settings": RenderConfig(kinds=("tuba",))}, "kinds has tuba"),
    ],
)
def test_bad_arguments_fail_at_the_call(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_rendered(tmp_path, **arguments)
