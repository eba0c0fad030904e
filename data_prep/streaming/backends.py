"""Decoders of a shard's pictures behind one function: PyAV, which is always there, or decord or torchcodec where installed.

Each takes (mp4, start, count) and gives frames start .. start + count (count None: to the end) a few at a time, RGB (T, H, W, C)
uint8; ClipError where the clip is damaged or has fewer frames. Shards hold no reordered frames, so all give the same frames; benchmarks/
stream_decoding.py tells which is quickest.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np

from data_prep.media import CHUNK, ClipError, frame_chunks

Backend = Callable[[bytes, int, int | None], Iterator[np.ndarray]]
BACKENDS = ("pyav", "decord", "torchcodec")


@cache
def backend(name: str) -> Backend:
    """The decoder of that name; ValueError where there is none or its package is missing."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "pyav":
        return frame_chunks
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # torchcodec raises RuntimeError where FFmpeg's libraries are missing
        problem = f"cannot be loaded ({str(error).splitlines()[0]})"
        raise ValueError(f"backend is {name!r}, which {problem}; install it or choose 'pyav'") from None
    return {"decord": _decord, "torchcodec": _torchcodec}[name]


def _decord(mp4: bytes, start: int, count: int | None) -> Iterator[np.ndarray]:
    import decord

    with _as_clip_errors(decord.DECORDError):
        reader = decord.VideoReader(io.BytesIO(mp4), num_threads=1)
        for part in _parts(len(reader), start, count):
            yield reader.get_batch(list(part)).asnumpy()


def _torchcodec(mp4: bytes, start: int, count: int | None) -> Iterator[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    with _as_clip_errors():
        # The shards' frames are at equal distances: their index tells their time, and no scan of the file is needed.
        reader = VideoDecoder(mp4, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
        for part in _parts(len(reader), start, count):
            yield reader.get_frames_in_range(part.start, part.stop).data.numpy()


def _parts(frames: int, start: int, count: int | None) -> list[range]:
    stop = frames if count is None else start + count
    if stop > frames or start >= stop:
        raise ClipError("too_short", f"frames {start} to {max(stop, start + 1)} are wanted, the clip has no more than {frames}")
    return [range(first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK)]


@contextlib.contextmanager
def _as_clip_errors(*kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except ClipError:
        raise
    except (RuntimeError, *kinds) as error:
        raise ClipError("undecodable", f"the video cannot be decoded ({' '.join(str(error).split())[-200:]})") from None
