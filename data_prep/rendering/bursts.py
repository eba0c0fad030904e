"""Kinds that sound by themselves: firework, bird, frog, water drop, camera."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_prep.rendering.acts import Act, swing
from data_prep.rendering.canvas import Canvas, colour, white
from data_prep.rendering.config import RenderConfig
from data_prep.rendering.sounds import Track, band_noise, envelope, sweep


def age(canvas: Canvas, time: float) -> np.ndarray:
    """Seconds (T,) since the frame of `time` began, negative before."""
    return (np.arange(len(canvas.clock)) - canvas.frame_of(time)).astype(np.float32) / canvas.config.fps


@dataclass(kw_only=True)
class Firework(Act):
    """A rocket climbs and bursts into sparks: a boom by size, crackle by colour."""

    kind, noun, verb, most = "firework", "{colour} firework", "bursts", 3

    spots: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    """Where each bursts (n, 2), in the drawing's coordinates."""

    def prepare(self, random: np.random.Generator, config: RenderConfig):
        """Choose where they burst."""
        self.spots = random.uniform((-0.22, -0.22), (0.22, 0.05), (len(self.times), 2))

    def draw(self, canvas: Canvas):
        for time, (u, v) in zip(self.times, self.spots, strict=True):
            since = age(canvas, time)
            climb = (1 + since / 0.5).clip(0, 1)
            x, y = self.at(u, 0.5 + (v - 0.5) * np.sqrt(climb))
            canvas.line((x, y), (x, y + 0.1 * self.unit), 0.05 * self.unit, colour(0.1, 0.4, 0.8), (since < 0) & (climb > 0))
            burst = np.where(since >= 0, np.exp2(-since / 0.1), 0.0)
            spread = 0.42 * self.unit * (1 - np.exp(-(since.clip(min=0) + 0.04) / 0.12))
            x, y = self.at(u, v)
            canvas.glow(x, y, 0.3 * self.unit, self.ink(0.4, 1.0), np.where(since >= 0, np.exp2(-np.maximum(since, 0) / 0.04), 0.0))
            canvas.sparks(x, y, spread, 9, 0.055 * self.unit, self.ink(0.7, 1.0), burst)
            canvas.sparks(x, y, 0.55 * spread, 6, 0.045 * self.unit, white(1.0), burst)

    def play(self, track: Track):
        random, clock = self.noise(), track.span(0.5)
        for time in self.times:
            boom = 0.4 * band_noise(random, len(clock), 40, self.pitch(120, 500), track.rate) * envelope(clock, 0.09)
            crackle = band_noise(random, len(clock), 2500, 6000, track.rate) * (random.uniform(size=len(clock)) < 0.02)
            track.add(time, boom + (0.2 + 0.8 * self.tint) * crackle * envelope(clock, 0.12), self.level)

    def events(self):
        return [self.event(time, *self.at(*spot)) for time, spot in zip(self.times, self.spots, strict=True)]


class Bird(Act):
    """A bird opens its beak and flaps: a rising chirp, its reach by colour."""

    kind, noun, verb = "bird", "{colour} bird", "chirps"

    def draw(self, canvas: Canvas):
        gape, hit = swing(canvas, self.times, before=0.03, after=0.22), canvas.pulse(self.times)
        canvas.box(*self.at(0, 0.4), self.unit, 0.05 * self.unit, colour(0.08, 0.6, 0.35))
        canvas.line(self.at(-0.28, 0.1), self.at(-0.48, 0.24), 0.09 * self.unit, self.ink(0.85, 0.5))
        canvas.ellipse(*self.at(-0.12, 0.12), 0.28 * self.unit, 0.22 * self.unit, self.ink())
        canvas.disc(*self.at(0.1, -0.16), 0.17 * self.unit, self.ink())
        canvas.disc(*self.at(0.13, -0.2), 0.045 * self.unit, white(0.0))
        canvas.line(self.at(-0.1, 0.1), self.at(-0.34, 0.12 - 0.45 * gape), 0.11 * self.unit, self.ink(0.6, 0.95))
        beak = colour(0.13, 0.9, 1.0)
        for side in (-1, 1):
            canvas.line(self.at(0.24, -0.13), self.at(0.42, -0.13 + side * 0.17 * gape), 0.06 * self.unit, beak)
        for time in self.times:
            since = age(canvas, time)
            wave = (0.1 + 1.2 * since.clip(0, 0.2)) * self.unit
            canvas.ring(*self.at(0.3, -0.13), wave, 0.04 * self.unit, white(1.0), (since >= 0) * (1 - since / 0.2))
        canvas.glow(*self.at(0.32, -0.13), 0.2 * self.unit, white(0.8), hit)

    def play(self, track: Track):
        clock, hertz = track.span(0.16), self.pitch(1800, 3300)
        shape = np.minimum(clock / 0.002, 1) * (1 - clock / clock[-1]) ** 0.7
        chirp = shape * sweep(clock, hertz, hertz * (1.3 + 0.7 * self.tint), 12)
        for time in self.times:
            track.add(time, chirp, 0.8 * self.level)


