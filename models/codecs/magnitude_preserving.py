"""Magnitude-preserving layers (Karras et al. 2024, "EDM2", equations 47, 66, 81 and 88): activations and weights keep unit magnitude."""

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
    """SiLU, brought back to unit magnitude for a unit normal variable (equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b, brought back to unit magnitude for independent unit inputs (equation 88)."""
    return torch.lerp(a, b, share) / math.hypot(1 - share, share)


class MPConv1d(nn.Module):
    """Convolution over time without bias that uses its kernels at unit norm: only their direction is learned (equation 47).

    They also start at unit norm; training may bring them back to it after every step (equation 66). EDM2 stores them at unit root mean
    square, sqrt(fan-in) larger; then a step of Adam turns them as many times less, and the learning rates of other networks barely
    move them.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(self._unit(torch.randn(out_dim, in_dim, kernel)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """(B, in_dim, T) -> (B, out_dim, T), scaled by `gain`."""
        return F.conv1d(x, (self._unit(self.weight) * gain).to(x.dtype), padding=self.weight.shape[2] // 2)

    @staticmethod
    def _unit(weight: Tensor) -> Tensor:
        return normalise(weight, dim=(1, 2)) / math.sqrt(weight[0].numel())
