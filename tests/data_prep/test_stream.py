from __future__ import annotations

import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import uuid
from collections import Counter
from dataclasses import dataclass

import av
import numpy as np
import pytest
import torch

from data_prep.decoding import ClipDecoder, TensorDecoder
from data_prep.index import ShardError, ShardSet, build_index
from data_prep.media import ClipFormat, transcode
from data_prep.shards import ShardWriter
from data_prep.stream import ClipStream, collate, one_pass, shard_passes
from tests.fixtures.made_shards import COUNTS, DECODE, damage, take, values, write


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("stream") / "set")


def test_an_epoch_holds_every_clip_once_and_the_next_another_order(shards):
    stream = ClipStream(shards, DECODE, batch_size=8, seed=3, window=2)
    batches = take(stream, 12)
    first, second = values(batches[:6]), values(batches[6:])
    assert sorted(first) == sorted(second) == list(range(48)) and first != second
    assert stream.position == 96 and stream.epoch == 2.0
    assert batches[1]["position"].tolist() == list(range(8, 16)) and batches[1]["position"].dtype == torch.int64
    assert batches[1]["key"] == [f"clip-{value}" for value in values(batches[1:2])] and batches[1]["value"].shape == (8, 1)


def test_ranks_share_each_global_batch(shards):
    whole = take(ClipStream(shards, DECODE, batch_size=12), 10)
    for world in (2, 3, 4, 12):
        parts = [take(ClipStream(shards, DECODE, batch_size=12, rank=rank, world_size=world), 10) for rank in range(world)]
        for step, batch in enumerate(whole):
            assert values(part[step] for part in parts) == values([batch])


def test_a_run_that_changes_its_world_sees_each_clip_once(shards):
    position, seen = 0, []
    for world, steps in ((2, 5), (1, 3), (3, 8)):
        parts = [ClipStream(shards, DECODE, batch_size=6, rank=rank, world_size=world, position=position) for rank in range(world)]
        batches = [take(part, steps) for part in parts]
        seen += [value for step in range(steps) for part in batches for value in values(part[step : step + 1])]
        assert len({part.position for part in parts}) == 1
        position = parts[0].position
    assert seen == values(take(ClipStream(shards, DECODE, batch_size=6), 16)) and sorted(seen[:48]) == sorted(seen[48:]) == list(range(48))


def test_the_size_of_the_batch_may_change_too(shards):
    first = ClipStream(shards, DECODE, batch_size=8)
    seen = values(take(first, 2))
    second = ClipStream(shards, DECODE, batch_size=4)
    second.load_state_dict(first.state_dict())
    assert sorted(seen + values(take(second, 8))) == list(range(48))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(shards, workers):
    alone, helped = (ClipStream(shards, DECODE, batch_size=6, seed=1) for _ in range(2))
    assert values(take(alone, 9)) == values(take(helped, 9, workers=workers))
    assert alone.state_dict() == helped.state_dict()  # and not what the workers prepared ahead


def test_workers_read_remote_shards_without_a_fork(tmp_path):
    write(tmp_path / "set")
    remote = ShardSet.open(f"simplecache::file://{tmp_path}/set")
    assert not remote.is_local
    local = ClipStream(ShardSet.open(tmp_path / "set"), DECODE, batch_size=6)
    assert values(take(ClipStream(remote, DECODE, batch_size=6), 3)) == values(take(local, 3))
    assert values(take(ClipStream(remote, DECODE, batch_size=6, position=18), 3, workers=1)) == values(take(local, 3))


def test_shards_in_a_store_without_files():
    shards = write(f"memory://{uuid.uuid4().hex}")
    assert sorted(values(take(ClipStream(shards, DECODE, batch_size=8), 6))) == list(range(48))


def test_a_resumed_run_resumed_again_goes_on_as_if_never_stopped(shards):
    straight = values(take(ClipStream(shards, DECODE, batch_size=4, seed=5), 20))
    seen, state = [], None
    for steps, workers in ((3, 0), (5, 2), (4, 0), (8, 1)):
        stream = ClipStream(shards, DECODE, batch_size=4, seed=5)
        if state:
            stream.load_state_dict(json.loads(state))
        seen += values(take(stream, steps, workers=workers))
        state = json.dumps(stream.state_dict())
    assert seen == straight


def test_a_seek_equals_skipping(tmp_path):
    shards = write(tmp_path, counts=(50,) * 20)
    skipped, sought = ClipStream(shards, DECODE, batch_size=10), ClipStream(shards, DECODE, batch_size=10, position=900)
    take(skipped, 90)
    assert values(take(sought, 20)) == values(take(skipped, 20)) and skipped.position == sought.position == 1100
    far = ClipStream(shards, DECODE, batch_size=10, position=10**12)  # nobody could skip so far
    assert sorted(values(take(far, 100))) == list(range(1000))


