"""Windows over long videos."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.windows import cross_fade, window_starts


@given(st.integers(1, 5000), st.integers(2, 300), st.data())
def test_windows_cover_the_video(length, window, data):
    overlap = data.draw(st.integers(0, window // 2))
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    if length <= window:
        assert starts == [0]
        return
    assert starts[-1] == length - window
    steps = np.diff(starts)
    assert steps.min() > 0 and steps.max() <= window - overlap + 1


@given(st.integers(30, 400), st.integers(20, 60))
def test_pieces_of_one_sound_fade_into_that_sound(length, window):
    sound = np.sin(np.arange(length) / 7).astype(np.float32)
    pieces = [(start, sound[start:start + window]) for start in window_starts(length, window, 8)]
    np.testing.assert_allclose(cross_fade(pieces, length), sound, atol=1e-5)


def test_sound_is_as_long_as_asked():
    pieces = [(0, np.ones(50, np.float32))]
    assert cross_fade(pieces, 30).tolist() == pytest.approx([1.0] * 30)
    assert cross_fade(pieces, 60).tolist() == pytest.approx([1.0] * 50 + [0.0] * 10)
