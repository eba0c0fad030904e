from __future__ import annotations

import math

import pytest
import torch

from data_prep.audio import MEL_SPECS, log_mel, mel_basis
from models.codecs.vocoder import GriffinLim, GriffinLimConfig

SPEC = MEL_SPECS["mmaudio_16k"]


def vocoder(name: str = "mmaudio_16k", **changes) -> GriffinLim:
    return GriffinLim(MEL_SPECS[name], mel_basis(name), GriffinLimConfig(**changes))


def sounds(samples: int = 25600, rate: int = 16000) -> torch.Tensor:
    """A rising tone, decaying clicks, and noise that swells (3, N)."""
    time = torch.arange(samples) / rate
    tone = 0.4 * torch.sin(2 * math.pi * (300 * time + 500 * time.square()))
    clicks = 0.6 * torch.exp(-40 * (time % 0.4)) * torch.sin(2 * math.pi * 900 * time)
    noise = 0.2 * time * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    floor = 1e-3 * torch.randn(samples, generator=torch.Generator().manual_seed(1))
    return torch.stack([tone, clicks, noise]) + floor


def spectral_convergence(model: GriffinLim, mel: torch.Tensor) -> float:
    """Distance of the waveform's magnitudes from the wanted ones, relative to these."""
    wanted = model.magnitude(mel)
    return ((model._spectrum(model.vocode(mel)).abs() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("name", "rate"), [("mmaudio_16k", 16000), ("mmaudio_44k", 44100), ("sf_cavp", 16000)])
def test_waveform_has_the_log_mel_it_was_made_from(name, rate):
    mel = log_mel(sounds(20 * 2560, rate), name)
    waveform = vocoder(name).vocode(mel)
    assert waveform.shape == (3, mel.shape[2] * MEL_SPECS[name].hop)
    again = log_mel(waveform, name)
    band_mean = mel.mean(dim=(0, 2), keepdim=True)
    assert (again - mel).abs().mean() < 0.1 * (band_mean - mel).abs().mean()


def test_a_tone_keeps_its_pitch_and_its_level():
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(16384) / 16000)[None]
    waveform = vocoder().vocode(log_mel(tone, SPEC))
    spectrum = torch.fft.rfft(waveform[0] * torch.hann_window(16384)).abs()
    # Bands at 1 kHz are 40 Hz wide: the mel tells no more.
    assert abs(spectrum.argmax().item() * 16000 / 16384 - 1000) < 40
    assert waveform.square().mean().sqrt().item() == pytest.approx(0.5 / math.sqrt(2), rel=0.25)


def test_magnitudes_are_not_negative_and_have_the_bands_asked_for():
    mel = log_mel(sounds(), SPEC)
    model = vocoder()
    magnitude = model.magnitude(mel)
    assert magnitude.min() >= 0
    wanted = 10.0**mel
    assert ((model.basis @ magnitude - wanted).norm() / wanted.norm()).item() < 0.02


def test_momentum_converges_further_than_the_classical_algorithm():
    mel = log_mel(sounds(), SPEC)
    start, classical, fast = (spectral_convergence(vocoder(iterations=n, momentum=m), mel) for n, m in ((0, 0.0), (20, 0.0), (20, 0.99)))
    assert fast < 0.9 * classical < 0.5 * start


def test_the_same_mel_gives_the_same_waveform_alone_or_in_a_batch():
    mel, model = log_mel(sounds(), SPEC), vocoder(iterations=8)
    together = model.vocode(mel)
    assert torch.equal(together, model.vocode(mel))
    torch.testing.assert_close(model.vocode(mel[1:2])[0], together[1], rtol=0, atol=1e-3)
    assert not torch.allclose(vocoder(iterations=8, seed=1).vocode(mel), together, atol=1e-2)


def test_silence_stays_silent():
    waveform = vocoder().vocode(log_mel(torch.zeros(1, 8192), SPEC))
    assert waveform.isfinite().all() and waveform.abs().max() < 1e-3


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"mel_basis is \(80, 513\), need \(bands, 1025\)"):
        GriffinLim(MEL_SPECS["mmaudio_44k"], mel_basis(SPEC))
    with pytest.raises(ValueError, match=r"takes log-mels \(B, 80, T\), not \(1, 128, 10\)"):
        vocoder().vocode(torch.zeros(1, 128, 10))
    with pytest.raises(ValueError, match="1 frames are too few, need more than 1"):
        vocoder().vocode(torch.zeros(1, 80, 1))
    with pytest.raises(ValueError, match="momentum is 1.0"):
        GriffinLimConfig(momentum=1.0)
