"""Classifier-free guidance: the conditional and the unconditional flow in one pass, with all that the steps share computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.layers import Rotation

if TYPE_CHECKING:
    from models.generators.mmdit import MMDiT

__all__ = ["Guidance", "Prepared"]


class Prepared(NamedTuple):
    """Conditions as the blocks take them: all that depends on neither the latents nor the time. A batch of 1 stands for any."""

    clip: Tensor
    """Frame tokens (B, Tc, D)."""
    text: Tensor
    """Text tokens (B, Tt, D)."""
    pooled: Tensor
    """Global condition of frames and text (B, D), without time."""
    sync: Tensor
    """Synchrony of each latent (B, N, D)."""
    rotations: tuple[Rotation, Rotation]
    """Rotary angles of the latents and of the frames."""

    def expand(self, batch: int) -> Prepared:
        """These conditions for `batch` samples."""
        return Prepared(*(x.expand(batch, *x.shape[1:]) for x in self[:4]), self.rotations)

    def join(self, other: Prepared) -> Prepared:
        """The samples of both, one after the other; the sequences are of the same lengths."""
        return Prepared(*(torch.cat(pair) for pair in zip(self[:4], other[:4], strict=True)), self.rotations)


class Guidance:
    """Guided flow of latents (B, N, C) at times (B,) under fixed conditions: a function for `objectives.flow_matching.integrate`."""

    def __init__(self, model: MMDiT, prepared: Prepared, strength: float):
        """`prepared`: conditions of the conditional flow and, for a strength above 1, below them those of the unconditional one."""
        self.model, self.prepared, self.strength = model, prepared, strength

    def __call__(self, latent: Tensor, t: Tensor) -> Tensor:
        # Latents and times are embedded once for both flows.
        tokens, time = self.model.embed(latent, t)
        if self.strength <= 1:
            return self.model.flow(tokens, time, self.prepared)
        conditional, unconditional = self.model.flow(tokens.repeat(2, 1, 1), time.repeat(2, 1), self.prepared).chunk(2)
        return torch.lerp(unconditional, conditional, self.strength)
