"""Encoded clips: both streams start at 0 and carry what was rendered."""

import io

import av
import numpy as np
import pytest

from data_prep.rendering.config import RenderConfig
from data_prep.rendering.encode import encode_mp4
from data_prep.rendering.scene import Scene


@pytest.fixture(scope="module")
def clip():
    scene = Scene.cast(RenderConfig(kinds=("drum",), multi_share=0.0), 0, "train", 0)
    frames, waveform = scene.draw(), scene.play()
    return scene, frames, waveform, encode_mp4(frames, waveform, 25.0, 16000)


def decode(mp4, kind):
    with av.open(io.BytesIO(mp4)) as container:
        return list(container.decode(**{kind: 0}))


def test_it_is_h264_and_aac(clip):
    with av.open(io.BytesIO(clip[3])) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.name == "h264" and audio.codec_context.name == "aac"
        assert video.average_rate == 25 and audio.rate == 16000 and audio.channels == 1


def test_pictures_come_back_frame_by_frame(clip):
    _, frames, _, mp4 = clip
    decoded = decode(mp4, "video")
    assert [frame.time for frame in decoded] == pytest.approx(np.arange(96) / 25)
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    assert np.abs(pictures.astype(float) - frames).mean() < 6


def test_sound_comes_back_in_time(clip):
    scene, _, waveform, mp4 = clip
    decoded = decode(mp4, "audio")
    assert decoded[0].time == 0
    sound = np.concatenate([frame.to_ndarray()[0] for frame in decoded])
    assert len(sound) == len(waveform)
    match = np.fft.irfft(np.fft.rfft(sound, 2**17) * np.conj(np.fft.rfft(waveform, 2**17)))
    assert match.argmax() == 0
    for event in scene.events:
        start = round(event["time"] * 16000)
        # AAC smears ahead of an attack: this must stay far below it.
        assert np.square(sound[start : start + 320]).mean() > 100 * np.square(sound[start - 320 : start - 32]).mean()


def test_bytes_depend_on_nothing_else(clip):
    _, frames, waveform, mp4 = clip
    assert encode_mp4(frames, waveform, 25.0, 16000) == mp4


@pytest.mark.parametrize("fps", [29.97, 12.5])
def test_other_rates(fps):
    frames = np.zeros((15, 32, 32, 3), np.uint8)
    mp4 = encode_mp4(frames, np.zeros(8000, np.float32), fps, 16000)
    assert [frame.time for frame in decode(mp4, "video")] == pytest.approx(np.arange(15) / fps, abs=1e-3)
