"""Mel front ends against the public reference, and resampling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.audio import MEL_SPECS, MelSpec, hertz_to_mel, log_mel, mel_basis, mel_to_hertz, resample

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"


@pytest.mark.parametrize("name", ["16k", "44k"])
def test_log_mel_is_the_reference_front_end(name):
    reference = np.load(PARITY / f"mel_vae_{name}.npz")
    mel = log_mel(torch.from_numpy(reference["waveform"]), f"mmaudio_{name}").numpy()
    assert mel.shape == reference["mel"].shape
    assert np.abs(mel - reference["mel"]).max() < 1e-4 * np.abs(reference["mel"]).max()


LENGTHS = [("mmaudio_16k", 128000, 500), ("mmaudio_44k", 353280, 690), ("sf_cavp", 20480, 128), ("sf_cavp_44k", 56448, 128)]


@pytest.mark.parametrize(("name", "samples", "frames"), LENGTHS)
def test_published_lengths(name, samples, frames):
    spec = MEL_SPECS[name]
    assert log_mel(torch.zeros(2, samples), name).shape == (2, spec.bands, frames)
    assert spec.frames(samples) == frames


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(MEL_SPECS)), samples=st.integers(2048, 9000))
def test_frames_are_samples_over_hop(name, samples):
    assert log_mel(torch.zeros(1, samples), name).shape[-1] == samples // MEL_SPECS[name].hop


@given(st.floats(0, 24000))
def test_mel_scale_round_trip(hertz):
    assert mel_to_hertz(hertz_to_mel(hertz)) == pytest.approx(hertz, abs=1e-6)


def test_mel_scale_anchors():
    assert hertz_to_mel(1000.0) == pytest.approx(15.0)
    assert hertz_to_mel(6400.0) == pytest.approx(42.0)


@pytest.mark.parametrize("name", sorted(MEL_SPECS))
def test_every_band_has_a_bin_and_unit_area(name):
    spec = MEL_SPECS[name]
    basis = mel_basis(name)
    assert (basis > 0).any(1).all()
    wide = basis[-20:]  # narrow triangles are sampled too coarsely for their area to show
    assert wide.sum(1) * spec.sample_rate / spec.n_fft == pytest.approx(1.0, abs=0.02)


def test_a_tone_peaks_in_its_band():
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)[None]
    edges = mel_to_hertz(np.linspace(0, hertz_to_mel(8000.0), 130))
    assert log_mel(tone, "sf_cavp")[0, :, 50].argmax() == np.abs(edges[1:-1] - 1000).argmin()


@pytest.mark.parametrize("name", ["sf_cavp", "sf_cavp_44k"])
def test_an_onset_is_placed_to_the_frame(name):
    rate = MEL_SPECS[name].sample_rate
    click = torch.zeros(1, rate)
    click[0, rate // 2] = 1.0
    assert log_mel(click, name)[0].mean(0).argmax() in (49, 50)


def test_the_contrastive_front_ends_hear_the_same_at_both_rates():
    """The same tones in the same bands, 10 ms frames; louder by the ratio of the transforms' lengths."""
    time, (low, high) = torch.arange(44100) / 44100, (MEL_SPECS[name] for name in ("sf_cavp", "sf_cavp_44k"))
    chord = sum(torch.sin(2 * torch.pi * hertz * time) for hertz in (440, 1000, 3000, 7000))[None] * 0.1
    # Noise between the tones, as in recordings: far below them it would be the windows' side lobes that are compared.
    chord += resample(torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)) * 0.05, 16000, 44100)
    mel_high, mel_low = log_mel(chord, high), log_mel(resample(chord, 44100, 16000), low)
    assert mel_high.shape == mel_low.shape == (1, 128, 100)
    louder = (mel_high - mel_low)[0, :120, 5:-5].mean(dim=1)  # above: where resampling ends
    assert louder.mean() == pytest.approx(np.log(high.n_fft / low.n_fft), abs=0.05) and louder.std() < 0.1


def test_filters_of_an_odd_transform_lie_where_its_bins_are():
    """A tone at a bin of 2205 samples peaks in the band around it, also near the upper end."""
    spec = MEL_SPECS["sf_cavp_44k"]
    for hertz in (100, 1000, 7800):
        tone = torch.sin(2 * torch.pi * hertz * torch.arange(44100) / 44100)[None]
        edges = mel_to_hertz(np.linspace(0, hertz_to_mel(8000.0), 130))
        assert log_mel(tone, spec)[0, :, 50].argmax() == np.abs(edges[1:-1] - hertz).argmin()


def test_gradient_is_finite_even_at_silence_and_after_inference_mode():
    spec = MelSpec(sample_rate=16000, n_fft=512, hop=128, win=512, bands=20, fmax=8000.0)
    with torch.inference_mode():
        log_mel(torch.zeros(1, 4096), spec)  # fills the cache
    waveform = torch.cat([torch.zeros(1, 4096), torch.rand(1, 4096) - 0.5], dim=1).requires_grad_()
    log_mel(waveform, spec).sum().backward()
    assert waveform.grad.isfinite().all() and waveform.grad[:, 5000:].abs().sum() > 0


def test_autocast_does_not_reach_the_transform():
    waveform = torch.rand(1, 8192, generator=torch.Generator().manual_seed(0)) * 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mel = log_mel(waveform, "mmaudio_16k")
    assert mel.dtype == torch.float32 and torch.equal(mel, log_mel(waveform, "mmaudio_16k"))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no mel front end 'x': choose one of mmaudio_16k"):
        log_mel(torch.zeros(1, 16000), "x")
    with pytest.raises(ValueError, match=r"waveform \(B, N\), not \(16000,\)"):
        log_mel(torch.zeros(16000), "sf_cavp")
    with pytest.raises(ValueError, match="at least 433 samples, got 400"):
        log_mel(torch.zeros(1, 400), "sf_cavp")
    with pytest.raises(ValueError, match="hop is 255"):
        MelSpec(sample_rate=16000, n_fft=1024, hop=255, win=1024, bands=80, fmax=8000.0)
    with pytest.raises(ValueError, match="fmax <= 8000.0"):
        MelSpec(sample_rate=16000, n_fft=1024, hop=256, win=1024, bands=80, fmax=9000.0)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_resample_keeps_the_tone_and_the_type(kind):
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32)
    out = resample(kind(np.stack([tone, 0.5 * tone])), 44100, 16000)
    assert type(out) is type(kind(tone)) and tuple(out.shape) == (2, 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(np.asarray(out)[0] - expected)[200:-200].max() < 1e-3
    assert np.allclose(np.asarray(resample(kind(tone), 44100, 16000)), np.asarray(out)[0], atol=1e-6)


def test_resample_removes_what_would_alias():
    tone = np.sin(2 * np.pi * 12000 * np.arange(48000) / 48000)
    assert np.abs(resample(tone, 48000, 16000)[500:-500]).max() < 1e-3
