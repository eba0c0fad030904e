"""One clip: cut and transcode it for a shard, decode it from there, read any video, and put sound under a video."""

from __future__ import annotations

import heapq
import io
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.context import Flags as CodecFlags
from av.container import Flags, InputContainer
from av.video.reformatter import VideoReformatter

from data_prep.container import ClipError, MediaInfo, Source, audio_stream, opened, origin, probe, video_stream
from data_prep.timeline import Painter, mono, pictures, sound

__all__ = ["ClipError", "ClipFormat", "EncodedClip", "MediaInfo", "decode_audio", "decode_frames", "mux", "probe", "read_video", "transcode"]

_SILENCE_WINDOW = 0.05
_FLOOR_DBFS = -120.0
_AAC_BIT_RATE = 128_000
_H264_OPTIONS = {"bf": "0", "sc_threshold": "0", "flags": "+cgop", "threads": "1"}
"""Without B-frames, with key frames at regular places, the frames of a clip can be told apart by counting, and equal input gives equal bytes."""


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
        if self.gop < 1 or not 0 <= self.crf <= 51:
            raise ValueError(f"ClipFormat.gop, crf are {self.gop}, {self.crf}: need gop >= 1 and crf from 0 to 51")

    @property
    def rate(self) -> Fraction:
        """The frame rate as a fraction, 29.97 being 30000/1001."""
        return Fraction(self.fps).limit_denominator(1001)


@dataclass(frozen=True, kw_only=True)
class EncodedClip:
    """A clip as it goes into a shard, with what was measured on the way."""

    mp4: bytes
    """H.264, yuv420p, no sound: round(duration * fps) frames."""
    flac: bytes
    """16-bit mono: round(duration * sample_rate) samples."""
    duration: float
    """Seconds."""
    fps: float
    """Frames per second."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    sample_rate: int
    """Hz."""
    channels: int
    """Channels of the source."""
    loudness: float
    """Root mean square level, dBFS; -120 for digital silence."""
    peak: float
    """Highest sample, dBFS."""
    silence: float
    """Share of the clip in stretches of silence."""
    motion: float
    """Mean change of a pixel from frame to frame, of 1: 0 is a still picture."""
    source_fps: float
    """Average frame rate of the source."""
    source_side: int
    """Shorter side of the source's picture, pixels."""
    av_offset: float
    """Seconds by which the source's sound begins after its picture; the clip has them in step already."""

    def columns(self) -> dict[str, Any]:
        """All measurements, without the media."""
        return {name: value for name, value in vars(self).items() if name not in ("mp4", "flac")}


def transcode(source: Source, start: float, end: float | None, format: ClipFormat) -> EncodedClip:
    """Cut [start, end) seconds (end None: all) out of a media file and encode it; ClipError where that cannot be done.

    Both streams are cut by their timestamps, counted from the file's beginning; where the sound begins late there is silence.
    """
    info = probe(source)
    if info.audio_start is None:
        raise ClipError("no_audio", f"{_name(source)}: no audio stream")
    if format.max_seconds is not None:
        end = min(math.inf if end is None else end, start + format.max_seconds)
    with opened(source) as media:
        video = _encode_video(_painted(media, start, end, format.fps, format.short_side, format.crop), format)
    # The source may end before `end`: then the clip lasts as long as its frames.
    whole = end is not None and video.frames == round((end - start) * format.fps)
    duration = end - start if whole else video.frames / format.fps
    if not video.frames or duration < format.min_seconds:
        raise ClipError("too_short", f"{_name(source)}: {duration:.3f} s from {start:g} s on, {format.min_seconds:g} s are wanted")
    with opened(source) as media:
        waveform = sound(media, start, round(duration * format.sample_rate), format.sample_rate)
    return EncodedClip(
        mp4=video.mp4,
        flac=_encode_flac(waveform, format.sample_rate),
        duration=duration,
        fps=format.fps,
        width=video.width,
        height=video.height,
        sample_rate=format.sample_rate,
        channels=info.channels,
        **loudness(waveform, format.sample_rate, format.silence_dbfs),
        motion=video.motion,
        source_fps=info.fps,
        source_side=min(info.width, info.height),
        av_offset=info.av_offset,
    )


