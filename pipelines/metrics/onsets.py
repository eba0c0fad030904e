"""When sounds begin: onsets of a log-mel spectrogram, and their agreement with known event times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_prep.audio import MelSpec, mel_spec

__all__ = ["OnsetConfig", "detect_onsets", "match_onsets", "onset_f1", "onset_strength"]


@dataclass(frozen=True, kw_only=True)
class OnsetConfig:
    """How an onset is told from the ordinary restlessness of a sound (our choice; calibrated on synthetic events)."""

    lag: int = 2
    """Frames between the two spectra compared: one is shorter than an attack, which then splits over several frames."""
    dynamic_range: float = 60.0
    """dB below the clip's loudest band under which all counts as silence, so that an inaudible hiss has no onsets."""
    window: float = 0.5
    """Seconds around a frame whose median strength is the local level."""
    ratio: float = 1.5
    """An onset's strength exceeds the local level by this factor ..."""
    margin: float = 1.0
    """... and by this many dB (mean over bands), which keeps stationary noise quiet."""
    lead: float = 0.3
    """Window lengths by which a rise precedes the event: in decibels even the window's tail hears it (measured, 0.3 for all front ends)."""
    gap: float = 0.08
    """Least seconds between two onsets; the stronger one stays."""

    def __post_init__(self):
        if self.lag < 1:
            raise ValueError(f"OnsetConfig.lag is {self.lag}: choose at least 1 frame")
        for name in ("dynamic_range", "window", "gap", "ratio"):
            if getattr(self, name) <= 0:
                raise ValueError(f"OnsetConfig.{name} is {getattr(self, name)}: it must be positive")


def onset_strength(log_mel: np.ndarray, spec: str | MelSpec, config: OnsetConfig | None = None) -> np.ndarray:
    """Rise in dB, mean over bands, of each frame (T,) of a log-mel (F, T) over the frame `lag` before; 0 for the first ones."""
    spec, config = mel_spec(spec), config or OnsetConfig()
    decibels = np.asarray(log_mel, dtype=np.float64) * (20.0 if spec.log == "log10" else 20.0 / np.log(10.0))
    if decibels.ndim != 2 or not np.isfinite(decibels).all():
        raise ValueError(f"onset_strength takes one finite log-mel (F, T), got shape {decibels.shape}")
    decibels = np.maximum(decibels, decibels.max(initial=-np.inf) - config.dynamic_range)
    padded = np.pad(decibels, ((1, 1), (0, 0)), mode="edge")
    # Against the loudest neighbouring band (SuperFlux, Boeck and Widmer 2013): a gliding pitch is no series of onsets.
    loudest = np.maximum(np.maximum(padded[:-2], padded[2:]), decibels)
    rise = np.maximum(decibels[:, config.lag :] - loudest[:, : -config.lag], 0.0).mean(axis=0)
    return np.concatenate([np.zeros(decibels.shape[1] - len(rise)), rise])


def detect_onsets(log_mel: np.ndarray, spec: str | MelSpec, config: OnsetConfig | None = None) -> np.ndarray:
    """Onset times in seconds (K,), ascending, of one log-mel (F, T) made by front end `spec`."""
    spec, config = mel_spec(spec), config or OnsetConfig()
    strength = onset_strength(log_mel, spec, config)
    # Frames whose window reaches past an end of the clip hear its mirror image: the kink at the mirror sounds like a click.
    border = math.ceil((spec.win - spec.hop) / 2 / spec.hop)
    first = border + config.lag
    strength = strength[first : len(strength) - border]
    if not strength.size:
        return np.zeros(0)
    frame = spec.hop / spec.sample_rate
    level = _local_median(strength, round(config.window / frame / 2))
    before, after = np.pad(strength, (1, 0))[:-1], np.pad(strength, (0, 1))[1:]
    # Only crests count: the flank of a slow attack may last longer than `gap`.
    candidates = np.flatnonzero((strength > config.ratio * level + config.margin) & (strength > before) & (strength >= after))
    kept: list[int] = []
    for peak in candidates[np.argsort(-strength[candidates], kind="stable")]:
        if all(abs(peak - other) * frame >= config.gap for other in kept):
            kept.append(int(peak))
    # The rise lies midway between the two frames compared; a frame's centre is half a hop after its start.
    return (np.sort(np.array(kept, dtype=np.float64)) + first + 0.5 - config.lag / 2) * frame + config.lead * spec.win / spec.sample_rate


def match_onsets(predicted: np.ndarray, true: np.ndarray, tolerance: float = 0.1) -> int:
    """Size of the largest one-to-one matching between two sets of times that lie within `tolerance` seconds of each other."""
    predicted, true = np.sort(np.asarray(predicted, dtype=np.float64)), np.sort(np.asarray(true, dtype=np.float64))
    # Walking both in order and pairing the earliest that fit is optimal, as all tolerances are equal.
    i = j = matches = 0
    while i < len(predicted) and j < len(true):
        if abs(predicted[i] - true[j]) <= tolerance:
            i, j, matches = i + 1, j + 1, matches + 1
        elif predicted[i] < true[j]:
            i += 1
        else:
            j += 1
    return matches


def onset_f1(predicted: np.ndarray, true: np.ndarray, tolerance: float = 0.1) -> float:
    """F1 in [0, 1] of predicted onset times against the true ones, matched one to one; 1 where both are empty."""
    total = len(predicted) + len(true)
    return 2.0 * match_onsets(predicted, true, tolerance) / total if total else 1.0


def _local_median(values: np.ndarray, half: int) -> np.ndarray:
    padded = np.pad(values, half, mode="symmetric")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