def test_the_position_moves_only_with_the_consumer(shards):
    stream = ClipStream(shards, DECODE, batch_size=6)
    batches = stream.batches(workers=2)
    assert stream.position == 0
    for step in range(1, 4):
        next(batches)
        assert stream.position == 6 * step
    stream.load_state_dict({**stream.state_dict(), "position": 0})
    with pytest.raises(RuntimeError, match=r"moved from position 18 to 0 while it ran; call batches\(\) again"):
        next(batches)


def test_mixtures_keep_their_weights_and_resume(shards, tmp_path):
    other = write(tmp_path, counts=(5, 7), base=1000)

    def make():
        return ClipStream([shards, other], DECODE, batch_size=8, seed=2, weights=[3, 1])

    seen = values(take(make(), 24))
    for start in range(0, len(seen), 8):
        assert sum(value >= 1000 for value in seen[start : start + 8]) == 2
    assert Counter(value for value in seen if value >= 1000) == Counter({1000 + i: 4 for i in range(12)})
    assert Counter(value for value in seen if value < 1000) == Counter({i: 3 for i in range(48)})
    first, second = make(), make()
    part = values(take(first, 7))
    second.load_state_dict(first.state_dict())
    assert part + values(take(second, 17)) == seen
    union = values(take(ClipStream([shards, other], DECODE, batch_size=10), 6))
    assert sorted(union) == [*range(48), *range(1000, 1012)]


def test_a_damaged_clip_is_set_aside_and_replaced_for_good(shards, tmp_path):
    broken = damage(shards, 3, 5, tmp_path / "set")
    number = 9 + 4 + 5
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    sound = values(take(ClipStream(shards, DECODE, batch_size=8), 6))
    runs = []
    for workers in (0, 2):
        stream = ClipStream(broken, DECODE, batch_size=8, quarantine=quarantine)
        runs.append(values(take(stream, 6, workers=workers)))
        assert (stream.bad, stream.seen) == (1, 49)
    assert runs[0] == runs[1] and number not in runs[0]
    place = sound.index(number)
    assert runs[0][:place] + runs[0][place + 1 :] == sound[:place] + sound[place + 1 :]
    record, again = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert record == again == {"url": str(tmp_path / "set"), "shard": "shard-000003", "key": f"clip-{number}", "reason": "bad_crc",
                               "position": place, "message": record["message"]}  # fmt: skip
    assert "clip-18 has a damaged value.npy" in record["message"]


def test_too_many_bad_clips_stop_the_run(tmp_path):
    shards = write(tmp_path / "set", bad_rows=[(0, row) for row in range(5)])
    quarantine = tmp_path / "quarantine.jsonl"
    stream = ClipStream(shards, DECODE, batch_size=8, quarantine=quarantine, max_bad_share=0.05)
    with pytest.raises(ShardError, match=r"\d+ of 1\d\d clips could not be read, more than max_bad_share 0.05 allows; .* in .*jsonl"):
        take(stream, 100)
    assert len(quarantine.read_text().splitlines()) == stream.bad > 5
    tolerant = ClipStream(shards, DECODE, batch_size=8, max_bad_share=0.3)
    assert len(take(tolerant, 30)) == 30 and 0.05 < tolerant.bad / tolerant.seen < 0.2


