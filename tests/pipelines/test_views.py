"""Pictures by view: from clips, from files as the shards would have them, and from files as MMAudio reads them."""

from functools import partial

import av
import numpy as np
import pytest
import torch

from data_prep.decoding import ClipDecoder
from data_prep.frames import resize
from data_prep.index import Entry, ShardSet
from data_prep.media import ClipError, ClipFormat, transcode
from data_prep.stream import one_pass
from models.conditioning import FrameView
from pipelines.views import ClipReader, MMAudioReader, ViewDecoder, see, views_of
from tests.fixtures.made_media import STEP, write_media

VIEWS = FrameView(fps=8.0, size=24, crop=False), FrameView(fps=25.0, size=32)


def shades(pictures):
    """The number that each made picture (T, C, H, W) carries."""
    return (pictures[:, :, 8:-8, 8:-8].float().mean(dim=(1, 2, 3)) / STEP).round().int().tolist()


def plain_reading(path, fps, start, end):
    """MMAudio's rule, word for word of the facts: for each tick the first frame at or after it; ticks are sums of 1 / fps."""
    taken, tick = [], start
    with av.open(str(path)) as media:
        for frame in media.decode(video=0):
            if frame.time < start or frame.time > end:
                continue
            while frame.time >= tick:
                taken.append(frame.to_ndarray(format="rgb24"))
                tick += 1 / fps
    return np.stack(taken)


@pytest.mark.parametrize("fps", [24.0, 25.0, 29.97])
def test_mmaudios_pictures_are_those_of_its_rule_to_the_pixel(tmp_path, fps):
    path = write_media(tmp_path / "in.mp4", fps=fps, seconds=1.6, size=(86, 48))
    found, shown = MMAudioReader()(path, VIEWS, 0.0, 1.5)
    squashed, cropped = (torch.from_numpy(plain_reading(path, view.fps, 0.0, 1.5)).permute(0, 3, 1, 2) for view in VIEWS)
    seconds = min(1.5, len(squashed) / 8, len(cropped) / 25)
    assert shown == seconds
    assert torch.equal(found[VIEWS[0]], resize(squashed[:int(8 * seconds)], (24, 24)))
    scaled = resize(cropped[:int(25 * seconds)], (32, int(32 * 86 / 48)))
    left = round((scaled.shape[3] - 32) / 2)
    assert torch.equal(found[VIEWS[1]], scaled[..., left:left + 32])


def test_a_short_video_ends_all_views_together(tmp_path):
    path = write_media(tmp_path / "in.mp4", fps=50.0, seconds=1.0)
    found, shown = MMAudioReader()(path, VIEWS, 0.0, 8.0)
    assert [len(found[view]) for view in VIEWS] == [8, 25] and shown == 1.0
    # 0.125 s is between two pictures: the later one.
    assert shades(found[VIEWS[0]])[:4] == [0, 7, 13, 19]
    with pytest.raises(ClipError, match="in.mp4: hardly a picture from 5 s on"):
        MMAudioReader()(path, VIEWS, 5.0, 8.0)


def test_a_later_window_begins_at_its_start(tmp_path):
    path = write_media(tmp_path / "in.mp4", fps=25.0, seconds=2.0)
    assert shades(MMAudioReader()(path, VIEWS, 1.0, 0.8)[0][VIEWS[1]])[:3] == [25, 26, 27]


def test_a_turned_video_is_seen_upright(tmp_path):
    path = write_media(tmp_path / "in.mp4", seconds=0.4, size=(64, 48), rotation=90)
    (picture, *_), = MMAudioReader()(path, VIEWS[1:], 0.0, 0.2)[0].values()
    plain = MMAudioReader()(write_media(tmp_path / "plain.mp4", seconds=0.4, size=(64, 48)), VIEWS[1:], 0.0, 0.2)[0][VIEWS[1]][0]
    corners = {name: tuple(int(value) for value in pixels[:, 0, 0]) for name, pixels in (("turned", picture), ("plain", plain))}
    assert corners["turned"] != corners["plain"]


