"""From pictures to sound: a run's models behind one object, for videos of any length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep.audio import MEL_SPECS, log_mel, mel_basis
from data_prep.frames import resize
from data_prep.media import mux, probe, read_video
from models.codecs.autoencoder import MelVAE, MelVAEConfig
from models.codecs.vocoder import GriffinLim
from models.conditioning import Conditions, EncoderConditioner
from models.generators.mmdit import MMDiT, MMDiTConfig
from models.objectives.flow_matching import integrate
from models.pretrained import load_weights
from pipelines.config import Recipe
from pipelines.features import load_conditioner
from pipelines.recipes import load_recipe


class RunError(RuntimeError):
    """A run folder that cannot be used; the message names it and says what is missing."""


@dataclass
class SoundModel:
    """Conditioner, generator, autoencoder and vocoder of a run."""

    recipe: Recipe
    conditioner: EncoderConditioner
    generator: MMDiT
    vae: MelVAE
    vocoder: GriffinLim
    device: torch.device

    @classmethod
    def from_run(cls, run: Path, device: torch.device, stage: str | None = None) -> SoundModel:
        """Load the exports of a run; `stage` is the folder of the generator below it, by default the last one that is complete."""
        recipe = load_recipe(require(run / "recipe.yaml"))
        generator = load_weights(MMDiT, MMDiTConfig, generator_export(run, stage))
        return cls.around(generator.to(device).eval().requires_grad_(False), recipe, run, device)

    @classmethod
    def around(cls, generator: MMDiT, recipe: Recipe, run: Path, device: torch.device) -> SoundModel:
        """A generator with the conditioner, autoencoder and vocoder of a run."""
        vae = load_weights(MelVAE, MelVAEConfig, require(run / "autoencoder" / "export"))
        conditioner = load_conditioner(require(run / "features" / "conditioner"))
        conditioner, vae = (model.to(device).eval().requires_grad_(False) for model in (conditioner, vae))
        return cls(recipe, conditioner, generator, vae, vocoder(recipe).to(device), device)

    @torch.no_grad()
    def latents(self, conditions: Conditions, noise: torch.Tensor) -> torch.Tensor:
        """Noise (B, N, C) -> latents (B, N, C) in the autoencoder's scale, by Euler steps with guidance."""
        options = self.recipe.generative

        def flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.generator.guided_flow(x, t, conditions.clip, conditions.sync, conditions.text, options.guidance)

        return self.generator.unnormalise(integrate(flow, noise, options.sampling_steps))

    @torch.no_grad()
    def mel(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, N, C) -> log-mel (B, F, 2N)."""
        return self.vae.decode(latents.transpose(1, 2))

    @torch.no_grad()
    def waveform(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, N, C) -> waveform (B, samples) in [-1, 1]."""
        return self.vocoder.vocode(self.mel(latents)).clamp(-1, 1)

    @torch.no_grad()
    def similarities(self, segments: torch.Tensor, waveform: torch.Tensor) -> torch.Tensor:
        """Cosines (B, S) between a video's segment embeddings (B, S, D) and those of a waveform (B, samples): the reward's raw material."""
        encoder = self.conditioner.encoder
        audio = encoder.encode_audio(log_mel(waveform, encoder.config.mel))
        return encoder.similarity(segments, audio.segments)

    def latent_length(self, seconds: float) -> int:
        """Latents of `seconds` of sound."""
        spec = MEL_SPECS[self.recipe.autoencoder.mel]
        return math.ceil(seconds * spec.sample_rate / spec.hop / 2)

    def noise(self, count: int, seconds: float, seed: int) -> torch.Tensor:
        """Starting noise (count, N, C) of a seed."""
        shape = (count, self.latent_length(seconds), self.generator.config.latent_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)


def vocoder(recipe: Recipe) -> GriffinLim:
    """The vocoder of a recipe."""
    spec = MEL_SPECS[recipe.autoencoder.mel]
    return GriffinLim(spec, torch.as_tensor(mel_basis(spec)), recipe.vocoder)


