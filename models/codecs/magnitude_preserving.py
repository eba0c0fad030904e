"""Magnitude-preserving layers (Karras et al. 2024, "EDM2", equations 46-66): activations and weights keep unit magnitude."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MPConv1d", "mp_silu", "mp_sum", "normalise"]

_EPS = 1e-4


def normalise(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """`x` over its root mean square along `dim`."""
    rms = x.float().square().mean(dim=dim, keepdim=True).sqrt()
    return x / (rms + _EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of a unit normal variable, brought back to unit magnitude."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b, at unit magnitude for independent unit inputs."""
    return torch.lerp(a, b, share) / math.hypot(1 - share, share)


class MPConv1d(nn.Module):
    """Convolution over time without bias whose kernels have unit norm whatever is stored: only their direction is learned."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, forced: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim, kernel))
        self.forced = forced

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """(B, in_dim, T) -> (B, out_dim, T), scaled by `gain`."""
        if self.forced and self.training:
            with torch.no_grad():
                self.weight.copy_(normalise(self.weight, dim=(1, 2)))
        weight = normalise(self.weight, dim=(1, 2)) * (gain / math.sqrt(self.weight[0].numel()))
        return F.conv1d(x, weight.to(x.dtype), padding=self.weight.shape[2] // 2)
