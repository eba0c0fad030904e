"""Pictures at a constant rate and mono sound, both taken by timestamp: time 0 of a clip is one moment of the file for eye and ear."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, TypeVar

import av
import numpy as np
import soxr
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from data_prep.transcoding.container import ClipError, Losses, audio_stream, timed, video_stream

_Picture = TypeVar("_Picture")

_TIE = 1e-6
"""Seconds: keeps rounding errors from choosing between two pictures equally far."""
_SCALING = Interpolation.BICUBIC | Interpolation.BITEXACT | Interpolation.ACCURATE_RND
"""The same result on every machine."""
_SCALER_KNOWS = (0, 1, 2, 4, 5, 6, 7, 9)
"""Colour matrices by FFmpeg's numbers: the scaler refuses frames that name another, so those count as unspecified."""
_UNSPECIFIED = 2
_AUDIO_MARGIN = 1
"""Seconds of sound read around a clip for the resampler and for codecs that need a frame to settle; whole, so whole samples at any rate."""
_AUDIO_JITTER = 0.02
"""Seconds a timestamp may stray from the samples counted so far before it is believed: containers round to milliseconds."""

# ITU-R BS.775 weights folded to one channel; names not listed count as a front channel, so odd layouts become their mean.
_DOWNMIX = {"FC": math.sqrt(2.0), "LFE": 0.0, "LFE2": 0.0} | dict.fromkeys(("SL", "SR", "BL", "BR", "BC"), math.sqrt(0.5))
_PLANES = 8
"""PyAV reads past the planes of a frame that has this many."""
_FULL_SCALE = {"u8": 2**7, "s16": 2**15, "s32": 2**31, "s64": 2**63}


def pictures(media: InputContainer, start: float, end: float | None, fps: float, losses: Losses | None = None) -> Iterator[av.VideoFrame]:
    """The frame on screen at start + i / fps for each i, up to `end` or the end of the picture: round(seconds * fps) frames."""
    video = video_stream(media)
    usual = 1 / float(video.average_rate or fps)
    frames = ((time, float(frame.duration * frame.time_base) or usual, frame) for time, frame in timed(media, video, start, losses))
    return at_constant_rate(frames, start, end, fps)


def at_constant_rate(timed: Iterable[tuple[float, float, _Picture]], start: float, end: float | None, fps: float) -> Iterator[_Picture]:
    """Choose from (time, seconds on screen, picture) in order what is to be seen at start + i / fps.

    That is the picture nearest in time; one that comes after a longer pause is never shown more than 1 / fps early.
    """
    wanted = math.inf if end is None else round((end - start) * fps)
    chosen: deque[tuple[_Picture, int]] = deque()  # (picture, until which count); the file may end before their time has passed
    sent, due, shown, since, over = 0, 0, None, -math.inf, start
    for time, seconds, picture in timed:
        if time <= since:
            continue  # broken clocks repeat themselves
        if shown is not None:
            count = math.ceil((time - min(time - since, 2 / fps) / 2 + _TIE - start) * fps)
            if count > due:
                chosen.append((shown, count))
                due = count
        shown, since, over = picture, time, time + seconds
        while chosen and sent < min(wanted, round((over - start) * fps)):
            yield chosen[0][0]
            sent += 1
            if sent == chosen[0][1]:
                chosen.popleft()
        if sent >= wanted:
            return
    chosen.append((shown, -1))
    while shown is not None and sent < min(wanted, round((over - start) * fps)):
        yield chosen[0][0]
        sent += 1
        if sent == chosen[0][1]:
            chosen.popleft()


class Painter:
    """Turns decoded frames into upright pictures of one even size, that of the first frame.

    A picture is (3 H / 2, W) uint8, yuv420p of BT.601 in limited range: H rows of luma, then both colour planes.
    Most sources are yuv420p, so nothing is lost or computed on a way through RGB.
    """

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
        if frame.colorspace not in _SCALER_KNOWS:
            frame.colorspace = _UNSPECIFIED
        target = {"format": "yuv420p", "dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
        picture = self._reformatter.reformat(frame, width, height, interpolation=_SCALING, threads=1, **target).to_ndarray()
        if not quarters and not self._crop:
            return picture
        upright = [np.rot90(plane, quarters) for plane in planes(picture)]
        return packed(_centre_square(upright) if self._crop else upright)


def planes(picture: np.ndarray) -> list[np.ndarray]:
    """Luma (H, W) and both colour planes (H / 2, W / 2) of a painted picture."""
    rows, width = picture.shape
    height = rows * 2 // 3
    return [picture[:height], *picture[height:].reshape(2, height // 2, width // 2)]


def packed(parts: list[np.ndarray]) -> np.ndarray:
    """The opposite of `planes`."""
    return np.concatenate([part.ravel() for part in parts]).reshape(-1, parts[0].shape[1])


def _centre_square(parts: list[np.ndarray]) -> list[np.ndarray]:
    # Measured in colour pixels: half a one would shift the colours against the luma.
    height, width = parts[1].shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return [part[top * scale :, left * scale :][: side * scale, : side * scale] for part, scale in zip(parts, (2, 1, 1), strict=True)]


def fit(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """(width, height) with the given short side (None keeps it) and the aspect kept, both even as yuv420p needs."""
    scale = 1.0 if short_side is None else short_side / min(width, height)
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def sound(media: InputContainer, start: float, samples: int, rate: int, losses: Losses | None = None) -> np.ndarray:
    """Mono sound (samples,) float32 at `rate`, silence where the file has none.

    Sample n is taken at start + n / rate, to half a sample of the source.
    """
    audio = audio_stream(media)
    if audio is None:
        raise ClipError("no_audio", f"{media.name}: no audio stream")
    begin, end = start - _AUDIO_MARGIN, start + samples / rate + _AUDIO_MARGIN
    chunks = ((time, frame.sample_rate, mono(frame)) for time, frame in timed(media, audio, max(0.0, begin), losses))
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