def read_video(
    path: Source, fps: float, start: float = 0.0, end: float | None = None, short_side: int | None = None, crop: bool = False
) -> np.ndarray:
    """Frames (T, H, W, C) uint8 RGB of any video at a constant rate, upright, by the same rule as `transcode`.

    `short_side` None keeps the size, made even; `crop` keeps the middle square.
    """
    with opened(path) as media:
        frames = list(_painted(media, start, end, fps, short_side, crop))
    if not frames:
        raise ClipError("too_short", f"{_name(path)}: no picture from {start:g} s on")
    return np.stack(frames)


def decode_frames(mp4: bytes, start: int = 0, count: int | None = None) -> np.ndarray:
    """Frames start .. start + count (count None: to the end) of a shard's clip: RGB (T, H, W, C) uint8.

    Decodes from the key frame before `start` on. ClipError too_short where the clip has fewer frames.
    """
    taken: list[np.ndarray] = []
    reformatter = VideoReformatter()
    with opened(mp4) as media:
        video = video_stream(media)
        video.codec_context.thread_count = 1  # data loaders decode many clips side by side
        rate = video.average_rate
        if start:
            media.seek(int(start / rate / video.time_base), stream=video)
        for frame in media.decode(video):
            if round(frame.pts * video.time_base * rate) < start:
                continue
            taken.append(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
            if len(taken) == count:
                break
    if len(taken) < (count or 1):
        raise ClipError("too_short", f"frames {start} to {start + (count or 1)} are wanted, the clip has no more than {start + len(taken)}")
    return np.stack(taken)


def decode_audio(flac: bytes, start: int = 0, count: int | None = None) -> np.ndarray:
    """Samples start .. start + count (count None: to the end) of a shard's clip: (N,) float32 in [-1, 1].

    ClipError too_short where the clip has fewer samples.
    """
    stop = None if count is None else start + count
    chunks, length = [], 0
    with opened(flac) as media:
        for frame in media.decode(audio=0):
            chunks.append(mono(frame))
            length += len(chunks[-1])
            if stop is not None and length >= stop:
                break
    if length < (stop or start + 1):
        raise ClipError("too_short", f"samples {start} to {stop or start + 1} are wanted, the clip ends after {length}")
    return np.concatenate(chunks)[start:stop]


def mux(video: str | os.PathLike[str], waveform: Any, sample_rate: int, out: str | os.PathLike[str]) -> None:
    """Write `out` with the pictures of `video`, packet for packet as they are, and `waveform` (N,) as its only sound (AAC).

    Sample 0 falls on the file's time 0. `out` appears under its name once it is complete.
    """
    out = Path(out)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.part{out.suffix}")
    samples = np.asarray(waveform, dtype=np.float32).reshape(-1)
    try:
        with opened(os.fspath(video)) as media, av.open(str(temporary), "w") as target:
            stream = video_stream(media)
            copy = target.add_stream_from_template(stream, opaque=True)
            audio = target.add_stream("aac", rate=sample_rate, layout="mono", bit_rate=_AAC_BIT_RATE)
            packets = heapq.merge(_copied(media, stream, copy), _encoded(audio, samples, "fltp"), key=lambda packet: packet.dts * packet.time_base)
            for packet in packets:
                target.mux(packet)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def loudness(waveform: np.ndarray, sample_rate: int, silence_dbfs: float) -> dict[str, float]:
    """The columns loudness (RMS), peak (both dBFS) and silence (share of 50 ms stretches below `silence_dbfs`)."""
    window = round(_SILENCE_WINDOW * sample_rate)
    square = np.square(waveform, dtype=np.float64)
    stretches = np.add.reduceat(square, np.arange(0, len(square), window)) / window
    return {
        "loudness": _dbfs(math.sqrt(square.mean())),
        "peak": _dbfs(math.sqrt(square.max())),
        "silence": float(np.mean(stretches < 10 ** (silence_dbfs / 10))),
    }


def _dbfs(amplitude: float) -> float:
    return max(_FLOOR_DBFS, 20 * math.log10(max(amplitude, 1e-12)))


def _name(source: Source) -> str:
    return "bytes in memory" if isinstance(source, bytes) else os.fspath(source)


def _painted(
    media: InputContainer, start: float, end: float | None, fps: float, short_side: int | None, crop: bool
) -> Iterator[np.ndarray]:
    paint = Painter(video_stream(media).sample_aspect_ratio, short_side, crop)
    return map(paint, pictures(media, start, end, fps))


@dataclass
class _Video:
    mp4: bytes = b""
    frames: int = 0
    width: int = 0
    height: int = 0
    motion: float = 0.0


def _encode_video(frames: Iterable[np.ndarray], format: ClipFormat) -> _Video:
    video, buffer, last, change = _Video(), io.BytesIO(), None, 0.0
    with _writer(buffer, "mp4") as target:
        stream = None
        for frame in frames:
            if stream is None:
                video.height, video.width = frame.shape[:2]
                stream = _h264_stream(target, video, format)
            small = frame[::4, ::4].astype(np.int16)
            change += 0.0 if last is None else float(np.abs(small - last).mean()) / 255
            last = small
            target.mux(stream.encode(_yuv(frame, video.frames, format.rate)))
            video.frames += 1
        if stream is not None:
            target.mux(stream.encode())
    video.mp4, video.motion = buffer.getvalue(), change / max(1, video.frames - 1)
    return video


def _writer(buffer: io.BytesIO, kind: str) -> Any:
    target = av.open(buffer, "w", format=kind)
    target.flags = int(target.flags) | Flags.bitexact  # no dates, no names of encoders
    return target


def _h264_stream(target: Any, video: _Video, format: ClipFormat) -> av.VideoStream:
    stream = target.add_stream("libx264", rate=format.rate, width=video.width, height=video.height, pix_fmt="yuv420p")
    stream.options = _H264_OPTIONS | {"preset": format.preset, "crf": str(format.crf), "g": str(format.gop), "keyint_min": str(format.gop)}
    context = stream.codec_context
    context.time_base = 1 / format.rate
    context.flags = int(context.flags) | CodecFlags.bitexact
    context.colorspace, context.color_range = 6, 1  # BT.601, limited range: what _yuv makes
    return stream


def _yuv(frame: np.ndarray, index: int, rate: Fraction) -> av.VideoFrame:
    picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG", threads=1)
    picture.pts, picture.time_base = index, 1 / rate
    return picture


def _encode_flac(waveform: np.ndarray, sample_rate: int) -> bytes:
    samples = np.clip(np.rint(waveform * 32768), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    with _writer(buffer, "flac") as target:
        stream = target.add_stream("flac", rate=sample_rate, layout="mono", format="s16")
        stream.codec_context.flags = int(stream.codec_context.flags) | CodecFlags.bitexact
        for packet in _encoded(stream, samples, "s16"):
            target.mux(packet)
    return buffer.getvalue()


def _encoded(stream: av.AudioStream, samples: np.ndarray, kind: str) -> Iterator[av.Packet]:
    frame = av.AudioFrame.from_ndarray(samples[None], format=kind, layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = stream.rate, 0, Fraction(1, stream.rate)
    yield from stream.encode(frame)
    yield from stream.encode()


def _copied(media: InputContainer, stream: av.VideoStream, copy: av.VideoStream) -> Iterator[av.Packet]:
    zero = round(origin(media) / stream.time_base)
    for packet in media.demux(stream):
        if packet.dts is not None:
            packet.pts, packet.dts = packet.pts - zero, packet.dts - zero
            packet.stream = copy
            yield packet
