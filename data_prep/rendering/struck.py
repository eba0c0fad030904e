"""Kinds that sound when two things meet: ball, drum, clap, bell, keys, metronome."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_prep.rendering.acts import Act, swing
from data_prep.rendering.canvas import Canvas, colour, white
from data_prep.rendering.config import RenderConfig
from data_prep.rendering.sounds import Track, band_noise, envelope, partials, sweep


class Ball(Act):
    """A ball hits the floor, which lights up: a falling thump, slap by colour."""

    kind, noun, verb = "ball", "{colour} ball", "bounces"

    def height(self, clock: np.ndarray) -> np.ndarray:
        """Height above the floor (T,), 0 at the impacts, 1 where it is dropped from and caught."""
        first, last = self.times[0], self.times[-1]
        falling = 1 - np.square(((clock - first + 0.5) / 0.5).clip(0, 1))
        rising = 1 - np.square((1 - (clock - last) / 0.5).clip(0, 1))
        height = np.where(clock < first, falling, rising)
        for start, end in zip(self.times[:-1], self.times[1:], strict=True):
            along = (clock - start) / (end - start)
            height = np.where((along >= 0) & (along < 1), 4 * along * (1 - along) * min(1.0, 0.3 + 0.7 * (end - start)), height)
        return height

    def draw(self, canvas: Canvas):
        height = self.height(canvas.clock)
        height[canvas.frame_of(self.times)] = 0.0
        hit = canvas.pulse(self.times)
        radius = 0.17 * self.unit
        squash = 1 - 0.35 * canvas.pulse(self.times, 0.015)
        floor_x, floor_y = self.at(0, 0.42)
        canvas.box(floor_x, floor_y + 0.03 * self.unit, self.unit, 0.06 * self.unit, white(0.35))
        canvas.box(floor_x, floor_y + 0.03 * self.unit, self.unit, 0.08 * self.unit, white(1.0), hit)
        canvas.ellipse(self.x, floor_y - radius * squash - height * 0.5 * self.unit, radius / squash, radius * squash, self.ink())
        canvas.glow(floor_x, floor_y, 0.25 * self.unit, white(0.7), hit)

    def play(self, track: Track):
        random, hertz = self.noise(), self.pitch(80, 260)
        clock = track.span(0.3)
        for time in self.times:
            thump = sweep(clock, 1.7 * hertz, hertz, 40) * envelope(clock, 0.06)
            slap = 0.3 * band_noise(random, len(clock), 900, 2500, track.rate) * envelope(clock, 0.01)
            track.add(time, thump + self.tint * slap, self.level)


class Drum(Act):
    """A stick hits a drum, whose head flashes: a body tone by size, more rattle towards violet."""

    kind, noun, verb = "drum", "{colour} drum", "is hit"

    def draw(self, canvas: Canvas):
        reach, hit = swing(canvas, self.times), canvas.pulse(self.times)
        canvas.trapezoid(*self.at(-0.08, 0.3), 0.72 * self.unit, 0.6 * self.unit, 0.34 * self.unit, self.ink())
        for head, opacity in ((white(0.6), 1.0), (white(1.0), hit)):
            canvas.ellipse(*self.at(-0.08, 0.12), 0.37 * self.unit, 0.1 * self.unit, head, opacity)
        grip = self.at(0.45, -0.3)
        angle = 2.3 + 1.3 * (1 - reach)
        tip = grip[0] + 0.56 * self.unit * np.cos(angle), grip[1] + 0.56 * self.unit * np.sin(angle)
        canvas.line(grip, tip, 0.06 * self.unit, colour(0.1, 0.5, 0.8))
        canvas.disc(*tip, 0.055 * self.unit, white(0.9))
        canvas.glow(*self.at(0.05, 0.1), 0.3 * self.unit, white(0.8), hit)

    def play(self, track: Track):
        random, hertz = self.noise(), self.pitch(160, 380)
        clock = track.span(0.3)
        for time in self.times:
            body = partials(clock, hertz, (1, 1.59, 2.14), (1, 0.6, 0.4), 0.06)
            rattle = 0.3 * band_noise(random, len(clock), 1800, 6500, track.rate) * envelope(clock, 0.05)
            track.add(time, (1.3 - self.tint) * body + (0.3 + self.tint) * rattle, self.level)


class Clap(Act):
    """Two hands meet: a very short burst of noise, its centre by size, its width by the colour of the sleeves."""

    kind, noun, verb = "clap", "pair of hands in {colour} sleeves", "claps"

    def draw(self, canvas: Canvas):
        apart = 0.09 + 0.27 * (1 - swing(canvas, self.times))
        skin = colour(0.07, 0.45, 0.75)
        for side in (-1, 1):
            x, y = self.at(side * apart, 0)
            canvas.line((x, y), (x + side * 0.1 * self.unit, y + 0.5 * self.unit), 0.14 * self.unit, self.ink(0.85, 0.6))
            canvas.ellipse(x, y - 0.05 * self.unit, 0.09 * self.unit, 0.26 * self.unit, skin)
        hit = canvas.pulse(self.times)
        canvas.sparks(*self.at(0, -0.12), 0.36 * self.unit, 8, 0.035 * self.unit, white(1.0), hit)
        canvas.glow(*self.at(0, -0.1), 0.22 * self.unit, white(0.8), hit)

    def play(self, track: Track):
        random, centre = self.noise(), self.pitch(750, 2200)
        clock = track.span(0.12)
        for time in self.times:
            noise = band_noise(random, len(clock), centre / 1.1, centre * (1.1 + 0.9 * self.tint), track.rate)
            track.add(time, 0.5 * noise * envelope(clock, 0.018), self.level)


class Bell(Act):
    """A hammer strikes a bell: inharmonic partials that ring, spread by colour."""

    kind, noun, verb = "bell", "{colour} bell", "is struck"

    def draw(self, canvas: Canvas):
        hit = canvas.pulse(self.times, 0.04)
        reach, sway = swing(canvas, self.times), 0.04 * canvas.pulse(self.times, 0.12) * np.sin(2 * np.pi * 6 * canvas.clock)
        for ink, opacity in ((self.ink(0.7, 0.6), 1.0), (self.ink(0.25, 1.0), hit)):
            canvas.disc(*self.at(-0.12 + sway, -0.16), 0.17 * self.unit, ink, opacity)
            canvas.trapezoid(*self.at(-0.12 + sway, 0.1), 0.34 * self.unit, 0.62 * self.unit, 0.5 * self.unit, ink, opacity)
        canvas.disc(*self.at(-0.12 - sway, 0.4), 0.06 * self.unit, white(0.5))
        head = self.at(0.17 + 0.28 * (1 - reach), 0.08 - 0.12 * (1 - reach))
        canvas.line(head, self.at(0.5, -0.4), 0.05 * self.unit, white(0.45))
        canvas.disc(*head, 0.09 * self.unit, white(0.85))
        canvas.glow(*self.at(0.1, 0.08), 0.22 * self.unit, white(0.8), hit)

    def play(self, track: Track):
        clock, hertz = track.span(0.5), self.pitch(550, 1500)
        ring = partials(clock, hertz, (1, 2 + 0.8 * self.tint, 3 + 1.1 * self.tint), (1, 0.7, 0.45), 0.1)
        for time in self.times:
            track.add(time, ring, 1.2 * self.level)


@dataclass(kw_only=True)
class Keys(Act):
    """Keys of a keyboard light up and go down: the pitch is the place of the key."""

    kind, noun, verb = "keys", "keyboard with {colour} lights", "is played"
    steps = (0, 2, 4, 7, 9)

    pressed: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    """Key (n,) of each event, from the left."""

    def prepare(self, random: np.random.Generator, config: RenderConfig):
        """Choose the keys."""
        self.pressed = random.integers(0, len(self.steps), len(self.times))

    def draw(self, canvas: Canvas):
        canvas.box(*self.at(0, 0.08), self.unit, 0.6 * self.unit, white(0.12))
        for key in range(len(self.steps)):
            lit = canvas.pulse(self.times[self.pressed == key], 0.06)
            x, y = self.at((key - 2) * 0.19, 0.08 + 0.06 * lit)
            canvas.box(x, y, 0.15 * self.unit, 0.5 * self.unit, white(0.4))
            canvas.box(x, y, 0.15 * self.unit, 0.5 * self.unit, self.ink(0.7, 1.0), lit)
            canvas.glow(x, y - 0.25 * self.unit, 0.16 * self.unit, self.ink(0.5, 0.9), lit)

    def play(self, track: Track):
        clock, base = track.span(0.4), self.pitch(280, 560)
        for time, key in zip(self.times, self.pressed, strict=True):
            hertz = base * 2 ** (self.steps[key] / 12)
            track.add(time, partials(clock, hertz, (1, 2, 4), (1, 0.2 + 0.3 * self.tint, 0.1 + 0.6 * self.tint), 0.09), 1.2 * self.level)

    def events(self):
        return [self.event(t, *self.at((k - 2) * 0.19, 0.08), key=k) for t, k in zip(self.times, self.pressed, strict=True)]


@dataclass(kw_only=True)
class Metronome(Act):
    """A pendulum ticks at the ends of its swing, where its bob flashes: a wood block."""

    kind, noun, verb, rhythm = "metronome", "metronome with a {colour} bob", "ticks", True

    beat: float = 0.6
    """Seconds between ticks."""

    def prepare(self, random: np.random.Generator, config: RenderConfig):
        """Choose tempo and phase."""
        self.beat = random.uniform(0.55, 1.1)
        self.times = np.arange(random.uniform(0.1, self.beat), config.seconds - 0.04, self.beat)

    def draw(self, canvas: Canvas):
        side = np.cos(np.pi * (canvas.clock - self.times[0]) / self.beat)
        angle = 0.75 * side
        pivot, hit = self.at(0, 0.34), canvas.pulse(self.times)
        canvas.trapezoid(*self.at(0, 0.14), 0.2 * self.unit, 0.62 * self.unit, 0.62 * self.unit, colour(0.07, 0.7, 0.42))
        reach = 0.72 * self.unit
        end = pivot[0] + reach * np.sin(angle), pivot[1] - reach * np.cos(angle)
        canvas.line(pivot, end, 0.045 * self.unit, white(0.7))
        canvas.disc(*end, 0.1 * self.unit, self.ink(0.8, 0.8))
        canvas.disc(*end, 0.11 * self.unit, white(1.0), hit)
        canvas.glow(*end, 0.22 * self.unit, white(0.9), hit)

    def play(self, track: Track):
        clock, hertz = track.span(0.08), self.pitch(1500, 3200)
        tick = partials(clock, hertz, (1, 1.4 + 0.5 * self.tint), (1, 0.6), 0.009)
        for time in self.times:
            track.add(time, tick, 1.2 * self.level)
