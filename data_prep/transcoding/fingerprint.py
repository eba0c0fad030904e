"""Fingerprints of clips: 32 bytes of what is seen and 32 of what is heard, nearly equal for copies of one recording.

All arithmetic is on whole numbers, so equal pictures and samples give equal fingerprints on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

BYTES = 64
"""Length of a fingerprint: pictures first, then sound."""

_SHORT_SIDE = 64
"""Pixels that a picture is reduced to at least, for measuring."""
_FLICKER = 3
"""Levels by which codecs change the pixels of a still picture."""
_ROWS, _COLUMNS = 8, 9
_MOMENTS = 4
_LEVEL = 16
"""Steps of a thumbnail for one grey level."""

_SLICES = 33
_EDGES = np.geomspace(200, 3600, 10)
"""Hz: nine bands that sound at any rate from 8 kHz up has."""
_TONES = 4
"""Frequencies probed in each band."""
_WINDOW = 0.032
"""Seconds."""
_MOST_WINDOWS = 32
"""Windows per slice: bounds the work for long clips."""
_SINE_SCALE = 2**11
_ENERGY_SHIFT = 2.0**-10


def reduced(luma: np.ndarray) -> np.ndarray:
    """Every n-th pixel of (H, W), as many as motion and thumbnails need."""
    step = max(1, min(luma.shape) // _SHORT_SIDE)
    return luma[::step, ::step]


def mean_change(before: np.ndarray, after: np.ndarray) -> float:
    """Mean change of brightness between two luma pictures (H, W) uint8 of limited range, of 1; changes by a few levels do not count."""
    change = np.abs(after.astype(np.int16) - before)
    return int(change[change > _FLICKER].sum()) / (219 * change.size)


def thumbnail(luma: np.ndarray) -> np.ndarray:
    """Mean levels of the 8 x 9 cells of a luma picture (H, W), 16 steps to a level."""
    height, width = luma.shape
    rows, columns = np.arange(_ROWS + 1) * height // _ROWS, np.arange(_COLUMNS + 1) * width // _COLUMNS
    sums = np.add.reduceat(np.add.reduceat(luma, rows[:-1], axis=0, dtype=np.int32), columns[:-1], axis=1)
    return _LEVEL * sums // (np.diff(rows)[:, None] * np.diff(columns))


def fingerprint(thumbnails: Sequence[np.ndarray], samples: np.ndarray, sample_rate: int) -> bytes:
    """The fingerprint of a clip from one thumbnail for each frame and its sound (N,) int16.

    Pictures: at four moments, whether each cell is brighter than its left neighbour, by a level at least: noise sets no bit.
    Sound: in each slice of time, whether the step in energy from band to band has grown since the slice before.
    """
    count = len(thumbnails)
    moments = [thumbnails[(2 * moment + 1) * count // (2 * _MOMENTS)] for moment in range(_MOMENTS)]
    brighter = np.diff(np.stack(moments), axis=2) >= _LEVEL
    grown = np.diff(np.diff(_band_energies(samples, sample_rate), axis=1), axis=0) > 0
    return np.packbits(brighter).tobytes() + np.packbits(grown).tobytes()


def similarity(one: bytes, other: bytes) -> float:
    """Share of equal bits of two fingerprints, of the pictures or of the sound, whichever is less.

    Clips of one fixed camera look alike and two silences sound alike: only what agrees in both is the same recording.
    """
    half = BYTES // 2
    shares = (_equal_bits(one[part], other[part]) for part in (slice(half), slice(half, None)))
    return min(shares) / (8 * half)


def _equal_bits(one: bytes, other: bytes) -> int:
    return 8 * len(one) - (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def _band_energies(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Energies (slices, bands) int64 of windows spread evenly over the sound."""
    length = round(_WINDOW * sample_rate)
    samples = np.pad(samples, (0, max(0, length - len(samples))))
    count = _SLICES * min(_MOST_WINDOWS, max(1, len(samples) // (_SLICES * length)))
    begins = np.arange(count) * (len(samples) - length) // (count - 1)
    windows = np.lib.stride_tricks.sliding_window_view(samples, length)[begins]
    # In floating point, but of whole numbers below 2**53: exact in whatever order a machine adds them.
    parts = np.floor((windows.astype(np.float64) @ _tones(length, sample_rate)) * _ENERGY_SHIFT).astype(np.int64)
    return np.square(parts).reshape(_SLICES, -1, len(_EDGES) - 1, 2 * _TONES).sum(axis=(1, 3))


@functools.cache
def _tones(length: int, sample_rate: int) -> np.ndarray:
    """Windowed sines and cosines (length, bands * 2 * tones) as whole numbers."""
    steps = (np.arange(_TONES) + 0.5) / _TONES
    frequencies = (_EDGES[:-1, None] + np.diff(_EDGES)[:, None] * steps).reshape(-1, 1)
    time, turn = (np.arange(length) + 0.5) / sample_rate, np.array([0, np.pi / 2])
    phases = 2 * np.pi * frequencies[:, :, None] * time + turn[:, None]
    window = np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2
    return np.rint(_SINE_SCALE * window * np.sin(phases)).reshape(-1, length).T