def generate_sound(model: SoundModel, frames: np.ndarray, seconds: float, seed: int = 0, overlap: float = 0.64) -> np.ndarray:
    """Waveform of exactly `seconds` for frames (T, H, W, C) uint8 at the recipe's rate.

    Longer videos are sounded in windows of the training length that overlap by `overlap` seconds and are cross-faded.
    """
    clip = model.recipe.clip
    rate, window = clip.sample_rate, round(clip.seconds * clip.fps)
    frames = _square(frames, clip.size)
    pieces = []
    for number, start in enumerate(window_starts(len(frames), window, round(overlap * clip.fps))):
        piece = _padded(frames[start:start + window], window)
        pixels = torch.from_numpy(piece).permute(0, 3, 1, 2)[None].to(model.device).float() / 255
        with torch.no_grad():
            conditions, _ = model.conditioner(pixels)
        waveform = model.waveform(model.latents(conditions, model.noise(1, clip.seconds, seed + number)))
        pieces.append((round(start / clip.fps * rate), waveform[0].cpu().numpy()))
    return cross_fade(pieces, round(seconds * rate))


def generate_file(model: SoundModel, video: Path, out: Path, seed: int = 0) -> np.ndarray:
    """Give a video file its sound: its pictures are copied packet by packet, not re-encoded."""
    seconds = probe(str(video)).duration
    frames = read_video(str(video), fps=model.recipe.clip.fps, short_side=model.recipe.clip.size, crop=True)
    waveform = generate_sound(model, frames, seconds, seed)
    mux(str(video), waveform, model.recipe.clip.sample_rate, str(out))
    return waveform


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """First frames of windows that cover `length` frames, neighbours overlapping by at least `overlap`; the last ends with the video."""
    if length <= window:
        return [0]
    count = math.ceil((length - overlap) / (window - overlap))
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def cross_fade(pieces: list[tuple[int, np.ndarray]], samples: int) -> np.ndarray:
    """Lay waveforms at their first samples into one of `samples`, fading linearly where they overlap."""
    total, weight = np.zeros(samples, np.float32), np.zeros(samples, np.float32)
    for (start, waveform), (before, after) in zip(pieces, _neighbours(pieces), strict=True):
        ramp = np.ones(len(waveform), np.float32)
        if before:
            ramp[:before] = np.linspace(0, 1, before + 2, dtype=np.float32)[1:-1]
        if after:
            ramp[-after:] = np.minimum(ramp[-after:], np.linspace(1, 0, after + 2, dtype=np.float32)[1:-1])
        size = max(0, min(len(waveform), samples - start))
        total[start:start + size] += (waveform * ramp)[:size]
        weight[start:start + size] += ramp[:size]
    return total / np.maximum(weight, 1e-6)


def _neighbours(pieces: list[tuple[int, np.ndarray]]) -> Iterator[tuple[int, int]]:
    """Overlap in samples of each piece with the one before and the one after."""
    overlaps = [max(0, start + len(waveform) - following) for (start, waveform), (following, _) in zip(pieces, pieces[1:], strict=False)]
    yield from zip([0, *overlaps], [*overlaps, 0], strict=True)


def _square(frames: np.ndarray, size: int) -> np.ndarray:
    if frames.shape[1:3] == (size, size):
        return frames
    return resize(torch.from_numpy(frames).permute(0, 3, 1, 2), size, crop=True).permute(0, 2, 3, 1).numpy()


def _padded(frames: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([frames, np.repeat(frames[-1:], count - len(frames), axis=0)]) if len(frames) < count else frames


def generator_export(run: Path, stage: str | None = None) -> Path:
    """Folder of a run's generator: the last preference round that is complete, else the generative stage, else that named."""
    if stage:
        return require(run / stage / "export")
    rounds = sorted(run.glob("preference/round-*/export/complete.json"), key=lambda path: int(path.parts[-3].rpartition("-")[2]))
    return rounds[-1].parent if rounds else require(run / "generative" / "export")


def require(path: Path) -> Path:
    """`path`, or RunError saying that the run has not come that far."""
    if not path.exists():
        raise RunError(f"{path} is missing: finish the run with `foleyscale run` first")
    return path
