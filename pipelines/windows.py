"""Long videos in windows: where they lie, and how their sounds become one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """First frames of windows that cover `length` frames, neighbours overlapping by at least `overlap`; the last ends with the video."""
    if length <= window:
        return [0]
    count = math.ceil((length - overlap) / (window - overlap))
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def cross_fade(pieces: list[tuple[int, np.ndarray]], samples: int) -> np.ndarray:
    """Lay waveforms at their first samples into one of `samples`, fading linearly where they overlap."""
    total, weight = np.zeros(samples, np.float32), np.zeros(samples, np.float32)
    for (start, waveform), (before, after) in zip(pieces, _neighbours(pieces), strict=True):
        ramp = np.ones(len(waveform), np.float32)
        if before:
            ramp[:before] = np.linspace(0, 1, before + 2, dtype=np.float32)[1:-1]
        if after:
            ramp[-after:] = np.minimum(ramp[-after:], np.linspace(1, 0, after + 2, dtype=np.float32)[1:-1])
        size = max(0, min(len(waveform), samples - start))
        total[start:start + size] += (waveform * ramp)[:size]
        weight[start:start + size] += ramp[:size]
    return total / np.maximum(weight, 1e-6)


def _neighbours(pieces: list[tuple[int, np.ndarray]]) -> Iterator[tuple[int, int]]:
    """Overlap in samples of each piece with the one before and the one after."""
    overlaps = [max(0, start + len(waveform) - following) for (start, waveform), (following, _) in zip(pieces, pieces[1:], strict=False)]
    yield from zip([0, *overlaps], [*overlaps, 0], strict=True)
