from __future__ import annotations

import contextlib
import io

import av
import numpy as np
import pytest
import torch

from data_prep.decoding import ClipDecoder
from data_prep.index import Entry
from data_prep.media import ClipError, ClipFormat, decode_audio, transcode
from data_prep.streaming.backends import BACKENDS, backend
from tests.fixtures.made_media import numbers, write_media

FPS = 25


def installed(name):
    """The backend of that name, its chunks put together."""
    try:
        chunks = backend(name)
    except ValueError as error:
        pytest.skip(str(error))
    return lambda *arguments: np.concatenate(list(chunks(*arguments)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    source = write_media(tmp_path_factory.mktemp("backends") / "source.mkv", size=(96, 64))
    return transcode(str(source), 0.0, None, ClipFormat(fps=FPS, short_side=64, sample_rate=16000, crf=4))


@pytest.mark.parametrize("name", BACKENDS)
def test_all_give_the_same_frames_to_the_bit(clip, name):
    decode, reference = installed(name), installed("pyav")(clip.mp4, 0, None)
    assert numbers(reference).tolist() == list(range(50))
    for start, count in ((0, None), (0, 1), (9, 2), (10, 10), (17, 33), (49, 1), (30, None)):
        frames = decode(clip.mp4, start, count)
        assert frames.dtype == np.uint8 and np.array_equal(frames, reference[start:][:count])


def blanked(data, first, last):
    """The file without the content of its packets before `first` and from `last` on, in seconds."""
    spoilt = bytearray(data)
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux():
            if packet.size and not first <= round(float(packet.pts * packet.time_base), 6) < last:
                spoilt[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return bytes(spoilt)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_decoded_before_the_key_frame_nor_after_the_last_wanted(clip, name):
    decode = installed(name)
    expected = decode(clip.mp4, 13, 20)
    last = 50 if name == "decord" else 33  # its thread goes on beyond what is asked for, how far is chance
    assert np.array_equal(decode(blanked(clip.mp4, 10 / FPS, last / FPS), 13, 20), expected)
    for first, last in ((11, 33), (10, 32)):  # what is needed does matter
        with contextlib.suppress(ClipError):
            assert not np.array_equal(decode(blanked(clip.mp4, first / FPS, last / FPS), 13, 20), expected)


def test_no_sound_is_decoded_far_from_what_is_wanted(clip):
    # A frame of FLAC holds 4,096 samples, 0.256 s.
    assert np.array_equal(decode_audio(blanked(clip.flac, 0.5, 1.1), 12_500, 3_500), decode_audio(clip.flac)[12_500:16_000])


@pytest.mark.parametrize("name", BACKENDS)
def test_all_say_what_is_wrong_in_the_same_words(clip, name):
    decode = installed(name)
    for data in (b"junk" * 100, clip.mp4[: len(clip.mp4) // 2]):
        with pytest.raises(ClipError) as caught:
            decode(data, 0, None)
        assert caught.value.reason == "undecodable"
    for start, count in ((45, 6), (50, 1), (60, None)):
        with pytest.raises(ClipError, match=f"frames {start} to .* are wanted, the clip has no more than") as caught:
            decode(clip.mp4, start, count)
        assert caught.value.reason == "too_short"


@pytest.mark.parametrize("name", BACKENDS)
def test_the_decoder_uses_the_backend_that_it_is_given(clip, name):
    installed(name)
    entry = Entry("shard-000000", "clip", {}, {"duration": 2.0, "fps": FPS, "sample_rate": 16000})
    samples = [
        ClipDecoder(seconds=0.8, size=32, random_crop=True, backend=each)(
            {"mp4": clip.mp4, "flac": clip.flac}, entry, lambda: np.random.Generator(np.random.Philox(3))
        )
        for each in ("pyav", name)
    ]
    assert torch.equal(samples[0]["frames"], samples[1]["frames"]) and samples[1]["frames"].shape == (20, 3, 32, 32)


def test_a_backend_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'ffmpeg': choose one of pyav, decord, torchcodec"):
        ClipDecoder(backend="ffmpeg")
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    backend.cache_clear()
    with pytest.raises(ValueError, match="backend is 'decord', which cannot be loaded .*; install it or choose 'pyav'"):
        ClipDecoder(backend="decord")
    backend.cache_clear()
