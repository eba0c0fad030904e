"""Media files: opening them, what their headers say, and their frames with times on one timeline."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import fsspec
from av.container import InputContainer
from av.stream import Disposition

Source = str | os.PathLike[str] | bytes

_SEEK_MARGINS = (0.0, 2.0, 10.0, math.inf)
"""Seconds to seek ahead of the wanted time, tried in turn: some formats land late, on the key frame after it."""


class ClipError(RuntimeError):
    """A clip cannot be made or read; `reason` is the short name that goes into the sidecar.

    Reasons: missing, unreadable, undecodable, no_video, no_audio, too_short.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What a file's headers say; times in seconds from the file's own beginning."""

    duration: float
    """End of the picture."""
    fps: float
    """Average frame rate."""
    width: int
    """Pixels as stored, before rotation."""
    height: int
    """Pixels as stored, before rotation."""
    video_start: float
    """Time of the first picture."""
    audio_start: float | None
    """Time of the first sound; None without an audio stream."""
    sample_rate: int | None
    """Hz; None without an audio stream."""
    channels: int
    """0 without an audio stream."""

    @property
    def av_offset(self) -> float | None:
        """Seconds by which the sound begins after the picture."""
        return None if self.audio_start is None else self.audio_start - self.video_start


@contextlib.contextmanager
def opened(source: Source) -> Iterator[InputContainer]:
    """The media file at a path or URL, or in memory; what goes wrong while it is open becomes a ClipError."""
    name = "bytes in memory" if isinstance(source, bytes) else os.fspath(source)
    try:
        with contextlib.ExitStack() as stack:
            file: Any = name
            if isinstance(source, bytes):
                file = io.BytesIO(source)
            elif "://" in name:
                file = stack.enter_context(fsspec.open(name, "rb"))
            # Tags in a foreign encoding are no reason to lose the clip.
            yield stack.enter_context(av.open(file, metadata_errors="replace"))
    except FileNotFoundError as error:
        raise ClipError("missing", f"{name}: no such file") from error
    except OSError as error:
        raise ClipError("unreadable", f"{name}: {error}") from error
    except av.FFmpegError as error:
        raise ClipError("undecodable", f"{name}: {error.strerror}") from error


def video_stream(media: InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture; ClipError no_video where there is none."""
    for stream in media.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            return stream
    raise ClipError("no_video", f"{media.name}: no video stream")


def audio_stream(media: InputContainer) -> av.AudioStream | None:
    """The first audio stream that can be decoded."""
    return next((stream for stream in media.streams.audio if stream.codec_context is not None), None)


def origin(media: InputContainer) -> Fraction:
    """Timestamp of the file's time 0: where the first of its streams begins, as players count.

    Negative timestamps are what a codec needs to settle, not content.
    """
    streams = [*media.streams.video, *media.streams.audio]
    starts = [stream.start_time * stream.time_base for stream in streams if stream.start_time is not None]
    return max(Fraction(0), min(starts, default=Fraction(0)))


def _start(stream: av.VideoStream | av.AudioStream, zero: Fraction) -> float:
    return max(0.0, float((stream.start_time or 0) * stream.time_base - zero))


def probe(source: Source) -> MediaInfo:
    """Read a file's headers without decoding it; ClipError where it is missing, no media or without video."""
    with opened(source) as media:
        video, audio, zero = video_stream(media), audio_stream(media), origin(media)
        return MediaInfo(
            duration=_duration(media, video, zero),
            fps=float(video.average_rate or video.guessed_rate or 0),
            width=video.width,
            height=video.height,
            video_start=_start(video, zero),
            audio_start=None if audio is None else _start(audio, zero),
            sample_rate=None if audio is None else audio.rate,
            channels=0 if audio is None else audio.codec_context.channels,
        )


def _duration(media: InputContainer, video: av.VideoStream, zero: Fraction) -> float:
    if video.duration:
        return float(((video.start_time or 0) + video.duration) * video.time_base - zero)
    if media.duration:
        return float(Fraction((media.start_time or 0) + media.duration, av.time_base) - zero)
    # Browsers record WebM without any duration: the packets know.
    ends = (packet.pts + (packet.duration or 0) for packet in media.demux(video) if packet.pts is not None)
    return float(max(ends, default=0) * video.time_base - zero)


def _decoded(media: InputContainer, stream: Any) -> Iterator[Any]:
    started = False
    for packet in media.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if started:
                raise
            continue  # after a seek the first packets may be halves
        for frame in frames:
            started = True
            yield frame


def timed(media: InputContainer, stream: Any, start: float) -> Iterator[tuple[float, Any]]:
    """(time, frame) in order of presentation, beginning at or before `start` where the stream has something there."""
    zero = origin(media)
    first = None
    for margin in _SEEK_MARGINS:
        target = max(0.0, start - margin)
        if target > 0 or margin > 0:
            media.seek(max(int((Fraction(target) + zero) / stream.time_base), stream.start_time or 0), stream=stream)
        frames = _decoded(media, stream)
        first = next(frames, None)
        time = 0.0 if first is None or first.pts is None else first.time - float(zero)
        if target == 0 or (first is not None and time <= start):
            break
    if first is None:
        raise ClipError("undecodable", f"{media.name}: nothing in its {stream.type} stream can be decoded")
    yield time, first
    step = 1 / float(stream.average_rate or 25) if stream.type == "video" else 0.0
    for frame in frames:
        time = time + step if frame.pts is None else frame.time - float(zero)
        yield time, frame
