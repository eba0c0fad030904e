"""A clip before it is encoded: who plays, where and when, and what is seen and heard of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.rendering.acts import Act, spaced_times
from data_prep.rendering.bursts import Bird, Camera, Drop, Firework, Frog
from data_prep.rendering.canvas import Canvas
from data_prep.rendering.config import RenderConfig
from data_prep.rendering.lasting import Car, Engine, Rain, Siren
from data_prep.rendering.sounds import Track
from data_prep.rendering.struck import Ball, Bell, Clap, Drum, Keys, Metronome

KINDS: dict[str, type[Act]] = {
    act.kind: act for act in (Ball, Drum, Clap, Bell, Keys, Metronome, Firework, Bird, Frog, Drop, Camera, Engine, Siren, Rain, Car)
}
SPLITS = ("train", "heldout")

_PLACES = {
    1: ((0.5, 0.5, 0.9),),
    2: ((0.26, 0.5, 0.5), (0.74, 0.5, 0.5)),
    3: ((0.25, 0.28, 0.46), (0.75, 0.28, 0.46), (0.5, 0.74, 0.46)),
}
"""Centre and scale of each act, by how many share the picture."""
_LEAD, _TAIL = 0.12, 0.25
"""Seconds kept free of impulsive events at the start and the end, so that each is seen coming and heard out."""


def kind_names(config: RenderConfig) -> list[str]:
    """The kinds that clips of these settings draw from."""
    if unknown := [name for name in config.kinds if name not in KINDS]:
        raise ValueError(f"RenderConfig.kinds has {', '.join(unknown)}: choose from {', '.join(KINDS)}")
    return list(config.kinds or KINDS)


@dataclass
class Scene:
    """Clip `index` of a seed and split: all it shows follows from these three and the settings."""

    config: RenderConfig
    acts: list[Act]
    seed: np.random.SeedSequence

    @classmethod
    def cast(cls, config: RenderConfig, seed: int, split: str, index: int) -> Scene:
        """Choose the acts; nothing is drawn yet."""
        sequence = np.random.SeedSequence((seed, SPLITS.index(split), index))
        random = np.random.default_rng(sequence)
        kinds = [KINDS[name] for name in kind_names(config)]
        count = int(random.choice((2, 3), p=(0.75, 0.25))) if random.uniform() < config.multi_share else 1
        chosen = [kinds[i] for i in random.permutation(len(kinds))[:count]]
        places = random.permutation(np.array(_PLACES[len(chosen)]))
        acts = [
            _act(kind, random, config, place, times)
            for kind, place, times in zip(chosen, places, _times(chosen, random, config), strict=True)
        ]
        # A car crosses the whole picture: behind the others, it hides none of their events.
        return cls(config, sorted(acts, key=lambda act: act.kind != "car"), sequence)

    def draw(self) -> np.ndarray:
        """Frames uint8 (T, H, W, 3)."""
        canvas = Canvas(self.config, np.random.default_rng((*self.seed.entropy, 1)))
        for act in self.acts:
            act.draw(canvas)
        return canvas.to_uint8()

    def play(self) -> np.ndarray:
        """Waveform float32 (N,), peak below 1."""
        track = Track(self.config.samples, self.config.sample_rate)
        for act in self.acts:
            act.play(track)
        random = np.random.default_rng((*self.seed.entropy, 2))
        track.waveform += 10 ** (self.config.noise_floor / 20) * random.standard_normal(self.config.samples, np.float32)
        return track.waveform * min(1.0, 0.9 / float(np.abs(track.waveform).max()))

    @property
    def kinds(self) -> list[str]:
        """Names of the kinds, in the order of drawing."""
        return [act.kind for act in self.acts]

    @property
    def events(self) -> list[dict[str, Any]]:
        """All acts' events, in the order of time."""
        return sorted((event for act in self.acts for event in act.events()), key=lambda event: event["time"])

    @property
    def caption(self) -> str:
        """A plain sentence."""
        sentence = " and ".join(act.phrase() for act in self.acts)
        return sentence[0].upper() + sentence[1:] + "."


def _times(kinds: list[type[Act]], random: np.random.Generator, config: RenderConfig) -> list[np.ndarray]:
    """Onsets for each kind, drawn together and then dealt, so that the gap holds between kinds as well."""
    scale = config.density * config.seconds / 3.84 / len(kinds)
    limits = [0 if kind.rhythm else max(1, round(kind.most * scale)) for kind in kinds]
    # At least half the limit: a clip with one event is mute in most of its segments, and mute segments are all alike.
    counts = [int(random.integers(max(1, limit // 2), limit + 1)) if limit else 0 for limit in limits]
    room = int((config.seconds - _LEAD - _TAIL) / config.min_gap) + 1
    while sum(counts) > room:
        counts[counts.index(max(counts))] -= 1
    times = spaced_times(random, sum(counts), _LEAD, config.seconds - _TAIL, config.min_gap)
    owners = random.permutation(np.repeat(np.arange(len(kinds)), counts))
    return [times[owners == i] for i in range(len(kinds))]


def _act(kind: type[Act], random: np.random.Generator, config: RenderConfig, place: np.ndarray, times: np.ndarray) -> Act:
    x, y, scale = place.tolist()
    act = kind(
        x=x + random.uniform(-0.05, 0.05), y=y + random.uniform(-0.04, 0.04), scale=scale * random.uniform(0.92, 1.05),
        size=random.uniform(), tint=random.uniform(), times=times, seed=int(random.integers(2**31)),
    )
    act.prepare(random, config)
    return act