class Frog(Act):
    """A frog opens its mouth and its throat swells: a croak, a slow train of pulses."""

    kind, noun, verb = "frog", "{colour}-eyed frog", "croaks"

    def draw(self, canvas: Canvas):
        open_, hit = swing(canvas, self.times, before=0.03, after=0.3), canvas.pulse(self.times)
        skin = colour(0.3, 0.75, 0.5)
        canvas.ellipse(*self.at(0, 0.12), 0.46 * self.unit, 0.26 * self.unit, skin)
        for side in (-1, 1):
            canvas.disc(*self.at(side * 0.22, -0.16), 0.13 * self.unit, skin)
            canvas.disc(*self.at(side * 0.22, -0.18), 0.07 * self.unit, self.ink(0.85, 0.9))
        canvas.ellipse(*self.at(0, 0.06), 0.26 * self.unit, (0.02 + 0.13 * open_) * self.unit, colour(0.97, 0.75, 0.35))
        canvas.ellipse(*self.at(0, 0.34), 0.26 * self.unit, (0.03 + 0.17 * open_) * self.unit, colour(0.2, 0.35, 0.9), open_)
        canvas.glow(*self.at(0, 0.1), 0.3 * self.unit, white(0.7), hit)

    def play(self, track: Track):
        clock, hertz = track.span(0.22), self.pitch(350, 900)
        pulses = (0.5 + 0.5 * np.cos(2 * np.pi * (45 + 50 * self.tint) * clock)) ** 3
        croak = np.sin(2 * np.pi * hertz * clock) * pulses * np.minimum(clock / 0.001, 1) * (1 - clock / clock[-1])
        for time in self.times:
            track.add(time, croak, 1.3 * self.level)


class Drop(Act):
    """A drop falls from a tap into a pool and rings spread: a short rising tone."""

    kind, noun, verb = "drop", "{colour} drop", "falls into the water"

    def draw(self, canvas: Canvas):
        canvas.box(*self.at(-0.12, -0.44), 0.36 * self.unit, 0.1 * self.unit, white(0.55))
        canvas.box(*self.at(0, -0.38), 0.1 * self.unit, 0.12 * self.unit, white(0.55))
        pool = self.ink(0.8, 0.4)
        canvas.ellipse(*self.at(0, 0.3), 0.5 * self.unit, 0.17 * self.unit, pool)
        for time in self.times:
            since = age(canvas, time)
            fall = np.square((1 + since / 0.32).clip(0, 1))
            x, y = self.at(0, -0.3 + 0.58 * fall)
            canvas.ellipse(x, y, 0.06 * self.unit, 0.09 * self.unit, self.ink(0.35, 1.0), (since < 0) & (fall > 0))
            ripple, fading = (0.08 + 1.3 * since.clip(0, 0.32)) * self.unit, (since >= 0) * (1 - since / 0.3)
            for wide, ink in ((1.0, white(1.0)), (0.7, pool)):
                canvas.ellipse(*self.at(0, 0.3), wide * ripple, 0.36 * wide * ripple, ink, fading)
            canvas.sparks(*self.at(0, 0.22), 0.8 * ripple, 6, 0.03 * self.unit, white(1.0), fading)
        canvas.glow(*self.at(0, 0.25), 0.25 * self.unit, white(0.7), canvas.pulse(self.times))

    def play(self, track: Track):
        clock, hertz = track.span(0.25), self.pitch(380, 900)
        bloop = sweep(clock, hertz, hertz * (1.8 + 1.4 * self.tint), 25) * envelope(clock, 0.04)
        for time in self.times:
            track.add(time, bloop, self.level)


class Camera(Act):
    """A camera takes a picture with its flash bulb: a high click and the whirr of its motor."""

    kind, noun, verb, most = "camera", "camera with a {colour} lens", "flashes", 3

    def draw(self, canvas: Canvas):
        hit = canvas.pulse(self.times, 0.045)
        canvas.box(*self.at(-0.22, -0.24), 0.3 * self.unit, 0.16 * self.unit, white(0.5))
        canvas.box(*self.at(0, 0.1), 0.9 * self.unit, 0.54 * self.unit, white(0.28))
        canvas.disc(*self.at(0.06, 0.1), 0.22 * self.unit, self.ink())
        canvas.disc(*self.at(0.06, 0.1), (0.13 - 0.09 * hit) * self.unit, white(0.05))
        canvas.box(*self.at(-0.22, -0.24), 0.3 * self.unit, 0.16 * self.unit, white(1.0), hit)
        canvas.glow(*self.at(-0.2, -0.22), 0.42 * self.unit, white(1.2), hit)

    def play(self, track: Track):
        random, clock = self.noise(), track.span(0.25)
        buzz = np.sign(np.sin(2 * np.pi * (140 + 160 * self.tint) * clock)) * (clock < 0.18) * np.minimum(clock / 0.05, 1)
        for time in self.times:
            click = 0.5 * band_noise(random, len(clock), self.pitch(3000, 5500), 7500, track.rate) * envelope(clock, 0.012)
            track.add(time, click + 0.06 * buzz, self.level)
