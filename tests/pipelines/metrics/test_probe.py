"""The probe reads onsets that are a straight line away, and none that are not there."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.metrics.onsets import onset_f1
from pipelines.metrics.probe import OnsetProbe, onset_density

SECONDS = (np.arange(96) + 0.5) / 25
OVERLAPPING = ((np.arange(96) // 8) * 8 + (np.arange(96) % 8 + 0.5) * 2) / 25  # windows of 16 frames every 8, 8 tokens each


def made(count, seconds, scale=1.0, seed=0):
    """Tokens whose sixteen channels mix the onsets' density with fifteen of noise, and the onsets."""
    random = np.random.default_rng(seed)
    mix, onsets, tokens = np.random.default_rng(9).standard_normal((16, 16)), [], []
    for _ in range(count):
        onsets.append(np.sort(random.choice(np.arange(0.2, seconds.max(), 0.3), 3, replace=False)))
        sources = 0.3 * random.standard_normal((len(seconds), 16))
        sources[:, 0] = onset_density(onsets[-1], seconds)
        tokens.append(scale * sources @ mix)
    return torch.tensor(np.stack(tokens), dtype=torch.float32), onsets


def f1(probe, tokens, onsets):
    return np.mean([onset_f1(probe.onsets(curve), times) for curve, times in zip(probe.curves(tokens), onsets, strict=True)])


@pytest.mark.parametrize("seconds, group", [(SECONDS, 32), (OVERLAPPING, 8)], ids=["in a row", "overlapping windows"])
def test_what_is_there_is_read_and_another_clips_onsets_are_not(seconds, group):
    probe = OnsetProbe(seconds, group)
    for seed in range(4):
        probe.add(*made(24, seconds, seed=seed))
    probe.fit()
    tokens, onsets = made(32, seconds, seed=99)
    assert f1(probe, tokens, onsets) > 0.95
    assert f1(probe, tokens.roll(1, dims=0), onsets) < 0.6
    assert probe.curves(tokens).shape == (32, len(probe.seconds)) and np.all(np.diff(probe.seconds) > 0)


def test_neither_the_scale_of_the_features_nor_the_cut_into_batches_matters():
    probes = [OnsetProbe(SECONDS, 32), OnsetProbe(SECONDS, 32)]
    tokens, onsets = made(64, SECONDS)
    probes[0].add(tokens, onsets)
    for start in range(0, 64, 7):
        probes[1].add(1000 * tokens[start:start + 7], onsets[start:start + 7])
    for probe in probes:
        probe.fit()
    assert np.allclose(probes[0].curves(tokens), probes[1].curves(1000 * tokens), atol=1e-6)
    assert probes[0].level == pytest.approx(probes[1].level, abs=1e-6)


def test_too_few_clips_say_so():
    probe = OnsetProbe(SECONDS, 32)
    probe.add(*made(3, SECONDS))
    with pytest.raises(ValueError, match="at least four clips, got 3"):
        probe.fit()


@given(st.lists(st.floats(0, 4), max_size=5))
def test_the_density_is_one_at_an_onset_and_none_far_from_all(onsets):
    density = onset_density(np.array(onsets), np.array([*onsets, 9.0]))
    assert density[-1] < 1e-9 and np.allclose(density[:-1], 1.0)
