"""Encoding to memory, the same bytes for the same input: H.264 in mp4, FLAC, and audio packets for any container."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.codec.context import Flags as CodecFlags
from av.container import Flags

from data_prep.transcoding.fingerprint import mean_change, reduced, thumbnail
from data_prep.transcoding.timeline import planes

_H264_OPTIONS = {"bf": "0", "sc_threshold": "0", "flags": "+cgop", "threads": "1", "x264-params": "mbtree=0:rc-lookahead=0"}
"""No B-frames and regular key frames: a reader finds a frame by counting. One thread: the bytes are the same on every machine.
Without B-frames and macroblock trees nothing is looked ahead for: leaving that out changes no byte."""
_BT601, _LIMITED_RANGE = 6, 1


@dataclass(frozen=True, kw_only=True)
class ClipFormat:
    """What all clips of a data set are made to look like."""

    fps: float = 25.0
    """Constant frame rate."""
    short_side: int = 256
    """Pixels of the shorter side, even; smaller pictures are enlarged, so that all clips agree."""
    crop: bool = False
    """Keep the middle square only; otherwise the aspect ratio stays."""
    sample_rate: int = 16000
    """Hz of the mono sound."""
    min_seconds: float = 1.0
    """Shorter clips are not made (too_short)."""
    max_seconds: float | None = None
    """Longer clips are cut off here; None keeps all."""
    max_pixels: int = 8192 * 4320
    """Sources with larger pictures (width times height) are refused before they are decoded (too_large)."""
    max_lost: float = 0.02
    """Share of a clip's time whose picture or sound may be damaged: there the picture stands or is patched, the sound is silent."""
    gop: int = 10
    """Frames from key frame to key frame: a reader decodes at most so many in vain."""
    crf: int = 23
    """x264's constant rate factor, 0 (lossless) to 51."""
    preset: str = "veryfast"
    """x264's trade of time against bytes."""
    silence_dbfs: float = -60.0
    """Stretches of 50 ms below this level count as silence."""

    def __post_init__(self):
        if not 0 < self.fps <= 240:
            raise ValueError(f"ClipFormat.fps is {self.fps}: choose a rate above 0, at most 240")
        if self.short_side < 16 or self.short_side % 2:
            raise ValueError(f"ClipFormat.short_side is {self.short_side}: choose an even number of pixels, at least 16")
        if not 8000 <= self.sample_rate <= 192000:
            raise ValueError(f"ClipFormat.sample_rate is {self.sample_rate}: choose 8000 to 192000 Hz")
        if self.min_seconds < 0 or (self.max_seconds is not None and self.max_seconds < max(self.min_seconds, 1 / self.fps)):
            raise ValueError(f"ClipFormat.min_seconds, max_seconds are {self.min_seconds}, {self.max_seconds}: need 0 <= min <= max")
        if self.max_pixels < 1 or not 0 <= self.max_lost <= 1:
            problem = "need 1 pixel or more and a share from 0 to 1"
            raise ValueError(f"ClipFormat.max_pixels, max_lost are {self.max_pixels}, {self.max_lost}: {problem}")
        if self.gop < 1 or not 0 <= self.crf <= 51:
            raise ValueError(f"ClipFormat.gop, crf are {self.gop}, {self.crf}: need gop >= 1 and crf from 0 to 51")

    @property
    def rate(self) -> Fraction:
        """The frame rate as a fraction, 29.97 being 30000/1001."""
        return Fraction(self.fps).limit_denominator(1001)


@dataclass
class Video:
    """An encoded video without sound, and what was seen of its pictures on the way."""

    mp4: bytes = b""
    frames: int = 0
    width: int = 0
    height: int = 0
    motion: float = 0.0
    """Mean change of luma from frame to frame, of 1."""
    thumbnails: list[np.ndarray] = field(default_factory=list)
    """One for each frame."""


def encode_video(pictures: Iterable[np.ndarray], format: ClipFormat) -> Video:
    """Encode painted pictures of equal size; nothing where there are none."""
    video, buffer, change, last, small = Video(), io.BytesIO(), 0.0, None, None
    with _writer(buffer, "mp4") as target:
        stream = None
        for picture in pictures:
            if stream is None:
                video.height, video.width = planes(picture)[0].shape
                stream = _h264_stream(target, video, format)
            if picture is not last:  # at low rates it is shown again
                before, small = small, reduced(planes(picture)[0])
                change += 0.0 if before is None else mean_change(before, small)
                last, thumb = picture, thumbnail(small)
            video.thumbnails.append(thumb)
            target.mux(stream.encode(_frame(picture, video.frames, format.rate)))
            video.frames += 1
        if stream is not None:
            target.mux(stream.encode())
    video.mp4, video.motion = buffer.getvalue(), change / max(1, video.frames - 1)
    return video


def _writer(buffer: io.BytesIO, kind: str) -> Any:
    target = av.open(buffer, "w", format=kind)
    target.flags = int(target.flags) | Flags.bitexact.value  # no dates, no names of encoders
    return target


def _h264_stream(target: Any, video: Video, format: ClipFormat) -> av.VideoStream:
    stream = target.add_stream("libx264", rate=format.rate, width=video.width, height=video.height, pix_fmt="yuv420p")
    stream.options = _H264_OPTIONS | {"preset": format.preset, "crf": str(format.crf), "g": str(format.gop), "keyint_min": str(format.gop)}
    context = stream.codec_context
    context.time_base = 1 / format.rate
    context.flags = int(context.flags) | CodecFlags.bitexact.value
    context.colorspace, context.color_range = _BT601, _LIMITED_RANGE
    return stream


def _frame(picture: np.ndarray, index: int, rate: Fraction) -> av.VideoFrame:
    # A new frame: a decoder's own would bring its type, which the encoder takes for an order, and its side data.
    frame = av.VideoFrame.from_numpy_buffer(picture, "yuv420p")
    frame.pts, frame.time_base = index, 1 / rate
    frame.colorspace, frame.color_range = _BT601, _LIMITED_RANGE
    return frame


def as_rgb(picture: np.ndarray) -> np.ndarray:
    """A painted picture as RGB (H, W, 3) uint8, as a decoder of the clip shows it."""
    return _frame(picture, 0, Fraction(1)).reformat(format="rgb24", threads=1).to_ndarray()


def pcm16(waveform: np.ndarray) -> np.ndarray:
    """A waveform in [-1, 1] as the int16 samples that are stored."""
    return np.clip(np.rint(waveform * 32768), -32768, 32767).astype(np.int16)


def encode_flac(samples: np.ndarray, sample_rate: int) -> bytes:
    """Samples (N,) int16 as FLAC."""
    buffer = io.BytesIO()
    with _writer(buffer, "flac") as target:
        stream = target.add_stream("flac", rate=sample_rate, layout="mono", format="s16")
        stream.codec_context.flags = int(stream.codec_context.flags) | CodecFlags.bitexact.value
        for packet in encode_audio(stream, samples, "s16"):
            target.mux(packet)
    return buffer.getvalue()


def encode_audio(stream: av.AudioStream, samples: np.ndarray, kind: str) -> Iterator[av.Packet]:
    """The packets of mono `samples` (N,) of sample format `kind`, from time 0 on."""
    frame = av.AudioFrame.from_ndarray(samples[None], format=kind, layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = stream.rate, 0, Fraction(1, stream.rate)
    yield from stream.encode(frame)
    yield from stream.encode()
