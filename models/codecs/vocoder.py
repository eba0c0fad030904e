"""From log-mels to waveforms: what every vocoder offers, and one that needs no trained network, fast Griffin-Lim
(Perraudin, Balazs and Sondergaard 2013)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GriffinLim", "GriffinLimConfig", "LogMelSpec", "Vocoder"]

_FEW = 4
"""Waveforms that a CPU inverts at once: spectra of many leave its cache in every iteration, which takes twice as long."""


class Vocoder(Protocol):
    """Whatever turns log-mels into sound."""

    name: str
    """Says which vocoder made a file: metrics of waveforms depend on it."""

    def vocode(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, F, T) as the vocoder's own front end makes it, base of the logarithm included -> waveform (B, T * hop)."""
        ...


class LogMelSpec(Protocol):
    """The front end to invert, such as a data_prep.audio.MelSpec: frames of T = N // hop, reflected by (n_fft - hop) / 2 at the ends."""

    n_fft: int
    """Samples per Fourier transform."""
    hop: int
    """Samples between frames."""
    win: int
    """Samples under the Hann window, centred within n_fft."""
    log: str
    """"ln" or "log10"."""


@dataclass(frozen=True, kw_only=True)
class GriffinLimConfig:
    """Effort of the inversion."""

    iterations: int = 32
    """Projections between consistent spectra and spectra of the wanted magnitude."""
    momentum: float = 0.99
    """Overshoot of each step (alpha in the paper); 0 is the classical algorithm."""
    inversion_steps: int = 30
    """Multiplicative updates from mel bands to non-negative magnitudes of all frequencies."""
    seed: int = 0
    """Of the random phases it starts from; the same for every waveform."""

    def __post_init__(self):
        if self.iterations < 0 or self.inversion_steps < 0:
            raise ValueError("GriffinLimConfig.iterations, inversion_steps: give values of at least 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"GriffinLimConfig.momentum is {self.momentum}: choose a value from 0 up to, not including, 1")


class GriffinLim(nn.Module):
    """Waveforms whose log-mels come close to the given ones; deterministic, and the same alone as in a batch.

    `mel_basis` (bands, n_fft / 2 + 1) holds the filters of the front end: data_prep.audio.mel_basis(spec).
    """

    name = "griffin_lim"

    def __init__(self, spec: LogMelSpec, mel_basis: Tensor, config: GriffinLimConfig | None = None):
        super().__init__()
        self.spec, self.config = spec, config or GriffinLimConfig()
        basis = torch.as_tensor(mel_basis, dtype=torch.float32)
        if basis.dim() != 2 or basis.shape[1] != spec.n_fft // 2 + 1:
            raise ValueError(f"GriffinLim: mel_basis is {tuple(basis.shape)}, need (bands, {spec.n_fft // 2 + 1}) for n_fft {spec.n_fft}")
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(basis), persistent=False)
        margin = spec.n_fft - spec.win
        window = F.pad(torch.hann_window(spec.win), (margin // 2, margin - margin // 2))
        self.register_buffer("window", window, persistent=False)

    @torch.no_grad()
    def vocode(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, F, T) -> waveform (B, T * hop), float32."""
        if log_mel.dim() != 3 or log_mel.shape[1] != len(self.basis):
            raise ValueError(f"GriffinLim takes log-mels (B, {len(self.basis)}, T), not {tuple(log_mel.shape)}")
        if log_mel.shape[2] * self.spec.hop <= self._pad:
            raise ValueError(f"GriffinLim: {log_mel.shape[2]} frames are too few, need more than {self._pad // self.spec.hop}")
        parts = log_mel.float().split(_FEW if log_mel.device.type == "cpu" else max(1, len(log_mel)))
        return torch.cat([self._with_phases(self.magnitude(part)) for part in parts])

    def magnitude(self, log_mel: Tensor) -> Tensor:
        """Non-negative magnitudes (B, n_fft / 2 + 1, T) whose mel bands match: least squares by Lee and Seung's updates."""
        scale = math.log(10) if self.spec.log == "log10" else 1.0
        mel = (log_mel * scale).exp()
        wanted = self.basis.T @ mel
        # A multiplicative update cannot leave zero, so the clipped pseudo-inverse is lifted a little wherever there is energy.
        magnitude = (self.inverse @ mel).clamp(min=0) + 1e-2 * wanted
        for _ in range(self.config.inversion_steps):
            magnitude = magnitude * wanted / (self.basis.T @ (self.basis @ magnitude)).clamp(min=1e-12)
        return magnitude

    def _with_phases(self, magnitude: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed)
        angles = 2 * math.pi * torch.rand(magnitude.shape[1:], generator=generator)
        spectrum = torch.polar(magnitude, angles.to(magnitude.device).expand_as(magnitude))
        previous = torch.zeros_like(spectrum)
        for _ in range(self.config.iterations):
            consistent = self._spectrum(self._waveform(spectrum))
            ahead = consistent + self.config.momentum * (consistent - previous)
            spectrum, previous = magnitude * torch.sgn(ahead), consistent
        return self._waveform(spectrum)

    @property
    def _pad(self) -> int:
        return (self.spec.n_fft - self.spec.hop) // 2

    def _spectrum(self, waveform: Tensor) -> Tensor:
        padded = F.pad(waveform, (self._pad, self._pad), mode="reflect")
        return torch.stft(padded, self.spec.n_fft, self.spec.hop, window=self.window, center=False, return_complex=True)

    def _waveform(self, spectrum: Tensor) -> Tensor:
        """Least-squares overlap-add. torch.istft refuses windows that vanish at an uncentred first sample."""
        frames = torch.fft.irfft(spectrum.transpose(1, 2), n=self.spec.n_fft) * self.window
        weight = self.window.square().expand(1, spectrum.shape[2], -1)
        waveform, weight = self._overlap_add(frames), self._overlap_add(weight)
        return (waveform / weight.clamp(min=1e-8))[:, self._pad : self._pad + spectrum.shape[2] * self.spec.hop]

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """Frames (B, T, n_fft), `hop` apart, to their sum (B, (T - 1) hop + n_fft or a little more), one hop of each frame at a time:
        many times faster than `F.fold`."""
        hop, count = self.spec.hop, frames.shape[1]
        parts = F.pad(frames, (0, -self.spec.n_fft % hop)).unflatten(2, (-1, hop))
        total = frames.new_zeros(len(frames), count + parts.shape[2] - 1, hop)
        for number in range(parts.shape[2]):
            total[:, number : number + count] += parts[:, :, number]
        return total.flatten(1)
