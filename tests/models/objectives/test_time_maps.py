"""Maps of time: what they keep, what they move, and how far."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.objectives.time_maps import KINDS, distortion_sizes, heard_through, shift, swap, time_map, warp

FRAMES = st.integers(16, 400)
PLACE = st.floats(0, 1)


def made_mel(frames, bands=3):
    return torch.randn(bands, frames, generator=torch.Generator().manual_seed(frames))


@given(FRAMES, PLACE)
def test_nothing_moves_at_size_zero(frames, place):
    mel = made_mel(frames)
    for source in (shift(frames, 0), warp(frames, 0, place)):
        assert torch.equal(source, torch.arange(frames, dtype=torch.float64))
        assert torch.equal(heard_through(mel, source), mel)


@given(FRAMES, st.floats(-1, 1))
def test_shift_keeps_all_but_the_mirrored_end(frames, share):
    by = round(share * (frames - 1))
    moved = heard_through(mel := made_mel(frames), shift(frames, by))
    kept = frames - abs(by)
    here, there = (slice(by, None), slice(0, kept)) if by >= 0 else (slice(0, kept), slice(-by, None))
    assert torch.equal(moved[:, here], mel[:, there])
    if by > 0:
        assert torch.equal(moved[:, :by], mel[:, 1:by + 1].flip(1))
    if by < 0:
        assert torch.equal(moved[:, by:], mel[:, by - 1:-1].flip(1))


@given(FRAMES, st.floats(-0.25, 0.25), PLACE)
def test_warp_is_monotone_between_ends_that_stay(frames, share, place):
    by = share * frames
    source = warp(frames, by, place)
    speed = source.diff()
    assert speed.min() > 0.15 and speed.max() < 1.85
    assert (source[0].item(), source[-1].item()) == pytest.approx((0, frames - 1), abs=1e-9)
    displacement = torch.arange(frames) - source
    assert displacement.abs().max() <= abs(by) + 1e-9
    # Frames stand within half a frame of the crest.
    assert displacement.abs().max() >= 0.9 * abs(by) - 1e-9


@given(FRAMES, st.data(), PLACE)
def test_swap_is_a_permutation_that_fades_at_its_seams(frames, data, place):
    length = data.draw(st.integers(2, frames // 2 - 1))
    source = swap(frames, length, place)
    assert sorted(source.tolist()) == list(range(frames))
    moved = (source != torch.arange(frames)).nonzero()[:, 0]
    start = int(moved[0])
    assert len(moved) == 2 * length and (source - torch.arange(frames)).abs().unique().tolist() in ([0, length], [length])
    mel, seams = made_mel(frames), {seam + side for seam in (start, start + length, start + 2 * length) for side in (-1, 0)}
    heard = heard_through(mel, source)
    away = [frame for frame in range(frames) if frame not in seams]
    assert torch.equal(heard[:, away], mel[:, source.long()][:, away])


def test_a_seam_by_hand():
    heard = heard_through(torch.arange(12.0)[None], swap(12, 4, 0.5))[0].tolist()
    # From frame 1 to 6 and back: 1 -> (2 x 1 + 5) / 3, 6 -> (2 + 2 x 6) / 3.
    assert heard == pytest.approx([0, 7 / 3, 14 / 3, 7, 8, 19 / 3, 14 / 3, 3, 4, 19 / 3, 26 / 3, 11])


@given(st.floats(0.1, 2), st.floats(0.01, 0.09), st.integers(1, 9))
def test_sizes_fall_strictly(coarse, subtle, levels):
    sizes = distortion_sizes(coarse, subtle, levels)
    assert len(sizes) == levels and sizes[0] == coarse
    assert all(larger > smaller for larger, smaller in itertools.pairwise(sizes))
    if levels > 1:
        assert sizes[-1] == pytest.approx(subtle)


@given(st.sampled_from(KINDS), st.floats(1, 25), st.sampled_from((-1, 1)), PLACE)
def test_every_kind_moves_sound_as_far_as_told(kind, by, sign, place):
    source = time_map(kind, 100, by, sign, place)
    inside = torch.arange(100, dtype=torch.float64) - source
    if kind == "shift":  # all but the mirrored end
        assert inside.sort().values[50].item() == pytest.approx(sign * by)
    else:
        assert inside.abs().max().item() == pytest.approx(by, abs=0.5 if kind == "swap" else 0.1 * by)


def test_refusals():
    with pytest.raises(ValueError, match="shift by 16 of 16 frames"):
        shift(16, 16)
    with pytest.raises(ValueError, match="warp by 5 of 16 frames: give at most a quarter"):
        warp(16, 5, 0.5)
    with pytest.raises(ValueError, match="swap of 8 of 16 frames: give 1 or more, and less than half"):
        swap(16, 8, 0.5)
    with pytest.raises(ValueError, match='"echo" is unknown: choose one of shift, warp, swap'):
        time_map("echo", 16, 1.0, 1, 0.5)


@given(st.integers(4, 20), st.integers(1, 3), PLACE)
def test_a_swap_by_whole_periods_cannot_be_heard(period, periods, place):
    """Seams are no cue: sound that goes on as it did before is left as it is, faded frames too."""
    mel = made_mel(period).repeat(1, 8)
    torch.testing.assert_close(heard_through(mel, swap(mel.shape[1], periods * period, place)), mel)