def test_views_of_a_clip_share_its_times():
    frames = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 3, 30, 40)
    slow, fast = (see(frames, 25.0, 4.0, view, 16) for view in VIEWS)
    assert slow.shape == (32, 3, 24, 24) and fast.shape == (100, 3, 32, 32)
    assert slow[:, 0, 0, 0].tolist() == [int(number / 8 * 25 + 1e-6) for number in range(32)]
    assert see(frames, 25.0, 5.0, FrameView(fps=25.0), 16)[100:, 0, 0, 0].tolist() == [99] * 25


def test_a_decoder_of_views_gives_what_the_clip_decoder_gives(tiny):
    shards, view = ShardSet.open(tiny.shards), FrameView(fps=25.0)
    plain = next(one_pass(shards, ClipDecoder(seconds=3.84, size=32), 4))
    decoder = ViewDecoder(clip=ClipDecoder(seconds=3.84), views=(view, VIEWS[0]), seconds=3.84, size=32)
    batch = next(one_pass(shards, decoder, 4))
    assert torch.equal(batch["view0"], plain["frames"]) and torch.equal(batch["waveform"], plain["waveform"])
    assert batch["view1"].shape == (4, 30, 3, 24, 24) and "frames" not in batch
    pictures = views_of(batch, decoder.views, torch.device("cpu"))
    assert pictures[view].max() <= 1 and pictures[view].dtype == torch.float32
    entry, random = shards.entry(0, 0), np.random.default_rng
    raw = shards.read(0, 0, decoder.members)
    cached, direct = decoder.crop(decoder.whole(raw, entry), entry, random), decoder(raw, entry, random)
    assert all(torch.equal(cached[name], direct[name]) for name in ("view0", "view1", "waveform"))


def whole_clip(decoder, raw, entry, random):
    """What a decoder of views gives by its definition: of all frames, as stored, those that a view shows, in its shape."""
    sample = decoder.clip(raw, entry, random)
    frames, fps = sample.pop("frames"), decoder.clip.fps
    return sample | {f"view{n}": see(frames, fps, decoder.seconds, view, decoder.size) for n, view in enumerate(decoder.views)}


@pytest.mark.parametrize("seconds", [0.4, 1.3, 2.6, None])
@pytest.mark.parametrize("size", [(96, 64), (66, 90)])
def test_views_taken_a_few_frames_at_a_time_are_those_of_the_whole_clip_to_the_bit(tmp_path, seconds, size):
    source = write_media(tmp_path / "in.mkv", size=size, seconds=1.64)
    clip = transcode(str(source), 0.0, None, ClipFormat(fps=25, short_side=64, sample_rate=16000))
    raw, entry = {"mp4": clip.mp4, "flac": clip.flac}, Entry("shard", "clip", {}, {**clip.columns(), "caption": "a tick"})
    views = (*VIEWS, FrameView(fps=3.0, crop=False), FrameView(fps=30.0, size=64), FrameView(fps=25.0, size=96))
    for want in (("frames", "waveform"), ("frames",)):
        media = ClipDecoder(seconds=seconds, random_crop=True, want=want, columns=("caption",))
        decoder = ViewDecoder(clip=media, views=views, seconds=seconds or 1.7, size=40)
        for seed in range(3):
            random = partial(np.random.default_rng, seed)
            found, expected = decoder(raw, entry, random), whole_clip(decoder, raw, entry, random)
            assert found.keys() == expected.keys() and found.pop("caption") == expected.pop("caption") == "a tick"
            assert all(found[name].is_contiguous() and torch.equal(found[name], expected[name]) for name in expected)


def test_generation_sees_what_training_saw(tiny, tmp_path):
    """The clip of a shard and the file that it was made from, up to the clip's compression."""
    shards, view = ShardSet.open(tiny.shards), FrameView(fps=25.0)
    entry = shards.entry(0, 0)
    clip = ClipDecoder(seconds=3.84, size=32)(shards.read(0, 0), entry, np.random.default_rng)["frames"].float()
    read = ClipReader(fps=25.0, size=32, short_side=32)(entry.columns["source"], (view,), 0.0, 3.84)[0][view].float()
    assert clip.shape == read.shape == (96, 3, 32, 32)
    assert (clip - read).abs().mean() < 4 < (clip - read.flip(0)).abs().mean() + 4
