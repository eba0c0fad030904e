"""One clip: cut and transcode it for a shard, decode it from there, read any video, and put sound under a video."""

from __future__ import annotations

import contextlib
import heapq
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from data_prep.transcoding.container import ClipError, Losses, MediaInfo, Source, name_of, opened, origin, probe, readable, video_stream
from data_prep.transcoding.encode import ClipFormat, as_rgb, encode_audio, encode_flac, encode_video, pcm16
from data_prep.transcoding.fingerprint import fingerprint
from data_prep.transcoding.timeline import Painter, mono, pictures, sound

__all__ = [
    "ClipError", "ClipFormat", "EncodedClip", "MediaInfo",
    "decode_audio", "frame_chunks", "mux", "probe", "read_video", "transcode",
]  # fmt: skip

_SILENCE_WINDOW = 0.05
"""Seconds: silence is judged in stretches of this length."""
_FLOOR_DBFS = -120.0
_AAC_BIT_RATE = 128_000
CHUNK = 8
"""Frames decoded before something is done with them: as many as a processor's cache holds."""


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
    """Mean change of brightness from frame to frame, of 1: 0 is a still picture."""
    lost: float
    """Share of the clip's time whose picture or sound could not be decoded."""
    fingerprint: bytes
    """See data_prep.transcoding.fingerprint."""
    source_fps: float
    """Average frame rate of the source."""
    source_side: int
    """Shorter side of the source's picture, pixels."""
    av_offset: float
    """Seconds by which the source's sound begins after its picture; the clip has them in step already."""

    def columns(self) -> dict[str, Any]:
        """All measurements, without the media."""
        return {name: value for name, value in vars(self).items() if name not in ("mp4", "flac")}

    def described(self) -> dict[str, Any]:
        """The measurements that people read."""
        return {name: value for name, value in self.columns().items() if name != "fingerprint"}


