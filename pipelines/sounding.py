"""The models that give pictures their sound, behind one object: those of a run, or published ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_prep.audio import MEL_SPECS, log_mel, mel_basis
from models.checkpoints import read_checkpoint
from models.codecs.autoencoder import MelVAE, MelVAEConfig
from models.codecs.bigvgan import load_bigvgan
from models.codecs.vocoder import GriffinLim, Vocoder
from models.conditioning import (
    CLIPImageConditioner,
    CLIPTextConditioner,
    CombinedConditioner,
    Conditioner,
    Conditions,
    FrameView,
    SynchformerConditioner,
)
from models.encoders.clip import CLIPConfig
from models.encoders.rewards import Reward
from models.generators.mmdit import MMDiT, MMDiTConfig
from models.objectives.flow_matching import integrate
from models.pretrained import MMAUDIO_VARIANTS, load_clip, load_mmaudio, load_mmaudio_vae, load_synchformer, load_weights
from pipelines.config import Recipe
from pipelines.config.vocoder import VocoderConfig
from pipelines.encoding import file_hash, frozen, latent_length, load_conditioner, own_reward, public_weights
from pipelines.engine.checkpoint import weights_hash
from pipelines.recipes import load_recipe
from pipelines.views import ClipReader, MMAudioReader


class RunError(RuntimeError):
    """A run folder that cannot be used; the message names it and says what is missing."""


@dataclass(frozen=True, kw_only=True)
class PublicFiles:
    """Local copies of the files published with MMAudio and of what it uses."""

    checkpoint: Path
    """Generator: mmaudio_<variant>.pth."""
    vae: Path
    """Autoencoder: v1-16.pth or v1-44.pth."""
    vocoder: Path | None = None
    """BigVGAN: best_netG.pt at 16 kHz, bigvgan_generator.pt at 44.1 kHz. None: fast Griffin-Lim."""
    clip: Path | None = None
    """CLIP, for pictures and prompts: open_clip_pytorch_model.bin. None: neither is taken note of."""
    synchformer: Path | None = None
    """Synchformer: synchformer_state_dict.pth. None: for sound from text alone."""
    variant: str = ""
    """Which of MMAudio's variants the checkpoint is; empty: as its name says."""
    clip_model: CLIPConfig = field(default_factory=CLIPConfig)
    """Which CLIP."""

    def __post_init__(self):
        for name, path in self.given().items():
            if not path.is_file():
                raise ValueError(f"--{name} {path}: no such file")
        if self.resolved_variant not in MMAUDIO_VARIANTS:
            raise ValueError(f"{self.checkpoint}: say which variant it is, --variant {', '.join(MMAUDIO_VARIANTS)}")

    def given(self) -> dict[str, Path]:
        """The files that are there, by name."""
        return {name: path for name in ("checkpoint", "vae", "vocoder", "clip", "synchformer") if (path := getattr(self, name))}

    @property
    def resolved_variant(self) -> str:
        """The variant, by the option or the checkpoint's name."""
        return self.variant or self.checkpoint.stem.removeprefix("mmaudio_")

    @property
    def rate(self) -> str:
        """Preset of autoencoder and vocoder: "16k" or "44k"."""
        return "16k" if "16k" in self.resolved_variant else "44k"


