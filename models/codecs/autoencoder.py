"""Variational autoencoder of log-mels over time; its weights' names are those of the checkpoints published with MMAudio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.codecs.magnitude_preserving import MPConv1d, mp_silu, mp_sum, normalise

__all__ = ["PRESETS", "TRAINING_FIELDS", "MelVAE", "MelVAEConfig"]


@dataclass(frozen=True, kw_only=True)
class MelVAEConfig:
    """Sizes of the autoencoder and weights of its loss. The paper publishes no training; what concerns it is our choice."""

    bands: int
    """Mel bands F."""
    latent_dim: int
    """Channels C of a latent."""
    hidden: int
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels per level, in units of `hidden`."""
    halved_level: int = 0
    """The level at whose end time is halved; mels have twice as many frames as latents."""
    encoder_blocks: int = 2
    """Residual blocks per level of the encoder."""
    decoder_blocks: int = 3
    """Residual blocks per level of the decoder."""
    residual_share: float = 0.3
    """Weight of the residual branch in a sum, the shortcut's being the rest."""
    activation_limit: float = 256.0
    """Activations are clamped to this between blocks, for half precision."""
    kl_weight: float = 1e-4
    """Weight of the divergence from a unit normal, in nats per latent value."""
    multi_resolution_weight: float = 0.0
    """Weight of the L1 errors of the mel averaged over patches of 2 x 2, 4 x 4 and 8 x 8: the envelope, beside the detail."""
    forced_weight_norm: bool = False
    """Bring the stored weights back to unit norm after every training step (EDM2, equation 66), so that the learning rate keeps its
    effect: kernels that grow are turned less by each step."""

    def __post_init__(self):
        for name in ("bands", "latent_dim", "hidden", "encoder_blocks", "decoder_blocks", "activation_limit"):
            if getattr(self, name) <= 0:
                raise ValueError(f"MelVAEConfig.{name} is {getattr(self, name)}: give a positive value")
        if not 0 <= self.halved_level < len(self.multipliers) - 1:
            raise ValueError(f"MelVAEConfig.halved_level is {self.halved_level}: choose 0 to {len(self.multipliers) - 2}")
        if not 0 < self.residual_share < 1:
            raise ValueError(f"MelVAEConfig.residual_share is {self.residual_share}: choose a share between 0 and 1")
        if self.kl_weight < 0 or self.multi_resolution_weight < 0:
            raise ValueError("MelVAEConfig.kl_weight, multi_resolution_weight: give values of at least 0")


TRAINING_FIELDS = ("kl_weight", "multi_resolution_weight", "forced_weight_norm")
"""Fields of MelVAEConfig that shape the training alone: with other values the same weights answer the same."""

_TRAINING = {"multi_resolution_weight": 0.5, "forced_weight_norm": True}

PRESETS: dict[str, MelVAEConfig] = {
    # MMAudio's sizes; how to train them is ours.
    "16k": MelVAEConfig(bands=80, latent_dim=20, hidden=384, **_TRAINING),
    "44k": MelVAEConfig(bands=128, latent_dim=40, hidden=512, **_TRAINING),
    "tiny": MelVAEConfig(bands=80, latent_dim=16, hidden=64, multipliers=(1, 1), encoder_blocks=1, decoder_blocks=1),
}


