"""Resampling and the named log-mel front ends."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import soxr
import torch

__all__ = ["MEL_SPECS", "MelSpec", "hertz_to_mel", "log_mel", "mel_basis", "mel_to_hertz", "mel_spec", "resample"]


@dataclass(frozen=True, kw_only=True)
class MelSpec:
    """One log-mel front end; hashable, so that its filter bank is built once."""

    sample_rate: int
    """Hz of the waveforms it takes."""
    n_fft: int
    """Samples per Fourier transform."""
    hop: int
    """Samples between frames."""
    win: int
    """Samples under the Hann window, centred within n_fft."""
    bands: int
    """Number of mel bands F."""
    fmin: float = 0.0
    """Hz, lower edge of the first band."""
    fmax: float
    """Hz, upper edge of the last band."""
    log: str = "ln"
    """Logarithm of the clamped magnitudes: "ln" or "log10"."""
    floor: float = 1e-5
    """Smallest magnitude before the logarithm."""

    def __post_init__(self):
        if not 0 < self.win <= self.n_fft:
            raise ValueError(f"MelSpec.win is {self.win}: choose 1 to n_fft ({self.n_fft})")
        if not 0 < self.hop <= self.n_fft or (self.n_fft - self.hop) % 2:
            raise ValueError(f"MelSpec.hop is {self.hop}: choose 1 to n_fft ({self.n_fft}) with n_fft - hop even")
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(f"MelSpec.fmin, fmax are {self.fmin}, {self.fmax}: need 0 <= fmin < fmax <= {self.sample_rate / 2}")
        if self.log not in ("ln", "log10"):
            raise ValueError(f"MelSpec.log is {self.log!r}: choose 'ln' or 'log10'")
        if self.bands < 1 or self.floor <= 0:
            raise ValueError(f"MelSpec.bands, floor are {self.bands}, {self.floor}: both must be positive")

    @property
    def pad(self) -> int:
        """Samples reflected at either end, so that N samples give exactly N // hop frames."""
        return (self.n_fft - self.hop) // 2

    def frames(self, samples: int) -> int:
        """Number of mel frames T of a waveform of `samples`."""
        return samples // self.hop


MEL_SPECS: dict[str, MelSpec] = {
    # MMAudio, both published codecs: the 16 kHz one takes log10, the 44.1 kHz one the natural logarithm.
    "mmaudio_16k": MelSpec(sample_rate=16000, n_fft=1024, hop=256, win=1024, bands=80, fmax=8000.0, log="log10"),
    "mmaudio_44k": MelSpec(sample_rate=44100, n_fft=2048, hop=512, win=2048, bands=128, fmax=22050.0, log="ln"),
    # SF-CAVP's paper names no front end. Ours: 10 ms hops (4 to a frame at 25 fps) and a 25 ms window for sharp onsets,
    # as Synchformer has; n_fft above the window because the lowest bands are 23 Hz apart: at n_fft 512 some hold no bin.
    "sf_cavp": MelSpec(sample_rate=16000, n_fft=1024, hop=160, win=400, bands=128, fmax=8000.0, log="ln"),
    # The same frames and bands for sound at 44.1 kHz. An odd hop takes an odd n_fft: 50 ms, of small prime factors. Magnitudes grow
    # with n_fft, so these log-mels lie ln(2205 / 1024) = 0.77 higher.
    "sf_cavp_44k": MelSpec(sample_rate=44100, n_fft=2205, hop=441, win=1103, bands=128, fmax=8000.0, log="ln"),
}


def mel_spec(spec: str | MelSpec) -> MelSpec:
    """The front end of that name, or `spec` itself."""
    if isinstance(spec, MelSpec):
        return spec
    if spec not in MEL_SPECS:
        raise ValueError(f"no mel front end {spec!r}: choose one of {', '.join(MEL_SPECS)}")
    return MEL_SPECS[spec]


# Slaney's mel scale (Auditory Toolbox): linear at 200/3 Hz per mel up to 1 kHz, then 27 equal log steps per factor 6.4.
_HERTZ_PER_MEL, _BREAK_HERTZ, _LOG_STEP = 200.0 / 3.0, 1000.0, np.log(6.4) / 27.0
_BREAK_MEL = _BREAK_HERTZ / _HERTZ_PER_MEL


