from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.filters import FilterConfig, verdict
from data_prep.media import ClipFormat, transcode
from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from data_prep.transcoding.fingerprint import BYTES, fingerprint, mean_change, reduced, similarity, thumbnail

RATE = 16000


def moving(seed, frames=40):
    """Thumbnails of coarse random pictures that change from frame to frame."""
    random = np.random.default_rng(seed)
    return [thumbnail(random.integers(16, 236, (64, 96)).astype(np.uint8).repeat(2, axis=0)) for _ in range(frames)]


def music(seed, seconds=4.0):
    """Tones of changing pitch and loudness, int16."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    notes = random.uniform(200, 3600, (20, 3)).repeat(len(time) // 20, axis=0)
    return np.rint(3000 * np.sin(2 * np.pi * np.cumsum(notes, axis=0) / RATE).sum(axis=1)).astype(np.int16)


def test_a_fingerprint_is_the_same_on_every_machine():
    print_ = fingerprint(moving(0), music(0), RATE)
    assert len(print_) == BYTES
    assert print_.hex() == (
        "d64b6b716c9d15cbacf3b495b1dd521d6b692c251b92a5a396695b1475a40d5a"
        "7575f6fe0186887252a96666d61d02e52ada1505fa0af91717ccccb828289797"
    )


def test_only_what_looks_and_sounds_alike_is_similar():
    one, other = fingerprint(moving(0), music(0), RATE), fingerprint(moving(1), music(1), RATE)
    same_picture, same_sound = fingerprint(moving(0), music(1), RATE), fingerprint(moving(1), music(0), RATE)
    assert similarity(one, one) == 1.0
    assert all(0.35 < similarity(one, unlike) < 0.65 for unlike in (other, same_picture, same_sound))


def test_noise_and_volume_change_little():
    random = np.random.default_rng(9)
    sound = music(0)
    noisy = np.rint(0.3 * sound + random.normal(0, 20, len(sound))).astype(np.int16)
    thumbnails = [picture + random.integers(-3, 4, picture.shape) for picture in moving(0)]
    assert similarity(fingerprint(moving(0), sound, RATE), fingerprint(thumbnails, noisy, RATE)) > 0.9


def test_a_clip_made_worse_is_still_itself(tmp_path):
    rows = list(read_rendered(tmp_path, 4, workers=1, settings=RenderConfig(density=2.0)))
    fine, poor = ClipFormat(short_side=96), ClipFormat(short_side=48, fps=12.5, crf=38)
    clips = [transcode(str(tmp_path / row.source), row.start, row.end, fine) for row in rows]
    worse = [transcode(str(tmp_path / row.source), row.start, row.end, poor) for row in rows]
    assert all(verdict(clip.columns(), FilterConfig()) is None for clip in clips)
    assert min(similarity(one.fingerprint, other.fingerprint) for one, other in zip(clips, worse, strict=True)) > 0.8
    assert max(similarity(one.fingerprint, other.fingerprint) for one, other in combinations(clips, 2)) < 0.7


def test_flat_and_silent_clips_set_no_bits():
    flat = [thumbnail(np.full((48, 64), 100, np.uint8))] * 5
    assert fingerprint(flat, np.zeros(8000, np.int16), RATE) == bytes(BYTES)


@given(st.integers(1, 400), st.integers(1, 30000), st.sampled_from([8000, 16000, 44100]), st.integers(0, 9))
def test_clips_of_any_length_have_one(frames, samples, rate, seed):
    sound = np.random.default_rng(seed).integers(-(2**15), 2**15, samples).astype(np.int16)
    assert len(fingerprint(moving(seed, 1) * frames, sound, rate)) == BYTES


@given(st.binary(min_size=BYTES, max_size=BYTES), st.binary(min_size=BYTES, max_size=BYTES))
def test_similarity_is_the_lesser_share_of_equal_bits(one, other):
    equal = np.unpackbits(np.frombuffer(one, np.uint8)) == np.unpackbits(np.frombuffer(other, np.uint8))
    assert similarity(one, other) == similarity(other, one) == min(equal[:256].mean(), equal[256:].mean())


@given(st.integers(16, 300), st.integers(16, 300), st.integers(0, 9))
def test_thumbnails_are_the_means_of_their_cells(height, width, seed):
    luma = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    rows, columns = ([side * cell // cells for cell in range(cells + 1)] for side, cells in ((height, 8), (width, 9)))
    for row, column in ((0, 0), (3, 4), (7, 8)):
        cell = luma[rows[row] : rows[row + 1], columns[column] : columns[column + 1]]
        assert 0 <= 16 * cell.mean() - thumbnail(luma)[row, column] < 1


def test_change_counts_whole_levels_of_limited_range_and_no_flicker():
    black, white = np.full((64, 64), 16, np.uint8), np.full((64, 64), 235, np.uint8)
    assert mean_change(black, white) == mean_change(white, black) == 1.0
    assert mean_change(black, black + 3) == 0.0 and mean_change(black, black + 4) == pytest.approx(4 / 219)
    assert reduced(np.zeros((256, 456), np.uint8)).shape == (64, 114) and reduced(black).shape == (64, 64)
