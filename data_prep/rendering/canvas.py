"""Anti-aliased shapes on all frames of a clip at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data_prep.rendering.config import RenderConfig

Curve = float | np.ndarray
"""A value for the whole clip, or one per frame (T,)."""


def colour(hue: float, saturation: float = 0.8, value: float = 0.8) -> np.ndarray:
    """RGB (3,) in [0, 1] of a hue in [0, 1)."""
    wheel = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return (value * (1 - saturation + saturation * wheel.clip(0, 1))).astype(np.float32)


def white(value: float = 1.0) -> np.ndarray:
    """RGB (3,) of a grey."""
    return np.full(3, value, np.float32)


@dataclass
class _Patch:
    """The part of the clip that a shape can touch, and the place of its pixels relative to the shape."""

    index: tuple
    dx: np.ndarray  # (t, 1, w)
    dy: np.ndarray  # (t, h, 1)
    opacity: np.ndarray  # (t, 1, 1)
    when: np.ndarray

    def curve(self, value: Curve) -> np.ndarray:
        """`value` for the patch's frames, ready to broadcast."""
        value = np.asarray(value, np.float32)
        return value[self.when, None, None] if value.ndim else value


class Canvas:
    """Frames (3, T, H, W) in [0, 1]; x to the right and y down, both 0 to 1 over the picture before the camera moves."""

    def __init__(self, config: RenderConfig, random: np.random.Generator):
        self.config = config
        self.clock = ((np.arange(config.frames) + 0.5) / config.fps).astype(np.float32)
        """Seconds (T,) at the middle of each frame's exposure."""
        grid = ((np.arange(config.size) + 0.5) / config.size).astype(np.float32)
        self.columns, self.rows = (grid + self._drift(random)[:, None] for _ in range(2))
        self.pixels = self._background(random)

    def _drift(self, random: np.random.Generator) -> np.ndarray:
        """Camera offset (T,): a slow pan, a sway and a small shake, all smooth so that none looks like an event."""
        reach, phase = self.config.camera, random.uniform(0, 2 * np.pi, 2)
        pan = random.uniform(-0.5, 0.5) * (2 * self.clock / self.config.seconds - 1)
        sway = 0.4 * np.sin(2 * np.pi * random.uniform(0.1, 0.4) * self.clock + phase[0])
        shake = 0.1 * np.sin(2 * np.pi * random.uniform(1.5, 3.0) * self.clock + phase[1])
        return (reach * (pan + sway + shake)).astype(np.float32)

    def _background(self, random: np.random.Generator) -> np.ndarray:
        """A dim gradient with a faint plaid, moving with the camera."""
        limit = self.config.brightness
        level, slope, turn = limit * random.uniform(0.2, 0.7), limit * random.uniform(0, 0.3), random.uniform(0, 2 * np.pi)
        waves, phases = random.uniform(6, 25, 2).tolist(), random.uniform(0, 2 * np.pi, 2).tolist()
        across = slope * math.cos(turn) * (self.columns - 0.5)
        down = slope * math.sin(turn) * (self.rows - 0.5) + level
        plaid = limit * random.uniform(0, 0.15) * np.sin(waves[0] * self.rows + phases[0])
        value = plaid[:, :, None] * np.sin(waves[1] * self.columns + phases[1])[:, None, :]
        value += down[:, :, None]
        value += across[:, None, :]
        tint = colour(random.uniform(), random.uniform(0, 0.6), 1.0)
        return tint[:, None, None, None] * value

    def frame_of(self, times: np.ndarray) -> np.ndarray:
        """Index of the frame that is exposed at each time."""
        return np.floor(np.asarray(times) * self.config.fps + 1e-6).astype(int)

    def pulse(self, times: np.ndarray, half_life: float = 0.03) -> np.ndarray:
        """Curve (T,): 1 in the frame of each time, halving every `half_life` seconds after it, nothing before."""
        age = np.arange(self.config.frames)[:, None] - self.frame_of(times)[None]
        fading = np.exp2(-np.maximum(age, 0) / (half_life * self.config.fps))
        return np.where(age >= 0, fading, 0.0).max(axis=1, initial=0.0).astype(np.float32)

    def to_uint8(self) -> np.ndarray:
        """The frames as uint8 (T, H, W, 3)."""
        frames = np.empty((*self.pixels.shape[1:], 3), np.uint8)
        for channel, plane in enumerate(self.pixels):
            frames[..., channel] = (plane * 255 + 0.5).clip(0, 255)
        return frames

    def _patch(self, x: Curve, y: Curve, reach: Curve, opacity: Curve) -> _Patch | None:
        x, y, reach, opacity = (np.broadcast_to(np.asarray(v, np.float32), self.clock.shape) for v in (x, y, reach, opacity))
        # Below one grey level nothing shows: frames before a flash and long after it cost nothing.
        when = np.flatnonzero(opacity > 0.004)
        if not len(when):
            return None
        x, y, margin = x[when], y[when], reach[when] + 1 / self.config.size
        columns, rows = self.columns[when], self.rows[when]
        wide = np.flatnonzero((np.abs(columns - x[:, None]) <= margin[:, None]).any(0))
        high = np.flatnonzero((np.abs(rows - y[:, None]) <= margin[:, None]).any(0))
        if not len(wide) or not len(high):
            return None
        w, h = slice(wide[0], wide[-1] + 1), slice(high[0], high[-1] + 1)
        frames = slice(None) if len(when) == len(self.clock) else when
        dx, dy = columns[:, None, w] - x[:, None, None], rows[:, h, None] - y[:, None, None]
        return _Patch((frames, h, w), dx, dy, opacity[when, None, None], when)

    def _paint(self, patch: _Patch, distance: np.ndarray, ink: np.ndarray):
        """Blend `ink` (3,) where the signed distance, in picture widths, is negative."""
        cover = (0.5 - distance * self.config.size).clip(0, 1)
        cover *= patch.opacity
        for plane, value in zip(self.pixels, ink, strict=True):
            region = plane[patch.index]
            region += cover * (value - region)
            plane[patch.index] = region

    def ellipse(self, x: Curve, y: Curve, rx: Curve, ry: Curve, ink: np.ndarray, opacity: Curve = 1.0):
        """A filled ellipse of radii rx, ry."""
        if patch := self._patch(x, y, np.maximum(rx, ry), opacity):
            rx, ry = np.maximum(patch.curve(rx), 1e-3), np.maximum(patch.curve(ry), 1e-3)
            away = np.sqrt(np.square(patch.dx / rx) + np.square(patch.dy / ry))
            self._paint(patch, (away - 1) * np.minimum(rx, ry), ink)

    def disc(self, x: Curve, y: Curve, radius: Curve, ink: np.ndarray, opacity: Curve = 1.0):
        """A filled circle."""
        self.ellipse(x, y, radius, radius, ink, opacity)

    def ring(self, x: Curve, y: Curve, radius: Curve, width: float, ink: np.ndarray, opacity: Curve = 1.0):
        """A circle's outline."""
        if patch := self._patch(x, y, radius + width, opacity):
            away = np.sqrt(np.square(patch.dx) + np.square(patch.dy))
            self._paint(patch, np.abs(away - patch.curve(radius)) - width / 2, ink)

    def box(self, x: Curve, y: Curve, width: Curve, height: Curve, ink: np.ndarray, opacity: Curve = 1.0):
        """A filled upright rectangle about (x, y)."""
        self.trapezoid(x, y, width, width, height, ink, opacity)

    def trapezoid(self, x: Curve, y: Curve, top: Curve, bottom: Curve, height: Curve, ink: np.ndarray, opacity: Curve = 1.0):
        """A filled shape of width `top` above and `bottom` below, centred about (x, y)."""
        if patch := self._patch(x, y, np.maximum(np.maximum(top, bottom), height) / 2, opacity):
            top, bottom, height = patch.curve(top), patch.curve(bottom), patch.curve(height)
            side = (top + bottom) / 4 + patch.dy / height * (bottom - top) / 2
            self._paint(patch, np.maximum(np.abs(patch.dx) - side, np.abs(patch.dy) - height / 2), ink)

    def line(self, start: tuple[Curve, Curve], end: tuple[Curve, Curve], width: float, ink: np.ndarray, opacity: Curve = 1.0):
        """A stroke with round ends."""
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        u, v = end[0] - x, end[1] - y
        length = np.maximum(np.hypot(u, v), 1e-4)
        if patch := self._patch(x, y, length + width, opacity):
            u, v, length = patch.curve(u / length), patch.curve(v / length), patch.curve(length)
            along = patch.dx * u + patch.dy * v
            along -= along.clip(-length, length)
            across = patch.dx * v - patch.dy * u
            self._paint(patch, np.sqrt(np.square(along) + np.square(across)) - width / 2, ink)

    def sparks(self, x: Curve, y: Curve, spread: Curve, count: int, radius: float, ink: np.ndarray, opacity: Curve = 1.0):
        """`count` dots evenly around a circle of radius `spread`."""
        if patch := self._patch(x, y, spread + radius, opacity):
            angle = np.arctan2(patch.dy, patch.dx) * count / (2 * np.pi)
            fold = (angle - np.round(angle)) * (2 * np.pi / count)
            away = np.sqrt(np.square(patch.dx) + np.square(patch.dy))
            spread = patch.curve(spread)
            # Folding all sectors onto one draws every dot at the price of one.
            along, across = away * np.cos(fold) - spread, away * np.sin(fold)
            self._paint(patch, np.sqrt(np.square(along) + np.square(across)) - radius, ink)

    def glow(self, x: Curve, y: Curve, radius: float, ink: np.ndarray, opacity: Curve):
        """Light that falls off softly, added to what is there."""
        if patch := self._patch(x, y, 2 * radius, opacity):
            light = np.exp(-np.square(patch.dx / radius)) * np.exp(-np.square(patch.dy / radius)) * patch.opacity
            for plane, value in zip(self.pixels, ink, strict=True):
                plane[patch.index] += light * value

    def specks(
        self, x: float, y: float, width: float, height: float, tile: np.ndarray, fall: np.ndarray, share: Curve, ink: np.ndarray
    ):
        """A random `tile` (rows, columns) in [0, 1] scrolling down by `fall` (T,) picture heights; its lowest `share` shows."""
        if patch := self._patch(x, y, max(width, height) / 2, np.minimum(np.asarray(share) * 1e3, 1.0)):
            # Two picture sides keep the indices positive wherever the camera points.
            rows = np.round((patch.dy + 2 - patch.curve(fall)) * self.config.size).astype(int) % tile.shape[0]
            columns = np.round((patch.dx + 2) * self.config.size).astype(int) % tile.shape[1]
            shown = tile[rows, columns] < patch.curve(share)
            shown &= (np.abs(patch.dx) <= width / 2) & (np.abs(patch.dy) <= height / 2)
            self._paint(patch, np.where(shown, np.float32(-1), np.float32(1)), ink)