@dataclass
class SoundModel:
    """Conditioner, generator, autoencoder and vocoder, and how they are used."""

    generator: MMDiT
    vae: MelVAE
    vocoder: Vocoder
    front_end: str
    """Log-mels that the autoencoder codes, by their name in data_prep.audio."""
    seconds: float
    """Length of clip that the generator was trained on."""
    device: torch.device
    steps: int = 25
    """Euler steps."""
    guidance: float = 4.5
    """Strength of classifier-free guidance; 1 is without."""
    conditioner: Conditioner | None = None
    """None where conditions are given."""
    read: ClipReader | MMAudioReader | None = None
    """How video files are read for the conditioner."""
    reward: Reward | None = None
    """The encoder that judges sounds: the run's own, where it has one."""
    recipe: Recipe | None = None
    """Of the run."""
    provenance: dict[str, str] = field(default_factory=dict)
    """What the models are: hashes of their weights."""

    @classmethod
    def from_run(cls, run: Path, device: torch.device, stage: str | None = None, sees: bool = True) -> SoundModel:
        """Load the exports of a run; `stage` is the folder of the generator below it, by default as in `generator_export`."""
        recipe, export = load_recipe(require(run / "recipe.yaml")), generator_export(run, stage)
        generator = frozen(load_weights(MMDiT, MMDiTConfig, export), device)
        model = cls.around(generator, recipe, run, device, sees)
        model.provenance = {"generator": weights_hash(export), **_hashes(recipe, run, sees)}
        return model

    @classmethod
    def around(cls, generator: MMDiT, recipe: Recipe, run: Path, device: torch.device, sees: bool = True,
               judges: bool = True) -> SoundModel:
        """A generator with the models of a run, but for the encoders of pictures where it need not see, or of the reward."""
        export = require(run / "autoencoder" / "export")
        if sees and recipe.conditioning.uses_own:
            require(run / "features" / "conditioner")
        vae, conditioner = load_weights(MelVAE, MelVAEConfig, export), load_conditioner(recipe, run) if sees else None
        reward, options, clip = own_reward(conditioner, run) if judges else None, recipe.generative, recipe.clip
        reader = ClipReader(fps=clip.fps, size=clip.size, short_side=recipe.preparation.format.short_side)
        return cls(generator, frozen(vae, device), vocoder(recipe).to(device), recipe.autoencoder.mel, clip.seconds, device,
                   steps=options.sampling_steps, guidance=options.guidance, conditioner=conditioner and frozen(conditioner, device),
                   read=reader, reward=reward and frozen(reward, device), recipe=recipe)

    @classmethod
    def from_public(cls, files: PublicFiles, device: torch.device) -> SoundModel:
        """MMAudio from its published files, used as its own inference does."""
        generator = load_mmaudio(read_checkpoint(files.checkpoint), files.resolved_variant)
        vae, mel = load_mmaudio_vae(read_checkpoint(files.vae), files.rate), f"mmaudio_{files.rate}"
        generator, vae, conditioner = (frozen(model, device) for model in (generator, vae, _public_conditioner(files)))
        return cls(generator, vae, _public_vocoder(files, mel).to(device), mel, 8.0, device, conditioner=conditioner, read=MMAudioReader(),
                   provenance={name: file_hash(path) for name, path in files.given().items()})

    @property
    def sample_rate(self) -> int:
        """Of the sounds, Hz."""
        return MEL_SPECS[self.front_end].sample_rate

    @property
    def views(self) -> tuple[FrameView, ...]:
        """Pictures that the conditioner wants to see."""
        return self.conditioner.views

    def window(self, length: float) -> float:
        """Seconds of a window over a video of `length`: the training length. MMAudio takes a short video as long as it is."""
        return min(self.seconds, length) if isinstance(self.read, MMAudioReader) else self.seconds

    @torch.no_grad()
    def see(self, pictures: dict[FrameView, torch.Tensor]) -> Conditions:
        """Conditions (1, ...) of the pictures (T, C, H, W) uint8 of one video."""
        return self.conditioner.conditions({view: frames[None].to(self.device).float() / 255 for view, frames in pictures.items()})

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> torch.Tensor | None:
        """Text tokens (B, Tt, Dt); None from a model without text encoder, which can take no prompt."""
        if "text" in self.conditioner.fills:
            return self.conditioner.conditions({}, list(prompts)).text
        if any(prompts):
            raise ValueError("there is no text encoder for a prompt: name one (--clip), or train with conditioning.text=clip")
        return None

    @torch.no_grad()
    def latents(self, conditions: Conditions, noise: torch.Tensor, negative: torch.Tensor | None = None, steps: int | None = None,
                guidance: float | None = None, seconds: float | None = None) -> torch.Tensor:
        """Noise (B, N, C) -> latents (B, N, C) in the autoencoder's scale, by Euler steps with guidance away from `negative` text.

        `seconds` of sound decide how long conditions are that are missing; by default those of a training clip.
        """
        strength = self.guidance if guidance is None else guidance
        lengths = self.condition_lengths(self.seconds if seconds is None else seconds)
        flow = self.generator.guidance(noise.shape[:2], conditions.clip, conditions.sync, conditions.text, strength, negative, lengths)
        return self.generator.unnormalise(integrate(flow, noise, steps or self.steps))

    @torch.no_grad()
    def mel(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, N, C) -> log-mel (B, F, 2N)."""
        return self.vae.decode(latents.transpose(1, 2))

    @torch.no_grad()
    def waveform(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, N, C) -> waveform (B, samples) in [-1, 1]."""
        return self.vocoder.vocode(self.mel(latents)).clamp(-1, 1)

    @torch.no_grad()
    def hear(self, waveform: torch.Tensor) -> torch.Tensor:
        """Waveform (B, samples) -> segment embeddings (B, S, D) of the reward encoder."""
        return self.reward.encode_audio(log_mel(waveform, self.reward.config.mel)).segments

    def similarities(self, segments: torch.Tensor, waveform: torch.Tensor) -> torch.Tensor:
        """Cosines (B, S) between a video's segment embeddings (B, S, D) and those of a waveform (B, samples): the reward's raw material."""
        return self.reward.similarity(segments, self.hear(waveform))

    def condition_lengths(self, seconds: float) -> tuple[int, int]:
        """Tokens of frames and of synchrony for `seconds`: as the conditioner makes them, else as the generator was trained with."""
        clip, sync = self.generator.config.lengths_at(seconds / self.seconds)
        try:
            sizes = self.conditioner.sizes(seconds) if self.conditioner else {}
        except ValueError:  # too short to be seen, but not for sound from text alone
            sizes = {}
        return sizes.get("clip_len", clip), sizes.get("sync_len", sync)

    def noise(self, count: int, seconds: float, seed: int) -> torch.Tensor:
        """Starting noise (count, N, C) of a seed, the same on every device."""
        shape = (count, latent_length(seconds, self.front_end), self.generator.config.latent_dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)


