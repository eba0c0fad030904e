"""The encoders that a recipe names, and what they make of its clips: latents, conditions, and what the reward compares."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from data_prep.audio import MEL_SPECS, log_mel
from data_prep.decoding import ClipDecoder
from models.checkpoints import read_checkpoint
from models.codecs.autoencoder import MelVAE, MelVAEConfig
from models.conditioning import (
    CLIPImageConditioner,
    CLIPTextConditioner,
    CombinedConditioner,
    Conditioner,
    Conditions,
    EncoderConditioner,
    FrameView,
    SynchformerConditioner,
)
from models.encoders import synchformer
from models.encoders.clip import CLIP
from models.encoders.rewards import Reward
from models.encoders.sf_cavp import SFCAVP, SFCAVPConfig
from models.encoders.synchformer import Synchformer
from models.pretrained import load_clip, load_synchformer, load_weights
from pipelines.config import Recipe
from pipelines.engine.checkpoint import EXPORTED
from pipelines.views import ViewDecoder, views_of

M = TypeVar("M", bound=nn.Module)


def needed_stages(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """Stages that must be complete before `stage`: a contrastive one where its encoder conditions the generator or gives the reward."""
    if stage == "generative":
        return ("autoencoder", "contrastive") if needs_contrastive(recipe) else ("autoencoder",)
    return {"preference": ("contrastive", "generative")}.get(stage, ())


def needs_contrastive(recipe: Recipe) -> bool:
    """Whether a run has a use for its contrastive stage."""
    return recipe.conditioning.uses_own or recipe.preference.rounds > 0


def latent_length(seconds: float, mel: str) -> int:
    """Latents of `seconds` of sound; whole ones, so at 44.1 kHz they last a little longer (8 s: 345, of 353,280 samples)."""
    spec = MEL_SPECS[mel]
    return math.ceil(round(seconds * spec.sample_rate / spec.hop / 2, 6))


def generator_sizes(recipe: Recipe) -> dict[str, int]:
    """Fields of MMDiTConfig that the clips, the autoencoder and the encoders decide. No weights are read."""
    with torch.device("meta"):
        conditions = _combined(recipe, *_empty_encoders(recipe)).sizes(recipe.clip.seconds)
    length = latent_length(recipe.clip.seconds, recipe.autoencoder.mel)
    return {**conditions, "latent_len": length, "latent_dim": recipe.autoencoder.model.latent_dim}


def load_conditioner(recipe: Recipe, run: Path) -> Conditioner:
    """The conditioner that a recipe names, with its weights; the run's own encoder as its features were made with."""
    config = recipe.conditioning
    own = load_own(run / "features" / "conditioner") if config.uses_own else None
    clip = load_recipe_clip(recipe) if config.uses_clip else None
    sync = load_synchformer(read_checkpoint(_found(config.synchformer_weights, "synchformer"))) if config.sync == "synchformer" else None
    return _combined(recipe, own, clip, sync)


def load_recipe_clip(recipe: Recipe) -> CLIP:
    """The CLIP of a recipe."""
    return load_clip(_found(recipe.conditioning.clip_weights, "clip"), recipe.conditioning.clip_model)


def load_own(folder: Path) -> EncoderConditioner:
    """The contrastive encoder of a run with its standardisation."""
    return load_weights(lambda config: EncoderConditioner(SFCAVP(config)), SFCAVPConfig, folder)


def own_reward(conditioner: Conditioner | None, run: Path) -> SFCAVP | None:
    """The run's own encoder as reward: that of the conditioner, else the contrastive stage's; None in a run without one."""
    modules = () if conditioner is None else conditioner.modules()
    own = next((module.encoder for module in modules if isinstance(module, EncoderConditioner)), None)
    export = run / "contrastive" / "export"
    return own if own is not None or not (export / EXPORTED).exists() else load_weights(SFCAVP, SFCAVPConfig, export)


def public_weights(recipe: Recipe) -> dict[str, str]:
    """Checkpoints of public encoders that a recipe uses, by name."""
    config, used = recipe.conditioning, {}
    if config.uses_clip:
        used["clip"] = config.clip_weights
    if config.sync == "synchformer":
        used["synchformer"] = config.synchformer_weights
    return used


def file_hash(path: str | Path) -> str:
    """sha256 of a checkpoint; gigabytes are read once in a process, as long as the file stays as it is."""
    status = Path(path).stat()
    return _hash(Path(path).resolve(), status.st_size, status.st_mtime_ns)


