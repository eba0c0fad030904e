"""Training of the mel VAE against a discriminator, as one module with one loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from models.codecs.autoencoder import MelVAE
from models.codecs.discriminator import MelDiscriminator, MelDiscriminatorConfig
from models.objectives.adversarial import discriminator_loss, feature_matching_loss, generator_loss

__all__ = ["AdversarialConfig", "AdversarialVAE"]


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Adversarial training of the VAE: it sharpens what an L1 loss averages away."""

    weight: float = 0.0
    """Weight of the decoder's adversarial loss beside its reconstruction (0.05 is a usual one); 0 trains without a discriminator."""
    feature_weight: float = 0.1
    """Weight of the distance between the discriminator's features of true and decoded mels."""
    start: int = 20_000
    """Optimiser steps of plain training before: a discriminator of noise teaches nothing."""
    discriminator: MelDiscriminatorConfig = field(default_factory=MelDiscriminatorConfig)
    """Sizes of the discriminator."""

    def __post_init__(self):
        for name in ("weight", "feature_weight", "start"):
            if getattr(self, name) < 0:
                raise ValueError(f"AdversarialConfig.{name} is {getattr(self, name)}: give 0 or more")


class AdversarialVAE(nn.Module):
    """A mel VAE and its discriminator under one optimiser.

    One backward pass gives each the gradient that its own optimiser would see: the discriminator judges a detached mel, and the decoder
    is judged by detached weights. Clipping by the global norm counts both.
    """

    def __init__(self, vae: MelVAE, config: AdversarialConfig):
        super().__init__()
        self.vae, self.config = vae, config
        self.discriminator = MelDiscriminator(config.discriminator)

    def forward(self, mel: Tensor, noise: Tensor, adversarial: Tensor) -> dict[str, Tensor]:
        """Losses of `MelVAE`, with those of both sides where `adversarial`, a bool on the CPU, says that they have begun."""
        losses, target, decoded = self.vae.reconstruct(mel, noise)
        if not adversarial:
            return losses
        real, made = self.discriminator(target), self.discriminator(decoded.detach())
        judged = self.discriminator(decoded, frozen=True)
        critic, fooled = discriminator_loss(real.scores, made.scores), generator_loss(judged.scores)
        matching = feature_matching_loss(real.features, judged.features)
        loss = losses["loss"] + self.config.weight * fooled + self.config.feature_weight * matching + critic
        return losses | {"loss": loss, "adversarial": fooled.detach(), "features": matching.detach(), "discriminator": critic.detach()}
