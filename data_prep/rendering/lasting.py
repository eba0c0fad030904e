"""Kinds that sound as long as they move: engine, siren, rain, car."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_prep.rendering.acts import Act
from data_prep.rendering.canvas import Canvas, colour, white
from data_prep.rendering.config import RenderConfig
from data_prep.rendering.sounds import Track, band_noise, glide, voice


class Engine(Act):
    """A wheel turns; now and then the throttle opens: pitch and loudness follow the spin."""

    kind, noun, verb, most = "engine", "{colour} engine", "revs up", 3
    idle, fall = 0.35, 0.3

    def throttle(self, clock: np.ndarray) -> np.ndarray:
        """1 at each time, falling off until the next, 0 at idle."""
        since = clock[:, None] - self.times[None].astype(np.float32)
        return np.where(since >= 0, np.exp(-np.maximum(since, 0) / self.fall), 0.0).max(axis=1).astype(np.float32)

    def draw(self, canvas: Canvas):
        throttle = self.throttle(canvas.clock)
        throttle[canvas.frame_of(self.times)] = 1.0
        turn = 2 * np.pi * np.cumsum(self.idle + 2.4 * throttle) / canvas.config.fps
        canvas.box(*self.at(0, 0.4), 0.9 * self.unit, 0.12 * self.unit, white(0.3))
        canvas.disc(*self.at(-0.08, 0), 0.38 * self.unit, self.ink(0.85, 0.55))
        canvas.disc(*self.at(-0.08, 0), 0.29 * self.unit, white(0.08))
        hub = self.at(-0.08, 0)
        for spoke in range(3):
            angle = turn + spoke * 2 * np.pi / 3
            rim = self.at(-0.08 + 0.3 * np.cos(angle), 0.3 * np.sin(angle))
            canvas.line(hub, rim, 0.08 * self.unit, white(0.85))
        canvas.disc(*hub, 0.08 * self.unit, self.ink())
        canvas.disc(*self.at(0.42, -0.3 - 0.08 * throttle), (0.04 + 0.13 * throttle) * self.unit, white(0.9), 0.15 + 0.85 * throttle)
        canvas.glow(*self.at(0.4, -0.3), 0.2 * self.unit, colour(0.08, 0.6, 0.9), canvas.pulse(self.times, 0.06))

    def play(self, track: Track):
        throttle = glide(self.throttle(track.clock), track.rate, 0.008)
        hertz = self.pitch(45, 120) * (1 + 2 * throttle)
        bright = 0.35 + 0.5 * self.tint
        growl = voice(hertz, [bright**k for k in range(12)], track.rate)
        track.add(0.0, growl * (0.12 + throttle) * self.level)


@dataclass(kw_only=True)
class Siren(Act):
    """Two lamps light in turn, each with its own tone."""

    kind, noun, verb, rhythm = "siren", "{colour} siren", "switches on", True

    end: float = 0.0
    """Seconds at which it falls silent."""

    def prepare(self, random: np.random.Generator, config: RenderConfig):
        """Choose when it starts, stops, and its rhythm."""
        start, beat = random.uniform(0.15, 0.4 * config.seconds), random.uniform(0.38, 0.7)
        self.end = min(config.seconds, start + beat * random.integers(3, 7))
        self.times = np.arange(start, self.end - 0.1, beat)

    def lamp(self, clock: np.ndarray) -> np.ndarray:
        """-1 before and after, else 0 or 1: the lamp that is lit."""
        count = np.searchsorted(self.times, clock, side="right")
        return np.where((count > 0) & (clock < self.end), (count - 1) % 2, -1)

    def draw(self, canvas: Canvas):
        # A lamp is on in the frame in which its tone starts: ask at the end of the exposure.
        lit = self.lamp((np.arange(len(canvas.clock)) + 1) / canvas.config.fps)
        fresh = 0.6 + 0.4 * canvas.pulse(self.times, 0.08)
        canvas.box(*self.at(0, 0.26), 0.95 * self.unit, 0.26 * self.unit, self.ink(0.6, 0.5))
        for side, hue in ((0, 0.0), (1, 0.62)):
            x, y = self.at(0.5 * side - 0.25, -0.02)
            canvas.box(x, y, 0.36 * self.unit, 0.3 * self.unit, colour(hue, 0.8, 0.25))
            canvas.box(x, y, 0.36 * self.unit, 0.3 * self.unit, colour(hue, 0.5, 1.0), lit == side)
            canvas.glow(x, y - 0.1 * self.unit, 0.32 * self.unit, colour(hue, 0.7, 1.0), (lit == side) * fresh)

    def play(self, track: Track):
        lamp, low = self.lamp(track.clock), self.pitch(480, 900)
        hertz = np.where(lamp == 1, low * (1.25 + 0.35 * self.tint), low)
        on = (lamp >= 0).astype(np.float32)
        # A gap before each switch gives the new tone an attack of its own.
        for time in self.times:
            on[round((time - 0.015) * track.rate) : round(time * track.rate)] = 0
        track.add(0.0, 0.5 * self.level * glide(on, track.rate, 0.005) * voice(hertz, (1, 0, 0.35, 0, 0.2), track.rate))

    def events(self):
        ends = [*self.times[1:], self.end]
        return [self.event(start, end=end) for start, end in zip(self.times, ends, strict=True)]

    def phrase(self) -> str:
        return f"{self.subject()} sounds with its lights flashing in turn"


@dataclass(kw_only=True)
class Rain(Act):
    """Showers fall from a cloud: the more drops are seen, the louder the noise."""

    kind, noun, verb, most = "rain", "cloud", "rains", 3

    ends: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Seconds (n,) at which the showers end."""
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Their density (n,), 0.4 to 1."""

    def prepare(self, random: np.random.Generator, config: RenderConfig):
        """Choose how long and how dense the showers are."""
        following = np.append(self.times[1:], config.seconds + 1)
        self.ends = np.minimum(self.times + random.uniform(0.25, 0.9, len(self.times)), following - 0.15)
        self.weights = random.uniform(0.4, 1, len(self.times))

    def density(self, clock: np.ndarray) -> np.ndarray:
        """0 to 1 at each time: a drizzle, and the showers."""
        falling = (clock[:, None] >= self.times) & (clock[:, None] < self.ends)
        return 0.04 + (falling * self.weights).sum(axis=1)

    def draw(self, canvas: Canvas):
        density = self.density((np.arange(len(canvas.clock)) + 1) / canvas.config.fps).astype(np.float32)
        random = self.noise()
        # Columns of two alike and rows in runs of three make streaks out of single specks.
        tile = random.uniform(size=(2 * canvas.config.size // 3, 3 * canvas.config.size)).repeat(3, axis=0).astype(np.float32)
        x, y = self.at(0, 0.12)
        canvas.specks(x, y, 0.9 * self.unit, 0.7 * self.unit, tile, 1.7 * canvas.clock, 0.4 * density, self.ink(0.35, 0.95))
        grey = 0.45 + 0.3 * density.max() * canvas.pulse(self.times, 0.1)
        for u, v, radius in ((-0.27, -0.3, 0.17), (0.0, -0.36, 0.22), (0.27, -0.3, 0.17)):
            canvas.disc(*self.at(u, v), radius * self.unit, white(0.45))
            canvas.disc(*self.at(u, v), radius * self.unit, white(0.95), grey - 0.45)

    def play(self, track: Track):
        level = glide(self.density(track.clock).astype(np.float32), track.rate, 0.006)
        hiss = band_noise(self.noise(), len(level), self.pitch(600, 2500), 3500 + 4000 * self.tint, track.rate)
        track.add(0.0, 0.22 * self.level * level * hiss)

    def events(self):
        return [self.event(t, end=end, density=w) for t, end, w in zip(self.times, self.ends, self.weights, strict=True)]

    def phrase(self) -> str:
        return f"rain falls in {len(self.times)} shower{'s' * (len(self.times) > 1)}"


@dataclass(kw_only=True)
class Car(Act):
    """A car drives past: loudest in the middle of the picture, its pitch falling as it passes."""

    kind, noun, verb, rhythm = "car", "{colour} car", "drives past", True

    speed: float = 1.0
    """Picture widths per second, negative to the left."""

    def prepare(self, random: np.random.Generator, config: RenderConfig):
        """Choose when it passes the middle, how fast and which way."""
        self.times = np.array([random.uniform(0.25, 0.75) * config.seconds])
        self.speed = random.uniform(0.45, 1.1) * random.choice((-1, 1))

    def draw(self, canvas: Canvas):
        x = 0.5 + self.speed * (canvas.clock - self.times[0])
        size, side = 0.6 * self.unit, np.sign(self.speed)
        canvas.box(0.5, self.y + 0.34 * size, 1.2, 0.1 * size, white(0.25))
        canvas.box(x, self.y, size, 0.3 * size, self.ink())
        canvas.trapezoid(x - 0.05 * side * size, self.y - 0.24 * size, 0.4 * size, 0.62 * size, 0.24 * size, self.ink(0.4, 0.6))
        for wheel in (-0.28, 0.28):
            canvas.disc(x + wheel * size, self.y + 0.2 * size, 0.13 * size, white(0.75))
            canvas.disc(x + wheel * size, self.y + 0.2 * size, 0.06 * size, white(0.05))
        canvas.glow(x + 0.62 * side * size, self.y, 0.2 * size, colour(0.14, 0.4, 0.9), 1.0)

    def play(self, track: Track):
        beyond = abs(self.speed) * (track.clock - self.times[0]) / 0.18
        nearness = 1 / (1 + np.square(beyond))
        hertz = self.pitch(80, 190) * (1 - 0.18 * beyond / np.sqrt(1 + np.square(beyond)))
        motor = voice(hertz, [0.8**k for k in range(8)], track.rate)
        road = band_noise(self.noise(), len(motor), 300, 900 + 1500 * self.tint, track.rate)
        track.add(0.0, self.level * nearness * (0.5 * motor + 0.12 * road))

    def events(self):
        reach = 0.5 / abs(self.speed)
        return [self.event(t, 0.5, onset=False, start=t - reach, end=t + reach) for t in self.times]

    def phrase(self) -> str:
        return f"{self.subject()} drives past"
