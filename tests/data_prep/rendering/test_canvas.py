"""Shapes on the canvas."""

import numpy as np
import pytest

from data_prep.rendering.canvas import Canvas, colour, white
from data_prep.rendering.config import RenderConfig


@pytest.fixture
def canvas():
    canvas = Canvas(RenderConfig(size=64, seconds=1.6, camera=0.0, min_gap=0.3), np.random.default_rng(0))
    canvas.pixels[:] = 0
    return canvas


def area(canvas):
    """White share of each frame (T,)."""
    return canvas.pixels[0].mean((1, 2))


def test_areas_are_those_of_geometry(canvas):
    canvas.disc(0.5, 0.5, np.linspace(0.1, 0.4, 40), white())
    assert area(canvas) == pytest.approx(np.pi * np.linspace(0.1, 0.4, 40) ** 2, rel=0.02)


@pytest.mark.parametrize(
    ("paint", "expected"),
    [
        (lambda c: c.box(0.5, 0.5, 0.4, 0.2, white()), 0.08),
        (lambda c: c.trapezoid(0.5, 0.5, 0.2, 0.6, 0.5, white()), 0.2),
        (lambda c: c.ellipse(0.5, 0.5, 0.3, 0.2, white()), np.pi * 0.06),
        (lambda c: c.ring(0.5, 0.5, 0.3, 0.1, white()), 2 * np.pi * 0.03),
        (lambda c: c.line((0.2, 0.3), (0.8, 0.7), 0.1, white()), np.hypot(0.6, 0.4) * 0.1 + np.pi * 0.0025),
        (lambda c: c.sparks(0.5, 0.5, 0.3, 6, 0.08, white()), 6 * np.pi * 0.0064),
    ],
)
def test_each_shape_covers_its_area(canvas, paint, expected):
    paint(canvas)
    assert area(canvas) == pytest.approx(expected, rel=0.06)


def test_a_shape_is_where_it_is_put_and_may_leave_the_picture(canvas):
    canvas.disc(np.linspace(-0.5, 1.5, 40), 0.25, 0.1, white())
    y, x = np.unravel_index(canvas.pixels[0, 19].argmax(), (64, 64))
    assert y == pytest.approx(16, abs=6) and x == pytest.approx((-0.5 + 2 * 19 / 39) * 64, abs=7)
    assert canvas.pixels[0, 0].max() == 0 and canvas.pixels[0, -1].max() == 0


def test_opacity_blends_and_hidden_frames_stay(canvas):
    shown = np.zeros(40)
    shown[10], shown[20] = 1.0, 0.5
    canvas.box(0.5, 0.5, 2.0, 2.0, np.array([1.0, 0.5, 0.0]), shown)
    assert canvas.pixels[:, 10, 30, 30] == pytest.approx([1, 0.5, 0])
    assert canvas.pixels[:, 20, 30, 30] == pytest.approx([0.5, 0.25, 0])
    assert np.flatnonzero(canvas.pixels.any((0, 2, 3))).tolist() == [10, 20]


def test_pulse_starts_in_the_frame_of_its_time(canvas):
    pulse = canvas.pulse(np.array([0.28, 1.0]), half_life=0.04)
    assert np.flatnonzero(pulse == 1).tolist() == [7, 25] and pulse[6] == 0
    assert pulse[[8, 9, 26]] == pytest.approx([0.5, 0.25, 0.5])
    assert not canvas.pulse(np.zeros(0)).any()


def test_camera_moves_smoothly_and_little():
    canvas = Canvas(RenderConfig(camera=0.03), np.random.default_rng(1))
    offset = canvas.columns[:, 0] - canvas.columns[:, 0].mean()
    assert 0 < np.abs(offset).max() < 0.06 and np.abs(np.diff(offset)).max() < 0.2 / 48


def test_background_is_dim():
    tops = [Canvas(RenderConfig(), np.random.default_rng(i)).pixels.max() for i in range(20)]
    assert max(tops) < 0.25 and np.std(tops) > 0.01


def test_colours():
    assert colour(0.0, 1.0, 1.0) == pytest.approx([1, 0, 0])
    assert colour(1 / 3, 1.0, 0.5) == pytest.approx([0, 0.5, 0], abs=1e-6)
    assert colour(0.7, 0.0, 0.4) == pytest.approx([0.4] * 3)
