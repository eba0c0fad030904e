"""Frames and sound to an mp4 file as a camera would make it: H.264 and AAC."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np


def encode_mp4(frames: np.ndarray, waveform: np.ndarray, fps: float, sample_rate: int, crf: int = 20, audio_bitrate: int = 64000) -> bytes:
    """An mp4 of frames uint8 (T, H, W, 3) and a mono waveform float32 (N,); both start at time 0."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = _video_stream(container, frames.shape[2], frames.shape[1], fps, crf)
        # FFmpeg's default search for the quantiser takes eight times as long as its quick one.
        audio = container.add_stream("aac", rate=sample_rate, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = audio_bitrate
        for image in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[None], np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = sample_rate, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return buffer.getvalue()


def _video_stream(container: av.container.OutputContainer, width: int, height: int, fps: float, crf: int) -> av.VideoStream:
    # B-frames would delay the first picture. Bytes must repeat: x264's macroblock tree reads past rows of less than 64 pixels,
    # so that its bits depend on what the memory held before (seen with x264 in PyAV 18).
    options = {"preset": "veryfast", "crf": str(crf), "bf": "0", "x264-params": "mbtree=0"}
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.thread_count = 1
    return stream