def transcode(source: Source, start: float, end: float | None, format: ClipFormat) -> EncodedClip:
    """Cut [start, end) seconds (end None: all) out of a media file and encode it; ClipError where that cannot be done.

    Both streams are cut by their timestamps, counted from the file's beginning; where the sound begins late there is silence.
    Each is decoded once, for all that is made of it and measured on it.
    """
    name = name_of(source)
    with readable(source) as source:
        info = probe(source)
        if info.width * info.height > format.max_pixels:
            raise ClipError("too_large", f"{name}: pictures of {info.width}x{info.height}, ClipFormat.max_pixels is {format.max_pixels}")
        if info.audio_start is None:
            raise ClipError("no_audio", f"{name}: no audio stream")
        if format.max_seconds is not None:
            end = min(math.inf if end is None else end, start + format.max_seconds)
        unseen, unheard = Losses(), Losses()
        with opened(source) as media:
            video_stream(media).codec_context.thread_count = 1  # preparation runs one process per core
            video = encode_video(_painted(media, start, end, format.fps, format.short_side, format.crop, unseen), format)
        # The source may end before `end`: then the clip lasts as long as its frames.
        whole = end is not None and video.frames == round((end - start) * format.fps)
        duration = end - start if whole else video.frames / format.fps
        if not video.frames or duration < format.min_seconds:
            raise ClipError("too_short", f"{name}: {duration:.3f} s from {start:g} s on, {format.min_seconds:g} s are wanted")
        with opened(source) as media:
            waveform = sound(media, start, round(duration * format.sample_rate), format.sample_rate, unheard)
    lost = max(losses.share(start, duration, end) for losses in (unseen, unheard))
    if lost > format.max_lost:
        raise ClipError("undecodable", f"{name}: {lost:.1%} of the clip is damaged, ClipFormat.max_lost is {format.max_lost:.1%}")
    samples = pcm16(waveform)
    return EncodedClip(
        mp4=video.mp4,
        flac=encode_flac(samples, format.sample_rate),
        duration=duration,
        fps=format.fps,
        width=video.width,
        height=video.height,
        sample_rate=format.sample_rate,
        channels=info.channels,
        **loudness(waveform, format.sample_rate, format.silence_dbfs),
        motion=video.motion,
        lost=lost,
        fingerprint=fingerprint(video.thumbnails, samples, format.sample_rate),
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
        video_stream(media).thread_type = "AUTO"
        frames = [as_rgb(picture) for picture in _painted(media, start, end, fps, short_side, crop)]
    if not frames:
        raise ClipError("too_short", f"{name_of(path)}: no picture from {start:g} s on")
    return np.stack(frames)


def frame_chunks(mp4: bytes, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    """Frames start .. start + count (count None: to the end) of a shard's clip: RGB (T, H, W, C) uint8, a few frames at a time.

    What is done with them next finds them in the processor's cache. Decodes from the key frame before `start` on. ClipError too_short
    where the clip has fewer frames.
    """
    taken, chunk = 0, list[np.ndarray]()
    for frame in _frames(mp4, start):
        chunk.append(frame)
        taken += 1
        if taken == count:
            break
        if len(chunk) == CHUNK:
            yield np.stack(chunk)
            chunk = []
    if taken < (count or 1):
        raise ClipError("too_short", f"frames {start} to {start + (count or 1)} are wanted, the clip has no more than {start + taken}")
    if chunk:
        yield np.stack(chunk)


def _frames(mp4: bytes, start: int) -> Iterator[np.ndarray]:
    """The frames from `start` on."""
    reformatter = VideoReformatter()
    with opened(mp4) as media:
        video = video_stream(media)
        video.codec_context.thread_count = 1  # data loaders decode many clips side by side
        rate = video.average_rate
        if start:
            media.seek(int(start / rate / video.time_base), stream=video)
        for frame in media.decode(video):
            if round(frame.pts * video.time_base * rate) >= start:
                yield reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()


def decode_audio(flac: bytes, start: int = 0, count: int | None = None) -> np.ndarray:
    """Samples start .. start + count (count None: to the end) of a shard's clip: (N,) float32 in [-1, 1].

    Decodes from the FLAC frame before `start` on. ClipError too_short where the clip has fewer samples.
    """
    stop = None if count is None else start + count
    first, waveform = _sound_from(flac, start, stop)
    if not first <= start < first + len(waveform):
        first, waveform = _sound_from(flac, 0, stop)
    if (length := first + len(waveform)) < (stop or start + 1):
        raise ClipError("too_short", f"samples {start} to {stop or start + 1} are wanted, the clip ends after {length}")
    return waveform[start - first : None if stop is None else stop - first]


def _sound_from(flac: bytes, start: int, stop: int | None) -> tuple[int, np.ndarray]:
    """Samples up to `stop` or later and the number of the first, `start` or one before it; others, or none, where FFmpeg got lost."""
    chunks, first, end = [np.empty(0, np.float32)], 0, 0
    with opened(flac) as media:
        audio = media.streams.audio[0]
        if 0 < start < (audio.duration or 0):
            with contextlib.suppress(OSError):  # it takes some noise for frames, and then finds none
                media.seek(start, stream=audio)
        for frame in media.decode(audio):
            if not end:
                first = end = frame.pts  # every FLAC frame says which sample it begins with
            chunks.append(mono(frame))
            end += len(chunks[-1])
            if stop is not None and end >= stop:
                break
    return first, np.concatenate(chunks)


def mux(video: Source, waveform: Any, sample_rate: int, out: str | os.PathLike[str]) -> None:
    """Write `out` with the pictures of `video`, packet for packet as they are, and `waveform` (N,) as its only sound (AAC).

    Sample 0 falls on the file's time 0. `out` appears under its name once it is complete.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.stem}.{os.getpid()}.part{out.suffix}")
    samples = np.asarray(waveform, dtype=np.float32).reshape(-1)
    try:
        with opened(video) as media, av.open(str(temporary), "w") as target:
            stream = video_stream(media)
            copy = target.add_stream_from_template(stream, opaque=True)
            audio = target.add_stream("aac", rate=sample_rate, layout="mono", bit_rate=_AAC_BIT_RATE)
            # Interleaved by time: a muxer given one stream after the other keeps the whole first one in memory.
            streams = _copied(media, stream, copy), encode_audio(audio, samples, "fltp")
            for packet in heapq.merge(*streams, key=lambda packet: packet.dts * packet.time_base):
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


def _painted(
    media: InputContainer,
    start: float,
    end: float | None,
    fps: float,
    short_side: int | None,
    crop: bool,
    losses: Losses | None = None,
) -> Iterator[np.ndarray]:
    paint = Painter(video_stream(media).sample_aspect_ratio, short_side, crop)
    return map(paint, pictures(media, start, end, fps, losses))


def _copied(media: InputContainer, stream: av.VideoStream, copy: av.VideoStream) -> Iterator[av.Packet]:
    zero = round(origin(media) / stream.time_base)
    for packet in _with_decoding_times(media, stream):
        packet.pts = None if packet.pts is None else packet.pts - zero
        packet.dts -= zero
        packet.stream = copy
        yield packet


def _with_decoding_times(media: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Matroska leaves the decoding times out before the first reordered picture: count them back from the next."""
    step = round(1 / (stream.average_rate or 25) / stream.time_base)
    waiting: list[av.Packet] = []
    for packet in media.demux(stream):
        if not packet.size:
            continue  # PyAV's mark of the end, no data of the file
        waiting.append(packet)
        if packet.dts is None:
            continue
        for back, early in enumerate(reversed(waiting)):
            early.dts = packet.dts - back * step
        yield from waiting
        waiting = []
    if waiting:
        raise ClipError("undecodable", f"{media.name}: its last {len(waiting)} video packets have no decoding times; remux the file first")