def hertz_to_mel(hertz: np.ndarray | float) -> np.ndarray:
    """Slaney mel of a frequency in Hz."""
    hertz = np.asarray(hertz, dtype=np.float64)
    above = _BREAK_MEL + np.log(np.maximum(hertz, _BREAK_HERTZ) / _BREAK_HERTZ) / _LOG_STEP
    return np.where(hertz < _BREAK_HERTZ, hertz / _HERTZ_PER_MEL, above)


def mel_to_hertz(mel: np.ndarray | float) -> np.ndarray:
    """Frequency in Hz of a Slaney mel."""
    mel = np.asarray(mel, dtype=np.float64)
    above = _BREAK_HERTZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _HERTZ_PER_MEL, above)


def mel_basis(spec: str | MelSpec) -> np.ndarray:
    """Triangular filters (bands, n_fft // 2 + 1), float32, each of unit area in Hz (Slaney's normalisation)."""
    spec = mel_spec(spec)
    # The last bin of an odd n_fft lies below half the sample rate.
    bins = np.linspace(0.0, spec.n_fft // 2 * spec.sample_rate / spec.n_fft, spec.n_fft // 2 + 1)
    edges = mel_to_hertz(np.linspace(hertz_to_mel(spec.fmin), hertz_to_mel(spec.fmax), spec.bands + 2))
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clip(min=0.0)
    return (triangles * 2.0 / (right - left)).astype(np.float32)


@functools.lru_cache(maxsize=32)
def _constants(spec: MelSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # The cache outlives the caller's mode: tensors made under inference_mode could never take part in a backward pass.
    with torch.inference_mode(False):
        return torch.from_numpy(mel_basis(spec)).to(device), torch.hann_window(spec.win, device=device)


def _reflect(waveform: torch.Tensor, pad: int) -> torch.Tensor:
    return torch.cat([waveform[:, 1 : pad + 1].flip(1), waveform, waveform[:, -pad - 1 : -1].flip(1)], dim=1)


def log_mel(waveform: torch.Tensor, spec: str | MelSpec) -> torch.Tensor:
    """Log-mel magnitudes (B, F, T) of a waveform (B, N) in [-1, 1], T = N // hop exactly; float32, differentiable."""
    spec = mel_spec(spec)
    if waveform.dim() != 2:
        raise ValueError(f"log_mel takes a waveform (B, N), not {tuple(waveform.shape)}: add or flatten dimensions")
    least = max(spec.pad + 1, spec.hop)
    if waveform.shape[1] < least:
        raise ValueError(f"log_mel needs at least {least} samples, got {waveform.shape[1]}: pad the waveform")
    basis, window = _constants(spec, waveform.device)
    # Half precision loses quiet bands below the floor: transform and filter bank stay in float32 under autocast as well.
    with torch.autocast(waveform.device.type, enabled=False):
        padded = _reflect(waveform.float(), spec.pad)
        spectrum = torch.stft(padded, spec.n_fft, spec.hop, spec.win, window, center=False, return_complex=True)
        # The offset keeps the square root differentiable at silence (MMAudio's value, so part of its front end).
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
        mel = (basis @ magnitude).clamp(min=spec.floor)
        return mel.log10() if spec.log == "log10" else mel.log()


def resample(waveform: np.ndarray | torch.Tensor, orig: int, new: int) -> np.ndarray | torch.Tensor:
    """Waveform (N,) or (B, N) from `orig` to `new` Hz by soxr's high-quality filter; same type as given, float32."""
    if orig <= 0 or new <= 0:
        raise ValueError(f"resample: rates must be positive, got {orig} and {new}")
    if waveform.ndim not in (1, 2):
        raise ValueError(f"resample takes (N,) or (B, N), not {tuple(waveform.shape)}")
    if isinstance(waveform, torch.Tensor):
        return torch.from_numpy(resample(waveform.detach().cpu().numpy(), orig, new)).to(waveform.device)
    waveform = np.ascontiguousarray(waveform, dtype=np.float32)
    if orig == new:
        return waveform
    # soxr wants time first.
    return np.ascontiguousarray(soxr.resample(waveform.T, orig, new, quality="HQ").T)
