"""From source files through shards to batches: times, and damage that other readers lose most of a shard to."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
import torch
import webdataset

from data_prep.decoding import ClipDecoder
from data_prep.index import ShardSet, build_index
from data_prep.media import ClipFormat, transcode
from data_prep.shards import ShardWriter
from data_prep.stream import ClipStream
from tests.fixtures.made_media import PERIOD, TICKS, numbers, tick_times, write_media
from tests.fixtures.made_shards import DECODE, take, values, write

FPS, RATE, START, END = 25, 16000, 0.2, 1.9
RATES = (8, 12.5, 24000 / 1001, 24, 25, 30000 / 1001, 30, 60)
EVEN = {f"{rate:.6g} fps": [number / rate for number in range(round(2 * rate))] for rate in RATES}
TIMES = {**EVEN, "uneven": list(np.cumsum(np.random.default_rng(0).uniform(0.02, 0.06, 46)) - 0.02)}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
def test_frames_and_sound_keep_their_times_for_any_source_rate(tmp_path, times):
    """Each frame shows the picture of its time, to half a frame of the source; each tick sounds on its sample; crops keep both together."""
    source = write_media(tmp_path / "source.mkv", times, shift=0.7)
    clip = transcode(str(source), START, END, ClipFormat(fps=FPS, short_side=48, sample_rate=RATE, crf=4))
    with ShardWriter(tmp_path / "set", 0) as writer:
        writer.add("clip", {"mp4": clip.mp4, "flac": clip.flac}, **clip.columns())
    shards = build_index(tmp_path / "set", {})
    (whole,) = take(ClipStream(shards, ClipDecoder(fps=FPS, sample_rate=RATE), batch_size=1), 1)
    frames, waveform = whole["frames"][0], whole["waveform"][0]
    shown = np.unwrap(numbers(frames.permute(0, 2, 3, 1).numpy()), period=PERIOD).astype(int)
    wanted = START + np.arange(len(frames)) / FPS
    # A picture appears half a source frame before its time, as the nearest one; after a longer pause a frame of the clip at most.
    appear = np.array([-np.inf, *(times[1:] - np.minimum(np.diff(times), 2 / FPS) / 2), np.inf])
    assert (appear[shown] <= wanted + 1e-3).all() and (wanted <= appear[shown + 1] + 1e-3).all()
    assert np.abs(tick_times(waveform.numpy(), RATE, 3) + START - TICKS).max() <= 1 / RATE
    crops, starts = take(ClipStream(shards, ClipDecoder(seconds=0.8, fps=FPS, sample_rate=RATE, random_crop=True), batch_size=1), 6), set()
    for crop in crops:
        fits = [first for first in range(len(frames) - 19) if torch.equal(crop["frames"][0], frames[first : first + 20])]
        starts |= {first for first in fits if torch.equal(crop["waveform"][0], waveform[first * 640 : first * 640 + 12800])}
    assert 2 < len(starts) <= 6


@pytest.fixture
def damaged(tmp_path):
    """100 clips, the tar header of whose sixth is overwritten."""
    shards = write(tmp_path / "set", counts=(100,))
    tar = tmp_path / "set" / "shard-000000.tar"
    with tarfile.open(tar) as archive:
        header = archive.getmembers()[5].offset
    with open(tar, "r+b") as file:
        file.seek(header)
        file.write(b"\xff" * 512)
    return shards


def test_a_damaged_tar_header_costs_nothing_where_webdataset_loses_the_rest(damaged):
    tar = f"{damaged.url}/shard-000000.tar"
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(tar, shardshuffle=False, empty_check=False)]
    assert len(theirs) == 5  # and not a word about it
    stream = ClipStream(ShardSet.open(damaged.url), DECODE, batch_size=10)
    assert sorted(values(take(stream, 10))) == list(range(100)) and stream.bad == 0


def test_a_tar_cut_short_costs_the_clips_that_are_gone(damaged):
    tar = f"{damaged.url}/shard-000000.tar"
    cut = damaged.entry(0, 90).members["value.npy"]
    with open(tar, "r+b") as file:
        file.truncate(cut.offset + cut.size - 1)
    stream = ClipStream(ShardSet.open(damaged.url), DECODE, batch_size=10, max_bad_share=0.2)
    found = values(take(stream, 10))
    assert set(range(90)) <= set(found) and not set(range(90, 100)) & set(found) and stream.bad >= 10
