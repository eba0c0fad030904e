from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch

from data_prep.decoding import ClipDecoder, DecodedCache, TensorDecoder
from data_prep.index import Entry, ShardError
from data_prep.media import ClipError

FPS, RATE, SECONDS = 25, 16000, 2
HEIGHT, WIDTH, FRAMES = 48, 80, SECONDS * FPS


def picture(number):
    """A flat colour that tells the frame, and a darker left half that tells left from right."""
    frame = np.full((HEIGHT, WIDTH, 3), 20 + 4 * number, np.uint8)
    frame[:, : WIDTH // 2] //= 2
    return frame


def encode(kind, codec, frames, **options):
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, **options)
        if codec == "libx264":
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", 10
            stream.options = {"bf": "0", "crf": "10"}
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def clip():
    video = [av.VideoFrame.from_ndarray(picture(i), format="rgb24") for i in range(FRAMES)]
    samples = np.arange(SECONDS * RATE, dtype=np.int16)[None]  # sample n has the value n
    audio = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
    audio.sample_rate = RATE
    return {"mp4": encode("mp4", "libx264", video, rate=FPS), "flac": encode("flac", "flac", [audio], rate=RATE, layout="mono")}


def entry(**columns):
    return Entry("shard-000000", "clip", {}, {"duration": SECONDS, "fps": FPS, "sample_rate": RATE, **columns})


def random(seed=0):
    return lambda: np.random.Generator(np.random.Philox(seed))


def number_of(frame):
    """Which picture a decoded frame shows."""
    return round((frame[:, :, -8:].float().mean().item() - 20) / 4)


def first_sample(waveform):
    return round(waveform[0].item() * 32768)


def test_a_clip_is_decoded_whole(clip):
    sample = ClipDecoder()(clip, entry(), random())
    assert sample["frames"].shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert sample["frames"].dtype == torch.uint8 and sample["frames"].is_contiguous()
    assert [number_of(frame) for frame in sample["frames"]] == list(range(FRAMES))
    assert sample["waveform"].shape == (SECONDS * RATE,) and sample["waveform"].dtype == torch.float32
    assert (sample["waveform"] * 32768).round().int().tolist() == list(range(SECONDS * RATE))


def test_random_crops_keep_sound_and_picture_together(clip):
    decoder, starts = ClipDecoder(seconds=0.8, random_crop=True), set()
    for seed in range(30):
        sample = decoder(clip, entry(), random(seed))
        start = number_of(sample["frames"][0])
        assert [number_of(frame) for frame in sample["frames"]] == list(range(start, start + 20))
        assert first_sample(sample["waveform"]) == start * RATE // FPS and len(sample["waveform"]) == 12800
        starts.add(start)
    assert min(starts) >= 0 and max(starts) <= FRAMES - 20 and len(starts) > 12
    assert torch.equal(decoder(clip, entry(), random(3))["frames"], decoder(clip, entry(), random(3))["frames"])


def test_crops_start_at_the_beginning_unless_random(clip):
    sample = ClipDecoder(seconds=0.4)(clip, entry(), random(5))
    assert number_of(sample["frames"][0]) == 0 and first_sample(sample["waveform"]) == 0


@pytest.mark.parametrize("cached", [False, True])
def test_short_clips_are_filled(clip, cached):
    decoder = ClipDecoder(seconds=3.2, random_crop=True)
    sample = decoder.crop(decoder.whole(clip, entry()), entry(), random()) if cached else decoder(clip, entry(), random())
    assert sample["frames"].shape == (80, 3, HEIGHT, WIDTH) and sample["waveform"].shape == (51200,)
    assert all(torch.equal(frame, sample["frames"][FRAMES - 1]) for frame in sample["frames"][FRAMES:])
    assert not sample["waveform"][SECONDS * RATE :].any() and sample["waveform"][SECONDS * RATE - 1] > 0.9


@pytest.mark.parametrize("size", [None, 32, 64])
@pytest.mark.parametrize("seconds", [None, 0.52, 5.0])
def test_cached_crops_equal_decoded_ones_to_the_bit(clip, size, seconds):
    decoder = ClipDecoder(seconds=seconds, size=size, random_crop=seconds is not None, columns=("caption",))
    media = decoder.whole(clip, entry())
    assert media["waveform"].dtype == torch.int16
    for seed in range(4):
        one, other = decoder(clip, entry(caption="rain"), random(seed)), decoder.crop(media, entry(caption="rain"), random(seed))
        assert one.keys() == other.keys() == {"frames", "waveform", "caption"} and one["caption"] == other["caption"] == "rain"
        for name in ("frames", "waveform"):
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])


