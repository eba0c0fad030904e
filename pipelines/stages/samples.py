"""Pictures and sounds of a validation."""

from __future__ import annotations

import torch

from models.conditioning import Conditions
from models.generators.mmdit import MMDiT
from pipelines.config import Recipe
from pipelines.engine.log import Validation
from pipelines.sounding import SoundModel

SAMPLES = 2


@torch.no_grad()
def generated_samples(generator: MMDiT, recipe: Recipe, clips: dict[str, torch.Tensor], device: torch.device) -> Validation:
    """Log-mels and sounds that `generator` gives the first of `clips` (latent_mean and conditions), beside their true log-mels."""
    model = SoundModel.around(generator, recipe, recipe.folder, device, sees=False, judges=False)
    conditions = Conditions(**{name: clips[name][:SAMPLES].to(device) for name in recipe.conditioning.slots})
    count = len(clips["latent_mean"][:SAMPLES])
    latents = model.latents(conditions, model.noise(count, recipe.clip.seconds, recipe.seed))
    true, made = (model.mel(x).cpu().numpy() for x in (clips["latent_mean"][:SAMPLES].to(device), latents))
    sounds = model.waveform(latents).cpu().numpy()
    found = Validation(sample_rate=recipe.clip.sample_rate)
    for number in range(len(made)):
        found.pictures |= {f"mel/{number}/truth": true[number], f"mel/{number}/generated": made[number]}
        found.sounds[f"sound/{number}/generated"] = sounds[number]
    return found
