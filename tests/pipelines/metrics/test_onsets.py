import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.audio import MEL_SPECS, log_mel
from data_prep.rendering.config import RenderConfig
from data_prep.rendering.scene import Scene
from pipelines.metrics.onsets import OnsetConfig, detect_onsets, match_onsets, onset_f1, onset_strength

TIMES = np.array([0.3, 0.75, 1.0, 1.6, 2.31, 2.5, 3.2])
SECONDS = 3.84
SPECS = [name for name in MEL_SPECS if name != "sf_cavp_44k"]
"""Front ends that an autoencoder may have, whose log-mels onsets are read from; that one feeds the contrastive encoder alone."""
DECAYS = {"click": 60.0, "clap": 20.0, "ding": 6.0}


def mel_of(waveform, spec):
    return log_mel(torch.tensor(waveform, dtype=torch.float32)[None], spec)[0].numpy()


def struck(kind, spec, times=TIMES, noise=0.003):
    """A waveform with an event of a kind at each of the times."""
    rate, random = MEL_SPECS[spec].sample_rate, np.random.default_rng(0)
    waveform = noise * random.standard_normal(int(SECONDS * rate))
    for time in times:
        start = int(time * rate)
        t = np.arange(len(waveform) - start) / rate
        source = np.sin(2 * np.pi * 880 * t) if kind == "ding" else random.standard_normal(len(t))
        waveform[start:] += 0.4 * source * np.exp(-DECAYS[kind] * t)
    return waveform


@pytest.mark.parametrize(("kind", "spec"), itertools.product(DECAYS, SPECS))
def test_finds_every_event_within_20_ms(kind, spec):
    found = detect_onsets(mel_of(struck(kind, spec), spec), spec)
    assert onset_f1(found, TIMES, tolerance=0.02) == 1.0


@pytest.mark.parametrize("spec", MEL_SPECS)
def test_steady_sounds_have_no_onsets(spec):
    rate = MEL_SPECS[spec].sample_rate
    t = np.arange(int(SECONDS * rate)) / rate
    noise = np.random.default_rng(1).standard_normal(len(t))
    hum, glide = (0.3 * np.sin(2 * np.pi * pitch * t) for pitch in (440, 300 + 80 * t))
    for waveform in (np.zeros_like(t), 0.1 * noise, 1e-4 * noise, hum, glide):
        assert detect_onsets(mel_of(waveform, spec), spec).size == 0


def test_loudness_does_not_matter():
    waveform = struck("clap", "mmaudio_16k", noise=0.01)
    loud, quiet = (detect_onsets(mel_of(gain * waveform, "mmaudio_16k"), "mmaudio_16k") for gain in (1.0, 0.1))
    assert loud == pytest.approx(quiet, abs=0.02)


def test_rendered_clips_tell_their_own_events_from_those_of_others():
    scenes = [Scene.cast(RenderConfig(), seed=0, split="heldout", index=index) for index in range(48)]
    true = [np.array([event["time"] for event in scene.events if event["onset"]]) for scene in scenes]
    heard = [detect_onsets(mel_of(scene.play(), "mmaudio_16k"), "mmaudio_16k") for scene in scenes]
    assert np.mean([onset_f1(*pair) for pair in zip(heard, true, strict=True)]) > 0.9
    assert np.mean([onset_f1(*pair) for pair in zip(heard, true[1:] + true[:1], strict=True)]) < 0.3


def test_strength_is_the_mean_rise_in_decibels():
    spec = MEL_SPECS["mmaudio_16k"]
    mel = np.full((spec.bands, 10), -2.0)
    mel[:, 5:] += 1.0  # log10: 20 dB
    assert onset_strength(mel, spec).tolist() == pytest.approx([0, 0, 0, 0, 0, 20, 20, 0, 0, 0])
    natural = onset_strength(mel * np.log(10), MEL_SPECS["mmaudio_44k"])
    assert natural == pytest.approx(onset_strength(mel, spec))


def test_a_glide_to_the_next_band_is_no_rise():
    mel = np.full((80, 6), -4.0)
    for frame in range(6):
        mel[10 + frame // 2, frame] = 0.0
    assert onset_strength(mel, "mmaudio_16k").max() == 0.0


def test_shorter_than_the_lag():
    assert detect_onsets(np.zeros((80, 1)), "mmaudio_16k").size == 0
    assert onset_strength(np.zeros((80, 0)), "mmaudio_16k").shape == (0,)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: onset_strength(np.zeros(80), "mmaudio_16k"), r"\(F, T\)"),
    (lambda: onset_strength(np.full((80, 9), np.nan), "mmaudio_16k"), "finite"),
    (lambda: OnsetConfig(lag=0), "OnsetConfig.lag"),
    (lambda: OnsetConfig(gap=0.0), "OnsetConfig.gap"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_f1_known_answers():
    assert onset_f1(np.array([]), np.array([])) == 1.0
    assert onset_f1(np.array([]), np.array([1.0])) == 0.0
    assert onset_f1(np.array([1.0, 2.0, 3.0]), np.array([1.05, 5.0])) == pytest.approx(2 * 1 / 5)
    # Two guesses for one event count once.
    assert onset_f1(np.array([1.0, 1.05]), np.array([1.02])) == pytest.approx(2 / 3)
    # A greedy choice of the nearest pair (0.10, 0.11) would leave the others alone.
    assert match_onsets(np.array([0.02, 0.10]), np.array([0.11, 0.19]), 0.1) == 2


times = st.lists(st.integers(0, 60).map(lambda step: step / 20), max_size=5)


@given(times, times)
def test_the_matching_is_the_largest(predicted, true):
    few, many = sorted((predicted, true), key=len)
    best = max(sum(abs(a - b) <= 0.11 for a, b in zip(few, chosen, strict=True)) for chosen in itertools.permutations(many, len(few)))
    assert match_onsets(np.array(predicted), np.array(true), 0.11) == best


@given(times, times)
def test_f1_is_symmetric_and_bounded(predicted, true):
    score = onset_f1(predicted, true)
    assert 0.0 <= score <= 1.0 and score == onset_f1(true, predicted)
