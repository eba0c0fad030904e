"""What every kind of sounding event shares: its place, its look, its times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_prep.rendering.canvas import Canvas, colour
from data_prep.rendering.config import RenderConfig
from data_prep.rendering.sounds import Track

LAST_HUE = 0.75
"""Hues run from red to violet only: were they to close the circle, one colour would stand for both ends of a timbre."""

_COLOURS = ((0.03, "red"), (0.1, "orange"), (0.2, "yellow"), (0.43, "green"), (0.54, "turquoise"), (0.68, "blue"), (1.0, "violet"))
"""Names of the hues below each bound."""
_COUNTS = ("never", "once", "twice", "three times", "four times", "five times", "six times")


@dataclass(kw_only=True)
class Act:
    """One sounding thing of a clip. Size shows in its pitch, colour in its timbre, so that clips of one kind differ."""

    kind: ClassVar[str]
    noun: ClassVar[str]
    """What it is, with {colour} where its colour shows."""
    verb: ClassVar[str]
    most: ClassVar[int] = 4
    """Most events of this kind in 3.84 s."""
    rhythm: ClassVar[bool] = False
    """Whether the kind sets its own times in `prepare`, whatever the scene proposes."""

    x: float
    """Centre in the picture, 0 to 1."""
    y: float
    scale: float
    """Share of the picture's side that it may fill."""
    size: float
    """0 (small, high) to 1 (large, low)."""
    tint: float
    """0 (red, dull) to 1 (violet, bright)."""
    times: np.ndarray
    """Seconds of its onsets (n,), ascending."""
    seed: int
    """Of its noises and textures."""

    def prepare(self, random: np.random.Generator, config: RenderConfig):
        """Choose what only this kind has."""

    def draw(self, canvas: Canvas):
        """Paint it on every frame."""
        raise NotImplementedError

    def play(self, track: Track):
        """Add its sounds."""
        raise NotImplementedError

    def events(self) -> list[dict[str, Any]]:
        """The truth: kind, seconds and place of every event; `onset` says whether its sound starts sharply at `time`."""
        return [self.event(time) for time in self.times]

    def event(self, time: float, x: float | None = None, y: float | None = None, onset: bool = True, **more) -> dict[str, Any]:
        """One entry of `events`, rounded to what a reader can use."""
        numbers = {"time": time, "x": self.x if x is None else x, "y": self.y if y is None else y, **more}
        return {"kind": self.kind, "onset": onset} | {name: round(float(value), 4) for name, value in numbers.items()}

    def phrase(self) -> str:
        """Half a sentence for the caption."""
        count = len(self.times)
        return f"{self.subject()} {self.verb} {_COUNTS[count] if count < len(_COUNTS) else 'many times'}"

    def subject(self) -> str:
        """The noun with its size and colour."""
        size = "small " if self.size < 0.33 else "large " if self.size > 0.67 else ""
        hue = next(name for bound, name in _COLOURS if self.tint * LAST_HUE < bound)
        words = size + self.noun.format(colour=hue)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    @property
    def unit(self) -> float:
        """Picture widths to one length of the drawing, whose shapes lie within -0.5 to 0.5."""
        return self.scale * (0.62 + 0.38 * self.size)

    def at(self, u, v) -> tuple:
        """Picture coordinates of a point of the drawing."""
        return self.x + u * self.unit, self.y + v * self.unit

    def ink(self, saturation: float = 0.85, value: float = 0.75) -> np.ndarray:
        """Its colour."""
        return colour(self.tint * LAST_HUE, saturation, value)

    def pitch(self, low: float, high: float) -> float:
        """Hz: `high` for the smallest, `low` for the largest."""
        return high * (low / high) ** self.size

    @property
    def level(self) -> float:
        """Peak of its sounds: large things are louder."""
        return 0.4 + 0.25 * self.size

    def noise(self) -> np.random.Generator:
        """Random numbers of its own, the same whenever asked."""
        return np.random.default_rng(self.seed)


def spaced_times(random: np.random.Generator, count: int, start: float, end: float, gap: float) -> np.ndarray:
    """Random seconds (count,) in [start, end], ascending, at least `gap` apart."""
    slack = max(0.0, end - start - gap * (count - 1))
    return start + np.sort(random.uniform(0, slack, count)) + gap * np.arange(count)


def swing(canvas: Canvas, times: np.ndarray, before: float = 0.14, after: float = 0.2) -> np.ndarray:
    """Curve (T,) of something that strikes: 0 at rest, 1 in the frames of `times`, closing ever faster and drawing back slowly."""
    ahead = times[None] - canvas.clock[:, None]
    closing = np.square((1 - ahead / before).clip(0, 1)) * (ahead > 0)
    leaving = np.square((1 + ahead / after).clip(0, 1)) * (ahead <= 0)
    curve = np.maximum(closing, leaving).max(axis=1, initial=0.0)
    # A contact shorter than a frame would be missed by all but lucky exposures.
    curve[canvas.frame_of(times)] = 1.0
    return curve.astype(np.float32)
