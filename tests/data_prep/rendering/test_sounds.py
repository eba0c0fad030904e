"""Synthesis primitives."""

import numpy as np
import pytest

from data_prep.rendering.sounds import Track, band_noise, envelope, glide, partials, sweep, voice

RATE = 16000


def peak_hertz(sound):
    return np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound)


def test_track_places_sounds_to_the_sample_and_cuts_them_at_the_end():
    track = Track(1000, RATE)
    track.add(500 / RATE, np.ones(10, np.float32), 0.5)
    track.add(995 / RATE, np.ones(10, np.float32))
    track.add(2.0, np.ones(10, np.float32))
    assert np.flatnonzero(track.waveform).tolist() == [*range(500, 510), *range(995, 1000)]
    assert track.waveform[505] == 0.5


def test_envelope_is_sharp_and_dies():
    curve = envelope(Track(RATE, RATE).span(0.5), 0.05)
    assert curve.argmax() <= 0.0011 * RATE and curve[int(0.35 * RATE)] < 1e-3


def test_voice_has_its_pitch_and_harmonics():
    sound = voice(np.full(RATE, 200.0), (1.0, 0.0, 0.5), RATE)
    spectrum = np.abs(np.fft.rfft(sound)) / RATE * 2
    assert spectrum[[200, 400, 600]] == pytest.approx([1 / 1.5, 0, 0.5 / 1.5], abs=0.01)


def test_band_noise_stays_in_its_band():
    sound = band_noise(np.random.default_rng(0), RATE, 1000, 2000, RATE)
    power = np.square(np.abs(np.fft.rfft(sound)))
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(1, abs=1e-3)
    assert power[900:2200].sum() > 0.85 * power.sum() and power[4500:].sum() < 0.01 * power.sum()


def test_sweep_ends_where_it_should():
    sound = sweep(Track(RATE, RATE).span(1.0), 2000, 500, 20)
    assert peak_hertz(sound[RATE // 2 :]) == pytest.approx(500, abs=4)


def test_partials_are_where_they_are_asked_for():
    spectrum = np.abs(np.fft.rfft(partials(Track(RATE, RATE).span(1.0), 500, (1, 3), (1, 1), 0.3)))
    assert spectrum[500] > 20 * spectrum[800] and spectrum[1500] > 20 * spectrum[800]


def test_glide_smooths_jumps_after_they_happen():
    level = np.repeat([0.0, 1.0], 500).astype(np.float32)
    smooth = glide(level, 1000, 0.02)
    assert len(smooth) == 1000 and smooth[499] == 0 and smooth[500] == pytest.approx(0.05, abs=1e-6) and smooth[519] == pytest.approx(1)
