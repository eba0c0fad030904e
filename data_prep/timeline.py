"""Pictures at a constant rate and mono sound, both taken by timestamp: time 0 of a clip is one moment of the file for eye and ear."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice, repeat
from typing import Any, TypeVar

import av
import numpy as np
import soxr
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter

from data_prep.container import ClipError, audio_stream, timed, video_stream

_Picture = TypeVar("_Picture")

_TIE = 1e-6
"""Seconds: keeps rounding errors from choosing between two pictures equally far."""
_SCALING = Interpolation.BICUBIC | Interpolation.BITEXACT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
"""The same result on every machine; accurate rounding without full chroma makes pictures darker by two levels."""
_AUDIO_MARGIN = 1
"""Seconds of sound read around a clip for the resampler and for codecs that need a frame to settle; whole, so whole samples at any rate."""
_AUDIO_JITTER = 0.02
"""Seconds a timestamp may stray from the samples counted so far before it is believed: containers round to milliseconds."""

# ITU-R BS.775 weights folded to one channel; names not listed count as a front channel, so odd layouts become their mean.
_DOWNMIX = {"FC": math.sqrt(2.0), "LFE": 0.0, "LFE2": 0.0} | dict.fromkeys(("SL", "SR", "BL", "BR", "BC"), math.sqrt(0.5))
_PLANES = 8
"""PyAV reads past the planes of a frame that has this many."""
_FULL_SCALE = {"u8": 2**7, "s16": 2**15, "s32": 2**31, "s64": 2**63}


def pictures(media: InputContainer, start: float, end: float | None, fps: float) -> Iterator[av.VideoFrame]:
    """The frame on screen at start + i / fps for each i, up to `end` or the end of the picture: round(seconds * fps) frames."""
    video = video_stream(media)
    usual = 1 / float(video.average_rate or fps)
    frames = ((time, float(frame.duration * frame.time_base) or usual, frame) for time, frame in timed(media, video, start))
    return at_constant_rate(frames, start, end, fps)


def at_constant_rate(
    timed: Iterable[tuple[float, float, _Picture]], start: float, end: float | None, fps: float
) -> Iterator[_Picture]:
    """Choose from (time, seconds on screen, picture) in order what is to be seen at start + i / fps.

    That is the picture nearest in time; one that comes after a longer pause is never shown more than 1 / fps early.
    """
    wanted = math.inf if end is None else round((end - start) * fps)
    ready: deque[_Picture] = deque()  # chosen, but the file may end before their time has passed
    sent, shown, since, over = 0, None, -math.inf, start
    for time, seconds, picture in timed:
        if time <= since:
            continue  # broken clocks repeat themselves
        if shown is not None:
            until = time - min(time - since, 2 / fps) / 2 + _TIE
            while start + (sent + len(ready)) / fps < until:
                ready.append(shown)
        shown, since, over = picture, time, time + seconds
        while ready and sent < min(wanted, round((over - start) * fps)):
            yield ready.popleft()
            sent += 1
        if sent >= wanted:
            return
    left = min(wanted, round((over - start) * fps)) - sent
    if shown is not None and left > 0:
        yield from islice(chain(ready, repeat(shown)), left)


class Painter:
    """Turns decoded frames into upright RGB pictures (H, W, 3) uint8 of one even size, that of the first frame."""

    def __init__(self, aspect: Fraction | None = None, short_side: int | None = None, crop: bool = False):
        self._aspect, self._short_side, self._crop = aspect or Fraction(1), short_side, crop
        self._reformatter, self._size = VideoReformatter(), None
        self._last: tuple[Any, np.ndarray] | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """The picture of a frame; asked for the same frame again, the same array."""
        if self._last is None or self._last[0] is not frame:
            self._last = frame, self._paint(frame)
        return self._last[1]

    def _paint(self, frame: av.VideoFrame) -> np.ndarray:
        quarters = round(frame.rotation / 90) % 4
        if self._size is None:
            width, height = round(frame.width * self._aspect), frame.height
            self._size = fit(*((height, width) if quarters % 2 else (width, height)), self._short_side)
        width, height = self._size[::-1] if quarters % 2 else self._size
        scaled = self._reformatter.reformat(frame, width, height, "rgb24", interpolation=_SCALING, threads=1)
        upright = np.rot90(scaled.to_ndarray(), quarters)
        return np.ascontiguousarray(centre_square(upright) if self._crop else upright)


def fit(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """(width, height) with the given short side (None keeps it) and the aspect kept, both even as yuv420p needs."""
    scale = 1.0 if short_side is None else short_side / min(width, height)
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def centre_square(picture: np.ndarray) -> np.ndarray:
    """The middle square of a picture (H, W, C)."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]


def sound(media: InputContainer, start: float, samples: int, rate: int) -> np.ndarray:
    """Mono sound (samples,) float32 at `rate`, silence where the file has none.

    Sample n is taken at start + n / rate, to half a sample of the source.
    """
    audio = audio_stream(media)
    if audio is None:
        raise ClipError("no_audio", f"{media.name}: no audio stream")
    begin, end = start - _AUDIO_MARGIN, start + samples / rate + _AUDIO_MARGIN
    chunks = ((time, frame.sample_rate, mono(frame)) for time, frame in timed(media, audio, max(0.0, begin)))
    placed, source_rate = place(chunks, begin, end)
    if source_rate != rate:
        placed = soxr.resample(placed, source_rate, rate)
    clip = placed[_AUDIO_MARGIN * rate :][:samples]
    return np.pad(clip, (0, samples - len(clip)))


def place(chunks: Iterable[tuple[float, int, np.ndarray]], begin: float, end: float) -> tuple[np.ndarray, int]:
    """Lay chunks of (time, rate, samples) on one line from `begin` to `end` seconds; returns it with its sample rate."""
    line, line_rate, position = np.zeros(0, np.float32), 0, 0
    for time, rate, samples in chunks:
        wanted = round((time - begin) * rate)
        if not line_rate:
            line, line_rate, position = np.zeros(round((end - begin) * rate), np.float32), rate, wanted
        if rate != line_rate:
            raise ClipError("undecodable", f"the sample rate changes from {line_rate} to {rate} Hz at {time:.3f} s")
        if abs(wanted - position) > _AUDIO_JITTER * rate:
            position = wanted
        if position >= len(line):
            break
        kept = samples[max(0, -position) :][: len(line) - max(0, position)]
        line[max(0, position) :][: len(kept)] = kept
        position += len(samples)
    return line, line_rate


def mono(frame: av.AudioFrame) -> np.ndarray:
    """One channel (N,) float32 in [-1, 1] from a decoded frame of any layout and sample format."""
    if frame.format.is_planar and frame.layout.nb_channels >= _PLANES:
        frame = av.AudioResampler(format=frame.format.packed).resample(frame)[0]
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    kind = frame.format.name.removesuffix("p")
    scale = _FULL_SCALE.get(kind, 1)
    weights = np.array([_DOWNMIX.get(channel.name, 1.0) for channel in frame.layout.channels])
    if not weights.sum():
        weights = np.ones(len(weights))
    mixed = (weights / weights.sum()) @ samples.astype(np.float64)
    return ((mixed - (scale if kind == "u8" else 0)) / scale).astype(np.float32)