@lru_cache
def _hash(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _found(path: str, name: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"conditioning.{name}_weights is {path}: no such file; download the checkpoint and name it there")
    return path


def _empty_encoders(recipe: Recipe) -> tuple:
    config = recipe.conditioning
    own = EncoderConditioner(SFCAVP(recipe.contrastive.model)) if config.uses_own else None
    clip = CLIP(config.clip_model) if config.uses_clip else None
    return own, clip, Synchformer(synchformer.PRESETS["divided_224_16x4"]) if config.sync == "synchformer" else None


def _combined(recipe: Recipe, own: EncoderConditioner | None, clip: CLIP | None, sync: Synchformer | None) -> CombinedConditioner:
    config = recipe.conditioning
    makers = {
        "clip": {"own": lambda: own, "clip": lambda: CLIPImageConditioner(clip, size=config.clip_model.picture_size)},
        "sync": {"own": lambda: own, "synchformer": lambda: SynchformerConditioner(sync)},
        "text": {"clip": lambda: CLIPTextConditioner(clip)},
    }
    return CombinedConditioner(**{slot: makers[slot][getattr(config, slot)]() for slot in config.slots})


def reward_view(reward: Reward) -> FrameView:
    """Pictures that the reward wants to see."""
    return FrameView(fps=reward.config.fps)


def view_decoder(recipe: Recipe, views: tuple[FrameView, ...], want: tuple[str, ...]) -> ViewDecoder:
    """Decoder of the beginning of each clip; the sound lasts until the end of its last latent."""
    clip, spec = recipe.clip, MEL_SPECS[recipe.autoencoder.mel]
    seconds = 2 * latent_length(clip.seconds, recipe.autoencoder.mel) * spec.hop / spec.sample_rate
    media = ClipDecoder(seconds=seconds, fps=clip.fps, sample_rate=clip.sample_rate, want=want, backend=clip.backend,
                        columns=("caption", "labels"))
    return ViewDecoder(clip=media, views=views if "frames" in want else (), seconds=clip.seconds, size=clip.size)


def frozen(model: M, device: torch.device) -> M:
    """The model on the device, not to be trained."""
    return model.to(device).eval().requires_grad_(False)


@dataclass
class ClipEncoder:
    """Clips of shards -> the arrays that the generator trains on and the reward compares."""

    recipe: Recipe
    vae: MelVAE
    conditioner: Conditioner
    reward: Reward | None
    device: torch.device
    _captions: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of_run(cls, recipe: Recipe, run: Path, device: torch.device, reward: bool = True) -> ClipEncoder:
        """The encoders of a run, frozen."""
        vae = load_weights(MelVAE, MelVAEConfig, run / "autoencoder" / "export")
        conditioner = load_conditioner(recipe, run)
        judge = own_reward(conditioner, run) if reward else None
        return cls(recipe, frozen(vae, device), frozen(conditioner, device), judge and frozen(judge, device), device)

    @property
    def views(self) -> tuple[FrameView, ...]:
        """Pictures that the encoders want to see."""
        judged = () if self.reward is None else (reward_view(self.reward),)
        return tuple(dict.fromkeys((*self.conditioner.views, *judged)))

    def decoder(self, want: tuple[str, ...] = ("frames", "waveform")) -> ViewDecoder:
        """Decoder of clips for this encoder."""
        return view_decoder(self.recipe, self.views, want)

    @torch.no_grad()
    def __call__(self, batch: dict) -> dict[str, torch.Tensor]:
        """A batch of `decoder` -> latent_mean, latent_std, the conditions, and segments where there is a reward."""
        conditions = self.conditions(batch)
        segments = {} if conditions.segments is None else {"segments": conditions.segments}
        return self.latents(batch) | conditions.filled() | segments

    @torch.no_grad()
    def latents(self, batch: dict) -> dict[str, torch.Tensor]:
        """Mean and standard deviation of the posterior, each (B, N, C)."""
        waveform = batch["waveform"].to(self.device)
        samples = 2 * latent_length(self.recipe.clip.seconds, self.recipe.autoencoder.mel) * MEL_SPECS[self.recipe.autoencoder.mel].hop
        waveform = F.pad(waveform, (0, samples - waveform.shape[1]))
        mean, std = self.vae.encode(log_mel(waveform, self.recipe.autoencoder.mel))
        return {"latent_mean": mean.transpose(1, 2), "latent_std": std.transpose(1, 2)}

    @torch.no_grad()
    def conditions(self, batch: dict) -> Conditions:
        """Conditions of the clips, and their segment embeddings where there is a reward."""
        views = views_of(batch, self.views, self.device)
        found = self.conditioner.conditions(views)
        if self.reward is None:
            found.segments = None
        elif found.segments is None:
            found.segments = self.reward.encode_video(views[reward_view(self.reward)]).segments
        if "text" in self.conditioner.fills:
            found.text = self.text(captions(batch))
        return found

    @torch.no_grad()
    def text(self, lines: Sequence[str]) -> torch.Tensor:
        """Text tokens (B, Tt, Dt); a caption that came before is not encoded again."""
        if new := [line for line in dict.fromkeys(lines) if line not in self._captions]:
            self._captions.update(zip(new, self.conditioner.conditions({}, new).text, strict=True))
        return torch.stack([self._captions[line] for line in lines])

    def forget_captions(self) -> None:
        """Let go of the tokens of all captions: memory is to hold those of one shard at most."""
        self._captions.clear()


def captions(batch: dict) -> list[str]:
    """What each clip of a batch is called: its caption, else its labels."""
    return [caption or ", ".join(labels or ()) for caption, labels in zip(batch["caption"], batch["labels"], strict=True)]
