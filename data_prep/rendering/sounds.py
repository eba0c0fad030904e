"""Synthesis: short struck sounds and long modulated ones, as float32 arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ATTACK = 0.001
"""Seconds from nothing to the peak of a struck sound: sharp, without the click of a step."""


class Track:
    """The sound track of a clip, to which sounds are added at their times."""

    def __init__(self, samples: int, rate: int):
        self.rate = rate
        self.waveform = np.zeros(samples, np.float32)
        self.clock = np.arange(samples, dtype=np.float32) / rate
        """Seconds (N,) of each sample."""

    def add(self, time: float, sound: np.ndarray, level: float = 1.0):
        """Mix `sound` in from `time` seconds on; what passes the end is cut off."""
        start = round(time * self.rate)
        sound = sound[: max(0, len(self.waveform) - start)]
        self.waveform[start : start + len(sound)] += level * sound

    def span(self, seconds: float) -> np.ndarray:
        """Seconds (n,) of each sample of a sound of that length."""
        return np.arange(round(seconds * self.rate), dtype=np.float32) / self.rate


def envelope(clock: np.ndarray, fall: float) -> np.ndarray:
    """A sharp attack, then a decay by e every `fall` seconds."""
    return np.minimum(clock / ATTACK, 1) * np.exp(-clock / fall)


def partials(clock: np.ndarray, hertz: float, ratios: Sequence[float], levels: Sequence[float], fall: float) -> np.ndarray:
    """Struck partials at `hertz` times `ratios`; higher ones fade faster."""
    sound = np.zeros_like(clock)
    for ratio, level in zip(ratios, levels, strict=True):
        sound += level * np.sin(2 * np.pi * hertz * ratio * clock) * envelope(clock, fall / np.sqrt(ratio))
    return sound / sum(levels)


def sweep(clock: np.ndarray, start: float, end: float, rate: float) -> np.ndarray:
    """A sine whose pitch moves from `start` to `end` Hz, nearing it by e every 1/`rate` seconds."""
    return np.sin(2 * np.pi * (end * clock + (start - end) * (1 - np.exp(-rate * clock)) / rate)).astype(np.float32)


def band_noise(random: np.random.Generator, samples: int, low: float, high: float, rate: int) -> np.ndarray:
    """Gaussian noise between two frequencies in Hz, RMS 1."""
    spectrum = np.fft.rfft(random.standard_normal(samples))
    hertz = np.fft.rfftfreq(samples, 1 / rate)
    # Half an octave of soft edge: a brick wall would ring before the onset.
    edge = (np.clip(hertz / low, 0, 1) ** 4) * np.minimum(1, high / np.maximum(hertz, 1)) ** 4
    noise = np.fft.irfft(spectrum * edge, samples)
    return (noise / np.sqrt(np.mean(np.square(noise)) + 1e-12)).astype(np.float32)


def voice(hertz: np.ndarray, harmonics: Sequence[float], rate: int) -> np.ndarray:
    """A tone of changing pitch (N,) in Hz, with the given levels of harmonics 1, 2, ..."""
    cycles = np.cumsum(hertz, dtype=np.float64) / rate
    phase = 2 * np.pi * (cycles - np.floor(cycles)).astype(np.float32)
    first, doubled = np.sin(phase), 2 * np.cos(phase)
    sound, before, now = np.zeros_like(first), np.zeros_like(first), first
    # sin(k+1) = 2 cos(1) sin(k) - sin(k-1): one sine and cosine serve all harmonics.
    for level in harmonics:
        sound += level * now
        before, now = now, doubled * now - before
    return sound / sum(harmonics)


def glide(level: np.ndarray, rate: int, seconds: float) -> np.ndarray:
    """`level` (N,) with its jumps spread linearly over `seconds`, starting at the jump."""
    width = max(1, round(seconds * rate))
    total = np.cumsum(np.concatenate([np.full(width, level[0]), level]), dtype=np.float64)
    return ((total[width:] - total[:-width]) / width).astype(np.float32)