def test_nothing_but_bad_clips_stops_the_run_at_once(tmp_path):
    shards = write(tmp_path, counts=(2,), bad_rows=[(0, 0), (0, 1)])
    for workers in (0, 1):
        with pytest.raises(ShardError, match="16 clips in a row could not be read; the last: clip .* is not an array"):
            take(ClipStream(shards, DECODE, batch_size=2), 1, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rows", [13, 5], ids=["as_many", "fewer"])
def test_a_shard_written_again_under_the_index_stops_the_run(tmp_path, rows, workers):
    shards, quarantine = write(tmp_path / "set"), tmp_path / "quarantine.jsonl"
    write(tmp_path / "other", counts=(0, 0, 0, rows), base=500)
    for ending in ("tar", "parquet"):
        shutil.copy(tmp_path / "other" / f"shard-000003.{ending}", tmp_path / "set" / f"shard-000003.{ending}")
    for batches in (
        ClipStream(shards, DECODE, batch_size=8, quarantine=quarantine, max_bad_share=1.0).batches(workers),
        one_pass(shards, DECODE, 8, workers=workers, on_bad=lambda clip: None),
    ):
        with pytest.raises(RuntimeError, match="shard-000003.parquet: not the file that was indexed; index again with"):
            values(itertools.islice(batches, 6))
    assert not quarantine.exists()


def test_other_data_or_another_order_is_named_on_resume(shards, caplog):
    store = f"memory://{uuid.uuid4().hex}"
    state = ClipStream(shards, DECODE, batch_size=8, seed=1, position=16).state_dict()
    assert json.loads(json.dumps(state)) == state and state["dataset"] == shards.hash and state["position"] == 16
    grown = ClipStream(write(f"{store}/grown", counts=(*COUNTS, 2)), DECODE, batch_size=8, seed=1)
    with pytest.raises(ValueError, match="grown had 48 clips in 7 shards, now 50 clips in 8 shards.*at position 16 of the new order"):
        grown.load_state_dict(state)
    assert grown.position == 0
    with caplog.at_level(logging.WARNING):
        grown.load_state_dict(state, allow_data_change=True)
        ClipStream(shards, DECODE, batch_size=8, seed=1).load_state_dict(state, allow_data_change=True)
    assert grown.position == 16 and len(caplog.messages) == 1
    assert "grown had 48 clips in 7 shards, now 50 clips in 8 shards; it goes on at position 16 of the new order" in caplog.text
    other = ClipStream(write(f"{store}/other", base=7), DECODE, batch_size=8, seed=1)
    with pytest.raises(ValueError, match="other has 48 clips in 7 shards as before, but others"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="seed was 1, now 2; window was 16, now 4"):
        ClipStream(shards, DECODE, batch_size=8, seed=2, window=4).load_state_dict(state)
    with pytest.raises(ValueError, match="there were 1 data sets, now 2"):
        ClipStream([shards, other.sets[0]], DECODE, batch_size=8, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="the run was begun in another version of the order, 1 and not 2"):
        ClipStream(shards, DECODE, batch_size=8, seed=1).load_state_dict({name: state[name] for name in state if name != "order"})
    moved = ClipStream(write(f"{store}/moved"), DECODE, batch_size=8, seed=1)
    moved.load_state_dict(state)
    assert moved.position == 16


def test_the_global_random_state_is_left_alone(shards):
    torch.manual_seed(0)
    take(ClipStream(shards, DECODE, batch_size=8), 2, workers=1)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("world", [1, 3])
def test_one_pass_sees_every_clip_in_index_order(shards, world):
    batches = [list(one_pass(shards, DECODE, 5, rank=rank, world_size=world)) for rank in range(world)]
    flat = [batch for part in batches for batch in part]
    assert values(flat) == list(range(48))
    assert [len(part) for part in batches] == {1: [10], 3: [4, 4, 4]}[world] and {len(batch["key"]) for batch in flat[:-1]} <= {5, 1}
    places = [(int(s), int(r)) for batch in flat for s, r in zip(batch["shard"], batch["row"], strict=True)]
    assert places == [(shard, row) for shard, count in enumerate(COUNTS) for row in range(count)]
    assert [int(p) for batch in flat for p in batch["position"]] == list(range(48))


def test_one_pass_may_stop_early_and_use_workers(shards):
    assert values(one_pass(shards, DECODE, 4, limit=10)) == list(range(10))
    assert values(one_pass(shards, DECODE, 4, limit=10, workers=2)) == list(range(10))
    assert [values(one_pass(shards, DECODE, 4, rank=rank, world_size=3, limit=2)) for rank in range(3)] == [[], [0], [1]]


def test_one_pass_names_bad_clips_or_hands_them_over(shards, tmp_path):
    broken = damage(shards, 1, 2, tmp_path / "set")
    with pytest.raises(ShardError, match="damaged value.npy"):
        list(one_pass(broken, DECODE, 4))
    bad = []
    assert values(one_pass(broken, DECODE, 1, on_bad=bad.append)) == [n for n in range(48) if n != 11]
    assert [(clip.key, clip.shard, clip.position) for clip in bad] == [("clip-11", "shard-000001", 11)]


@pytest.mark.parametrize("workers", [0, 2])
def test_passes_over_shards_end_where_these_end(shards, tmp_path, workers):
    broken = damage(shards, 1, 2, tmp_path / "set")
    passes = [list(each) for each in shard_passes(broken, DECODE, 4, workers)]
    assert [[len(batch["key"]) for batch, _ in each] for each in passes] == [[4, 4, 1], [3], [], [4, 4, 4, 1], [4, 2], [1], [4, 4, 4, 3]]
    assert [values(batch for batch, _ in each) for each in passes[:2]] == [list(range(9)), [9, 10, 12]]
    assert [(number, clip.key) for number, each in enumerate(passes) for _, bad in each for clip in bad] == [(1, "clip-11")]


def test_a_shard_that_was_not_read_to_its_end_is_no_part_of_the_next(shards):
    passes = shard_passes(shards, DECODE, 4, workers=1)
    next(next(passes))
    with pytest.raises(RuntimeError, match="a shard was not read to its end"):
        next(passes)
    passes = shard_passes(shards, DECODE, 4, workers=1)
    next(next(passes))
    assert multiprocessing.active_children()
    passes.close()
    assert not multiprocessing.active_children()


@dataclass
class Broken(TensorDecoder):
    """A decoder with a programming error."""

    def __call__(self, raw, entry, random):
        raise TypeError("a mistake in the decoder")


def test_a_mistake_in_the_decoder_is_no_bad_clip(shards):
    with pytest.raises(TypeError, match="a mistake in the decoder"):
        take(ClipStream(shards, Broken(("value",)), batch_size=4), 1)


def test_shapes_that_differ_are_named():
    samples = [{"frames": torch.zeros(2, 3)}, {"frames": torch.zeros(4, 3)}]
    with pytest.raises(ValueError, match=r"frames: clips of one batch have shapes \(2, 3\) and \(4, 3\); fix them in the decoder"):
        collate(samples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 8, "world_size": 3}, "batch_size 8 must be a multiple of the 3 ranks"),
        ({"batch_size": 0}, "batch_size 0 must be a multiple"),
        ({"batch_size": 8, "rank": 2, "world_size": 2}, "rank 2 is outside a world of 2"),
        ({"batch_size": 8, "decode": lambda raw, entry, random: {}, "cache_gb": 1}, r"cache_gb needs a decoder with whole\(\)"),
        ({"batch_size": 8, "window": 0}, "window must be at least 1 shard"),
        ({"batch_size": 8, "clip_timeout": 0}, "clip_timeout is 0: give the seconds that the slowest good clip may take to decode"),
    ],
)
def test_bad_settings_are_named(shards, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipStream(shards, **{"decode": DECODE, **arguments})


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six clips of moving noise, through the project's own encoder."""
    url = tmp_path_factory.mktemp("clips")
    make = ClipFormat(fps=25, short_side=32, sample_rate=16000)
    source = random.Random(0)
    with ShardWriter(url, 0) as writer:
        for i in range(6):
            encoded = transcode(raw_video(source.randrange(256)), 0.0, None, make)
            writer.add(f"clip-{i}", {"mp4": encoded.mp4, "flac": encoded.flac}, **encoded.columns())
    return build_index(url, {})


def raw_video(seed, seconds=1.2):
    noise = np.random.default_rng(seed)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        video = container.add_stream("mpeg4", rate=25, width=48, height=32, pix_fmt="yuv420p")
        audio = container.add_stream("flac", rate=16000)
        for _ in range(round(seconds * 25)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(noise.integers(0, 255, (32, 48, 3), dtype=np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(noise.integers(-9000, 9000, (1, round(seconds * 16000)), dtype=np.int16), "s16", "mono")
        sound.sample_rate, sound.pts = 16000, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(("cache_gb", "workers"), [(4e-4, 0), (1.0, 0), (1.0, 2)])
def test_the_cache_changes_no_batch(clips, cache_gb, workers):
    decode = ClipDecoder(seconds=0.6, size=32, random_crop=True)
    plain = take(ClipStream(clips, decode, batch_size=4), 6)
    assert plain[0]["frames"].shape == (4, 15, 3, 32, 32) and plain[0]["waveform"].shape == (4, 9600)
    for one, other in zip(plain, take(ClipStream(clips, decode, batch_size=4, cache_gb=cache_gb), 6, workers=workers), strict=True):
        assert one["key"] == other["key"]
        assert torch.equal(one["frames"], other["frames"]) and torch.equal(one["waveform"], other["waveform"])


def test_cached_clips_are_not_read_again(clips, tmp_path):
    shutil.copytree(clips.url, tmp_path / "copy")
    stream = ClipStream(ShardSet.open(tmp_path / "copy"), ClipDecoder(seconds=0.6, random_crop=True), batch_size=6, cache_gb=1.0)
    batches = stream.batches()
    first = next(batches)
    os.truncate(tmp_path / "copy" / "shard-000000.tar", 0)
    second = next(batches)
    assert sorted(first["key"]) == sorted(second["key"]) and stream.bad == 0


def test_crops_are_a_function_of_the_position(clips):
    decode = ClipDecoder(seconds=0.4, random_crop=True)
    whole = take(ClipStream(clips, decode, batch_size=6), 4)
    resumed = take(ClipStream(clips, decode, batch_size=6, position=12), 2, workers=2)
    for one, other in zip(whole[2:], resumed, strict=True):
        assert torch.equal(one["frames"], other["frames"]) and torch.equal(one["waveform"], other["waveform"])
    visits = [batch["waveform"][batch["key"].index("clip-0")] for batch in whole]
    assert any(not torch.equal(visits[0], other) for other in visits[1:])  # another crop in another epoch
