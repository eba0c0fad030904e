"""Which clips are kept: each rule has a name that the sidecar records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW = 0.05
"""Silence is judged in windows of this many seconds."""
FLOOR_DB = -120.0
"""Level given to digital silence, dBFS."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Thresholds of the keep-or-drop rules."""

    min_seconds: float = 1.0
    """Shorter clips are dropped as `too_short`."""
    silent_db: float = -55.0
    """A clip whose loudest window stays below this (dBFS, RMS) is dropped as `silent`."""
    max_silence: float = 0.95
    """A clip of which more than this share lies below `silent_db` is dropped as `mostly_silent`."""


@dataclass(frozen=True, kw_only=True)
class SoundStats:
    """What the filters look at; kept in the sidecar for every clip, so that a subset can be chosen later without a new pass."""

    loudness: float
    """RMS over the clip, dBFS."""
    peak: float
    """Loudest window's RMS, dBFS."""
    silence: float
    """Share of windows below `silent_db`."""


def measure(waveform: np.ndarray, sample_rate: int, config: FilterConfig) -> SoundStats:
    """Levels of a waveform (N,) in [-1, 1]."""
    size = max(1, round(WINDOW * sample_rate))
    windows = waveform[:len(waveform) // size * size].reshape(-1, size) if len(waveform) >= size else waveform[None]
    levels = decibels(np.sqrt(np.mean(np.square(windows, dtype=np.float64), axis=1)))
    loudness = float(decibels(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))))
    return SoundStats(loudness=loudness, peak=float(levels.max()), silence=float(np.mean(levels < config.silent_db)))


def decibels(amplitude: np.ndarray) -> np.ndarray:
    """dBFS of an amplitude, at least FLOOR_DB."""
    return np.maximum(20 * np.log10(np.maximum(amplitude, 1e-12)), FLOOR_DB)


def verdict(duration: float, has_audio: bool, stats: SoundStats | None, config: FilterConfig) -> str | None:
    """The name of the first rule that drops the clip, or None where it is kept."""
    if duration < config.min_seconds - 1e-6:
        return "too_short"
    if not has_audio or stats is None:
        return "no_audio"
    if stats.peak < config.silent_db:
        return "silent"
    return "mostly_silent" if stats.silence > config.max_silence else None
