"""Sound put out of time and otherwise left alone: losers of preference pairs (the idea of SyncDPO, arXiv 2605.12179; maps of our own).

A map gives, for each frame of the result, where in the original it is heard: a tensor (T,) of fractional frame numbers. It is applied to a
log-mel, where pitch and level stay what they are; a waveform played faster would change its pitch and tell what was done to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("shift", "warp", "swap")
_WIDTH = 4
"""Least width of a warp over how far it moves sound: its speed stays between 0.2 and 1.8."""
_SEAM = 2.5
"""Frames between two neighbours of a map from which on it jumps rather than flows."""


def distortion_sizes(coarse: float, subtle: float, levels: int) -> tuple[float, ...]:
    """Sizes from `coarse` to `subtle` in equal ratios; a single one is coarse."""
    return tuple(coarse * (subtle / coarse) ** (level / max(1, levels - 1)) for level in range(levels))


def shift(frames: int, by: float) -> Tensor:
    """Everything `by` frames later, or earlier where negative; mirrored at the end that runs dry, as silence would give it away."""
    if abs(by) > frames - 1:
        raise ValueError(f"shift by {by:g} of {frames} frames: give less than the clip's length")
    source = torch.arange(frames, dtype=torch.float64) - by
    return (frames - 1) - ((frames - 1) - source.abs()).abs()


def warp(frames: int, by: float, place: float) -> Tensor:
    """The middle of a stretch `by` frames later or earlier, running ahead and falling back around it; monotone, its ends stay.

    The stretch takes half of the clip, or more where it must for so large a `by`; `place` in [0, 1] puts it from the start to the end.
    """
    last = frames - 1
    width = min(last, max(last / 2, _WIDTH * abs(by)))
    if _WIDTH * abs(by) > frames:
        raise ValueError(f"warp by {by:g} of {frames} frames: give at most a quarter of the clip's length")
    times = torch.arange(frames, dtype=torch.float64)
    phase = ((times - place * (last - width)) / width).clamp(0, 1)
    return times - by * (math.pi * phase).sin().square()


def swap(frames: int, length: int, place: float) -> Tensor:
    """Two neighbouring stretches of `length` frames exchanged; `place` in [0, 1] puts them from the start to the end.

    The first and the last frame stay: a seam fades into what is beyond it.
    """
    if not 1 <= length <= frames // 2 - 1:
        raise ValueError(f"swap of {length} of {frames} frames: give 1 or more, and less than half of the clip's length")
    start = 1 + round(place * (frames - 2 * length - 2))
    first, second, end = start, start + length, start + 2 * length
    times = torch.arange(frames, dtype=torch.float64)
    return torch.cat([times[:first], times[second:end], times[first:second], times[end:]])


def time_map(kind: str, frames: int, by: float, sign: int, place: float) -> Tensor:
    """The map of a kind that moves sound by up to `by` frames: later or earlier by its `sign`, around its `place` in [0, 1]."""
    if kind == "shift":
        return shift(frames, sign * by)
    if kind == "warp":
        return warp(frames, sign * by, place)
    if kind == "swap":
        return swap(frames, min(max(1, round(by)), frames // 2 - 1), place)
    raise ValueError(f'distortion "{kind}" is unknown: choose one of {", ".join(KINDS)}')


def heard_through(mel: Tensor, source: Tensor) -> Tensor:
    """Log-mel (..., F, T) of the same sound heard through a map (T,).

    Between frames it is interpolated. Where the map jumps, each side fades over the two frames at the seam into how the other goes on:
    a hard cut, which no true sound has, would be easier to hear than what is out of time.
    """
    moved = _at(mel, source)
    after = (source.diff().abs() > _SEAM).nonzero()[:, 0] + 1
    before = after - 1
    fading, coming = _at(mel, source[before] + 1), _at(mel, source[after] - 1)
    moved[..., before], moved[..., after] = (2 * moved[..., before] + coming) / 3, (fading + 2 * moved[..., after]) / 3
    return moved


def _at(mel: Tensor, places: Tensor) -> Tensor:
    """Frames (..., F, K) at fractional numbers (K,), those outside taken from the ends."""
    places = places.clamp(0, mel.shape[-1] - 1)
    left = places.floor().clamp(max=mel.shape[-1] - 2).long()
    weight = (places - left).to(mel)
    left = left.to(mel.device)
    return mel[..., left].lerp(mel[..., left + 1], weight)
