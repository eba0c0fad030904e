"""Discriminator of log-mels: patches of the mel, and of the mel averaged over 2 x 2, 4 x 4, ... values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Judgement", "MelDiscriminator", "MelDiscriminatorConfig"]


@dataclass(frozen=True, kw_only=True)
class MelDiscriminatorConfig:
    """Sizes of the discriminator. MMAudio publishes none; it is our choice."""

    scales: int = 3
    """Critics: the first sees the mel itself, each further one the mel averaged over twice as many frames and bands."""
    channels: int = 32
    """Channels of a critic's first layer; each further layer has twice as many, up to eight times."""
    layers: int = 4
    """Layers of a critic that halve time and bands; a score then judges a patch of 2^(layers + 2) values or more."""

    def __post_init__(self):
        for name in ("scales", "channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"MelDiscriminatorConfig.{name} is {getattr(self, name)}: give 1 or more")


class Judgement(NamedTuple):
    """What the critics say of a mel."""

    scores: list[Tensor]
    """Per critic, a score of each patch (B, 1, F', T')."""
    features: list[Tensor]
    """Activations of every layer of every critic."""


class MelDiscriminator(nn.Module):
    """Standardised log-mels (B, F, T) -> the critics' `Judgement`."""

    def __init__(self, config: MelDiscriminatorConfig):
        super().__init__()
        self.critics = nn.ModuleList(Critic(config) for _ in range(config.scales))

    def forward(self, mel: Tensor, frozen: bool = False) -> Judgement:
        """`frozen` sends gradients to the mel only: what the decoder asks of the critics must not train them."""
        image = torch.stack((mel, _bands(mel)), dim=1)
        judgement = Judgement([], [])
        for scale, critic in enumerate(self.critics):
            *features, scores = critic(F.avg_pool2d(image, 2**scale), frozen)
            judgement.scores.append(scores)
            judgement.features.extend(features)
        return judgement


class Critic(nn.Module):
    """Convolutions over one scale of a mel (B, 2, F, T)."""

    def __init__(self, config: MelDiscriminatorConfig):
        super().__init__()
        dims = [2, *(config.channels * min(2**layer, 8) for layer in range(config.layers))]
        self.layers = nn.ModuleList(NormedConv2d(a, b, kernel=5, stride=2) for a, b in zip(dims, dims[1:], strict=False))
        self.score = NormedConv2d(dims[-1], 1, kernel=3)

    def forward(self, x: Tensor, frozen: bool) -> list[Tensor]:
        """Activations of each layer, then the scores."""
        found = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x, frozen), 0.2)
            found.append(x)
        return [*found, self.score(x, frozen)]


class NormedConv2d(nn.Module):
    """Convolution whose kernels have a direction and a length of their own (weight normalisation, Salimans and Kingma 2016).

    `frozen` detaches the weights where they are used. Switching `requires_grad` would not survive ZeRO, and a functional copy of the
    weights would be empty under ZeRO-3, which gathers them for this forward only.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        # At unit norm: the longer a kernel is stored, the less a step of Adam turns it.
        directions = F.normalize(torch.randn(out_dim, in_dim * kernel**2), dim=1)
        self.weight = nn.Parameter(directions.view(out_dim, in_dim, kernel, kernel))
        self.gain = nn.Parameter(torch.full((out_dim,), math.sqrt(2)))
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """(B, in_dim, H, W) -> (B, out_dim, H / stride, W / stride)."""
        weight, gain, bias = (p.detach() if frozen else p for p in (self.weight, self.gain, self.bias))
        kernel = weight * (gain / weight.flatten(1).norm(dim=1).clamp_min(1e-6))[:, None, None, None]
        return F.conv2d(x.to(kernel.dtype), kernel, bias, self.stride, padding=kernel.shape[-1] // 2)


def _bands(mel: Tensor) -> Tensor:
    """Where each value lies in the spectrum, -1 to 1: a patch of low bands is not one of high bands."""
    return torch.linspace(-1, 1, mel.shape[1], device=mel.device, dtype=mel.dtype)[:, None].expand_as(mel)
