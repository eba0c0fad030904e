"""Media files: opening them, what their headers say, and their frames with times on one timeline."""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition

from data_prep.remote.remote_file import RemoteFile
from data_prep.remote.urls import redacted

Source = str | os.PathLike[str] | bytes | BinaryIO
"""A path, an fsspec URL, the bytes themselves, or an open file."""

_SEEK_MARGINS = (0.0, 2.0, 10.0, math.inf)
"""Seconds to seek ahead of the wanted time, tried in turn: some formats land late, on the key frame after it."""


class ClipError(RuntimeError):
    """A clip cannot be made or read; `reason` is the short name that goes into the sidecar.

    Reasons: missing, unreadable, network, undecodable, no_video, no_audio, too_short, too_large, memory.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class Losses:
    """Where a stream could not be decoded, or only with patches over its holes."""

    spans: dict[float, float] = field(default_factory=dict)
    """Time on the file's timeline -> seconds."""

    def note(self, item: av.Packet | av.VideoFrame | av.AudioFrame, stream: Any, zero: Fraction) -> None:
        """Count the time of a packet or frame as lost."""
        time = item.dts if item.pts is None else item.pts
        if time is not None:
            usual = 1 / stream.average_rate if stream.type == "video" and stream.average_rate else 0
            self.spans[float(time * item.time_base - zero)] = float(item.duration * item.time_base or usual)

    def note_end(self, last: int, stream: Any, zero: Fraction) -> None:
        """Count as lost what the file's index promises after the `last` timestamp read: it was cut off in transfer."""
        entries = stream.index_entries
        if len(entries) and (promised := entries[len(entries) - 1].timestamp) > last:
            self.spans[float(last * stream.time_base - zero)] = float((promised - last) * stream.time_base)

    def share(self, start: float, seconds: float, end: float | None) -> float:
        """Share that is lost of a clip of `seconds` from `start` on, which ends early where the losses go on up to `end`."""
        limit = math.inf if end is None else end
        spans = [(time, min(time + length, limit)) for time, length in self.spans.items()]
        over = max([start + seconds, *(until for _, until in spans)])
        return min(1.0, sum(max(0.0, until - max(time, start)) for time, until in spans) / (over - start))


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


def name_of(source: Source) -> str:
    """What to call a source in a message."""
    if isinstance(source, str | os.PathLike):
        return redacted(os.fspath(source))
    return "bytes in memory" if isinstance(source, bytes) else str(source)


@contextlib.contextmanager
def opened(source: Source) -> Iterator[InputContainer]:
    """The media file of a source; what goes wrong while it is open becomes a ClipError."""
    with _clip_errors(source), readable(source) as file:
        if not isinstance(file, str):
            file.seek(0)
        elif ":" in file:
            file = f"file:{file}"  # FFmpeg would take what precedes the colon for a protocol
        # Tags in a foreign encoding are no reason to lose the clip.
        with av.open(file, metadata_errors="replace") as media:
            yield media


@contextlib.contextmanager
def readable(source: Source) -> Iterator[str | BinaryIO]:
    """A source as FFmpeg takes it: the path of a regular file, or an open file, which keeps what it has read of a remote one."""
    with _clip_errors(source):
        if isinstance(source, bytes):
            yield io.BytesIO(source)
        elif not isinstance(source, str | os.PathLike):
            yield source
        elif "://" in (name := os.fspath(source)):
            yield RemoteFile(name)
        elif "\0" in name or not stat.S_ISREG(os.stat(name).st_mode):
            raise ClipError("unreadable", f"{name!r}: not a regular file")  # opening a pipe would wait for its writer
        else:
            yield name


@contextlib.contextmanager
def _clip_errors(source: Source) -> Iterator[None]:
    name = name_of(source)
    try:
        yield
    except FileNotFoundError as error:
        raise ClipError("missing", f"{name}: no such file") from error
    except MemoryError as error:
        raise ClipError("memory", f"{name}: takes more memory than its process may have") from error
    except OSError as error:
        raise ClipError(_fault_of(source, error), f"{name}: {error}") from error
    except av.FFmpegError as error:
        raise ClipError("undecodable", f"{name}: {error.strerror}") from error


def _fault_of(source: Source, error: OSError) -> str:
    """Which part an OSError accuses. FFmpeg raises them for damaged contents too, and bytes in memory have been read already."""
    if isinstance(source, bytes):
        return "undecodable"
    # A store that did not answer after all tries may answer tomorrow.
    return "network" if "://" in name_of(source) and not isinstance(error, PermissionError) else "unreadable"


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


def _decoded(media: InputContainer, stream: Any, losses: Losses | None) -> Iterator[Any]:
    """Frames in order; a packet that cannot be decoded is noted in `losses` and left out, without them it is an error."""
    zero, started, last = origin(media), False, 0
    for packet in media.demux(stream):
        last = max(last, packet.pts or 0, packet.dts or 0)
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except av.FFmpegError:
            if losses is not None:
                losses.note(packet, stream, zero)
            elif started:  # after a seek the first packets may be halves
                raise
            continue
        for frame in frames:
            started = True
            if losses is not None and frame.is_corrupt:
                losses.note(frame, stream, zero)
            yield frame
    if losses is not None:
        losses.note_end(last, stream, zero)


def timed(media: InputContainer, stream: Any, start: float, losses: Losses | None = None) -> Iterator[tuple[float, Any]]:
    """(time, frame) in order of presentation, beginning at or before `start` where the stream has something there.

    What cannot be decoded raises av.FFmpegError, or is noted in `losses` where they are given.
    """
    zero = origin(media)
    first = None
    for margin in _SEEK_MARGINS:
        target = max(0.0, start - margin)
        if target > 0 or margin > 0:
            media.seek(max(int((Fraction(target) + zero) / stream.time_base), stream.start_time or 0), stream=stream)
        frames = _decoded(media, stream, losses)
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