def vocoder(recipe: Recipe) -> Vocoder:
    """The vocoder of a recipe."""
    return _make_vocoder(recipe.vocoder, recipe.autoencoder.mel)


def _public_conditioner(files: PublicFiles) -> CombinedConditioner:
    slots = {}
    if files.clip:
        clip = load_clip(files.clip, files.clip_model)
        slots |= {"clip": CLIPImageConditioner(clip, size=files.clip_model.picture_size), "text": CLIPTextConditioner(clip)}
    if files.synchformer:
        slots["sync"] = SynchformerConditioner(load_synchformer(read_checkpoint(files.synchformer)))
    return CombinedConditioner(**slots)


def _public_vocoder(files: PublicFiles, mel: str) -> Vocoder:
    config = VocoderConfig() if files.vocoder is None else VocoderConfig(kind="bigvgan", weights=str(files.vocoder), preset=files.rate)
    return _make_vocoder(config, mel)


def _make_vocoder(config: VocoderConfig, mel: str) -> Vocoder:
    config.check_mel(mel)
    if config.kind == "bigvgan":
        if not Path(config.weights).is_file():
            raise ValueError(f"vocoder.weights is {config.weights}: no such file; download the checkpoint and name it there")
        return load_bigvgan(config.weights, config.preset)
    return GriffinLim(MEL_SPECS[mel], torch.as_tensor(mel_basis(MEL_SPECS[mel])), config)


def _hashes(recipe: Recipe, run: Path, sees: bool) -> dict[str, str]:
    found = {"autoencoder": weights_hash(run / "autoencoder" / "export")}
    if sees and recipe.conditioning.uses_own:
        found["conditioner"] = weights_hash(run / "features" / "conditioner")
    paths = public_weights(recipe) if sees else {}
    paths |= {"vocoder": recipe.vocoder.weights} if recipe.vocoder.weights else {}
    return found | {name: file_hash(path) for name, path in paths.items()}


def generator_export(run: Path, stage: str | None = None) -> Path:
    """Folder of a run's generator: `stage` where one is named, else the preference round that was kept, as preference/best.json says.

    Without that file it is the last round that is complete, else the generative stage.
    """
    if stage:
        return require(run / stage / "export")
    best = run / "preference" / "best.json"
    if best.exists():
        kept = json.loads(best.read_text())["round"]
        return require(run / (f"preference/round-{kept}" if kept else "generative") / "export")
    rounds = sorted(run.glob("preference/round-*/export/complete.json"), key=lambda path: int(path.parts[-3].rpartition("-")[2]))
    return rounds[-1].parent if rounds else require(run / "generative" / "export")


def require(path: Path) -> Path:
    """`path`, or RunError saying that the run has not come that far."""
    if not path.exists():
        raise RunError(f"{path} is missing: finish the run with `foleyscale run` first")
    return path