class MelVAE(nn.Module):
    """Log-mel (B, F, T) <-> latent (B, C, T / 2); the mel is standardised per band inside."""

    def __init__(self, config: MelVAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("data_mean", torch.zeros(1, config.bands, 1))
        self.register_buffer("data_std", torch.ones(1, config.bands, 1))

    def set_data_stats(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation (F,) of the training mels."""
        if mean.numel() != self.config.bands or std.numel() != self.config.bands:
            raise ValueError(f"MelVAE.set_data_stats: got {mean.numel()} and {std.numel()} values, need {self.config.bands}, one per band")
        if not bool((std > 0).all()):
            raise ValueError("MelVAE.set_data_stats: std must be above 0 in every band; a constant band holds no sound")
        self.data_mean.copy_(mean.reshape(1, -1, 1))
        self.data_std.copy_(std.reshape(1, -1, 1))

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each (B, C, T / 2)."""
        mean, log_variance = self._posterior(self._standardise(mel))
        return mean, (0.5 * log_variance).exp()

    def decode(self, latent: Tensor) -> Tensor:
        """Latent (B, C, N) -> log-mel (B, F, 2 N)."""
        return self._decode(latent) * self.data_std + self.data_mean

    def forward(self, mel: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Training loss with the posterior sampled by `noise` (B, C, T / 2); L1 and patch errors are in standard deviations of a band."""
        return self.reconstruct(mel, noise)[0]

    def reconstruct(self, mel: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The losses of `forward`, and the standardised mel (B, F, T) before and after."""
        target = self._standardise(mel)
        mean, log_variance = self._posterior(target)
        decoded = self._decode(mean + (0.5 * log_variance).exp() * noise)
        reconstruction = F.l1_loss(decoded, target)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction + self.config.kl_weight * kl
        if self.config.multi_resolution_weight:
            loss = loss + self.config.multi_resolution_weight * _patch_errors(decoded, target)
        return {"loss": loss, "reconstruction": reconstruction.detach(), "kl": kl.detach()}, target, decoded

    def _standardise(self, mel: Tensor) -> Tensor:
        if mel.dim() != 3 or mel.shape[1] != self.config.bands or mel.shape[2] % 2:
            raise ValueError(f"MelVAE takes log-mels (B, {self.config.bands}, T) with T even, not {tuple(mel.shape)}: crop or pad them")
        return (mel - self.data_mean) / self.data_std

    def _posterior(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, in float32: a variance of e^-30 has no place in half precision."""
        mean, log_variance = self.encoder(mel.to(self.encoder.conv_in.weight.dtype)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def _decode(self, latent: Tensor) -> Tensor:
        return self.decoder(latent.to(self.decoder.conv_in.weight.dtype)).float()


class Encoder(nn.Module):
    """Mel (B, F, T) -> mean and log-variance (B, 2 C, T / 2)."""

    def __init__(self, config: MelVAEConfig):
        super().__init__()
        self.config = config
        dims = [config.hidden * multiplier for multiplier in config.multipliers]
        self.conv_in = MPConv1d(config.bands, dims[0], 3)
        self.down = nn.ModuleList()
        for level, dim in enumerate(dims):
            down = Level(config, dims[max(level - 1, 0)], dim, config.encoder_blocks)
            if level == config.halved_level:
                down.downsample = Downsample(config, dim)
            self.down.append(down)
        self.mid = Middle(config, dims[-1])
        self.conv_out = MPConv1d(dims[-1], 2 * config.latent_dim, 3)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, down in enumerate(self.down):
            x = down(x)
            if level == self.config.halved_level:
                x = down.downsample(x)
        return self.conv_out(mp_silu(self.mid(x)), gain=1 + self.learnable_gain)


class Decoder(nn.Module):
    """Latent (B, C, N) -> mel (B, F, 2 N)."""

    def __init__(self, config: MelVAEConfig):
        super().__init__()
        self.config = config
        dims = [config.hidden * multiplier for multiplier in config.multipliers]
        self.conv_in = MPConv1d(config.latent_dim, dims[-1], 3)
        self.mid = Middle(config, dims[-1])
        self.up = nn.ModuleList()
        for level, dim in enumerate(dims):
            up = Level(config, dims[min(level + 1, len(dims) - 1)], dim, config.decoder_blocks)
            if level == config.halved_level + 1:
                up.upsample = Upsample(config, dim)
            self.up.append(up)
        self.conv_out = MPConv1d(dims[0], config.bands, 3)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level, up in reversed(list(enumerate(self.up))):
            x = up(x)
            if level == self.config.halved_level + 1:
                x = up.upsample(x)
        return self.conv_out(mp_silu(x), gain=1 + self.learnable_gain)


class Level(nn.Module):
    """Residual blocks of one width."""

    def __init__(self, config: MelVAEConfig, in_dim: int, dim: int, blocks: int):
        super().__init__()
        self.limit = config.activation_limit
        self.block = nn.ModuleList(ResidualBlock(config, dim if i else in_dim, dim) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x).clamp(-self.limit, self.limit)
        return x


class Middle(nn.Module):
    """The narrowest part: a residual block, attention over time, a residual block."""

    def __init__(self, config: MelVAEConfig, dim: int):
        super().__init__()
        self.limit = config.activation_limit
        self.block_1 = ResidualBlock(config, dim, dim)
        self.attn_1 = Attention(config, dim)
        self.block_2 = ResidualBlock(config, dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x))).clamp(-self.limit, self.limit)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, of an input at unit magnitude in every frame."""

    def __init__(self, config: MelVAEConfig, in_dim: int, dim: int):
        super().__init__()
        self.share = config.residual_share
        self.conv1 = MPConv1d(in_dim, dim, 3)
        self.conv2 = MPConv1d(dim, dim, 3)
        if in_dim != dim:
            self.nin_shortcut = MPConv1d(in_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = normalise(x, dim=1)
        h = self.conv2(mp_silu(self.conv1(mp_silu(x))))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return mp_sum(shortcut, h, self.share)


class Attention(nn.Module):
    """Single-head attention over time of normalised queries, keys and values."""

    def __init__(self, config: MelVAEConfig, dim: int):
        super().__init__()
        self.share = config.residual_share
        self.qkv = MPConv1d(dim, 3 * dim, 1)
        self.proj_out = MPConv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The checkpoints interleave query, key and value channel by channel.
        query, key, value = normalise(self.qkv(x).unflatten(1, (-1, 3)), dim=1).permute(2, 0, 3, 1).contiguous()
        h = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return mp_sum(x, self.proj_out(h), self.share)


class Downsample(nn.Module):
    """Halves time by averaging pairs of frames."""

    def __init__(self, config: MelVAEConfig, dim: int):
        super().__init__()
        self.conv1 = MPConv1d(dim, dim, 1)
        self.conv2 = MPConv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.avg_pool1d(self.conv1(x), 2))


class Upsample(nn.Module):
    """Doubles time by repeating frames."""

    def __init__(self, config: MelVAEConfig, dim: int):
        super().__init__()
        self.conv = MPConv1d(dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=2))


def _patch_errors(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean L1 over three patch sizes."""
    difference = (decoded - target).unsqueeze(1)
    return sum(F.avg_pool2d(difference, size).abs().mean() for size in (2, 4, 8)) / 3