def test_frames_become_squares_about_the_centre(clip):
    frames = ClipDecoder(size=24)(clip, entry(), random())["frames"]
    assert frames.shape == (FRAMES, 3, 24, 24)
    assert (frames[10, :, :, :11] < 40).all() and (frames[10, :, :, 13:] > 50).all()  # the edge lies in the middle


def test_only_what_is_wanted_is_read(clip):
    picture_only, sound_only = ClipDecoder(want=("frames",)), ClipDecoder(want=["waveform"])
    assert picture_only.members == ("mp4",) and sound_only.members == ("flac",)
    assert picture_only({"mp4": clip["mp4"]}, entry(), random()).keys() == {"frames"}
    assert sound_only({"flac": clip["flac"]}, entry(), random()).keys() == {"waveform"}
    assert sound_only.whole({"flac": clip["flac"]}, entry()).keys() == {"waveform"}


def test_shards_of_another_rate_stop_the_run_with_the_reason(clip):
    with pytest.raises(RuntimeError, match="clip clip of shard-000000 has fps 25, the decoder expects 30; set its fps"):
        ClipDecoder(fps=30)(clip, entry(), random())
    with pytest.raises(RuntimeError, match="has sample_rate 16000, the decoder expects 44100"):
        ClipDecoder(sample_rate=44100)(clip, entry(), random())
    with pytest.raises(RuntimeError, match="no duration in its sidecar, so no crop"):
        ClipDecoder(seconds=1)(clip, entry(duration=None), random())


def test_junk_is_a_bad_clip(clip):
    with pytest.raises(ClipError):
        ClipDecoder()({**clip, "mp4": b"junk" * 100}, entry(), random())
    with pytest.raises(ShardError, match="latent.npy is not an array") as caught:
        TensorDecoder(("latent",))({"latent.npy": b"\x93NUMPYjunk"}, entry(), random())
    assert caught.value.reason == "bad_array"


def test_a_sidecar_that_promises_too_much_names_the_clip(clip):
    decoder = ClipDecoder(seconds=0.2, random_crop=True)
    seed = next(seed for seed in range(50) if random(seed)().integers(0, 1000 * FPS - 5 + 1) > FRAMES)
    for decode in (lambda e: decoder(clip, e, random(seed)), lambda e: decoder.crop(decoder.whole(clip, e), e, random(seed))):
        with pytest.raises(ClipError) as caught:
            decode(entry(duration=1000))
        assert caught.value.reason == "too_short"


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_features_come_as_tensors():
    mean = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16)
    arrays = {"mean": mean, "tokens": np.arange(7), "sync": np.ones(4, np.float32)}
    decoder = TensorDecoder(list(arrays), columns=("labels",))
    assert decoder.members == ("mean.npy", "tokens.npy", "sync.npy")
    sample = decoder({f"{name}.npy": npy(array) for name, array in arrays.items()}, entry(labels=["dog"]), random())
    assert [sample[name].dtype for name in arrays] == [torch.float32, torch.int64, torch.float32] and sample["labels"] == ["dog"]
    assert all(np.array_equal(sample[name].numpy(), array) for name, array in arrays.items())


def test_arrays_that_would_run_code_are_refused():
    with pytest.raises(ShardError, match="not an array"):
        TensorDecoder(("a",))({"a.npy": npy(np.array([print], dtype=object))}, entry(), random())


def test_the_cache_keeps_what_fits_and_nothing_more():
    cache = DecodedCache(1000)
    assert not cache.full
    cache.add("a", {"frames": torch.zeros(600, dtype=torch.uint8)})
    cache.add("b", {"frames": torch.zeros(150, dtype=torch.int16)})
    assert cache.get("a") is not None and cache.get("b") is not None and not cache.full
    cache.add("c", {"frames": torch.zeros(200, dtype=torch.uint8)})
    assert cache.full and cache.get("c") is None and cache.get("a") is not None
    assert DecodedCache(0).full


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipDecoder(seconds=0.01), "seconds is 0.01: shorter than one frame"),
        (lambda: ClipDecoder(size=0), "size is 0: frames need at least one pixel"),
        (lambda: ClipDecoder(want=("audio",)), "want is .*: name 'frames', 'waveform' or both"),
        (lambda: ClipDecoder(want=()), "want is"),
        (lambda: TensorDecoder("latent"), "names is 'latent': give a list of features"),
        (lambda: TensorDecoder([]), "names is"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
