"""Encoders as conditions of a generator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from models.encoders.sf_cavp import SFCAVP


@dataclass
class Conditions:
    """What a generator is told about a video; a missing one is None and is filled with what the generator learned for it."""

    clip: torch.Tensor | None = None
    """Slow, semantic tokens (B, Tc, Dc)."""
    sync: torch.Tensor | None = None
    """Fast tokens that carry the timing (B, Ts, Ds)."""
    text: torch.Tensor | None = None
    """Text tokens (B, Tt, Dt)."""


class EncoderConditioner(nn.Module):
    """A contrastive encoder as conditioner: its slow path over time tells what is seen, its fast path when it happens.

    Each channel is standardised over a sample of the data. Features after a ReLU are all positive and of very different sizes;
    unscaled, the few large ones drown the transients that carry the timing.
    """

    def __init__(self, encoder: SFCAVP):
        super().__init__()
        self.encoder = encoder
        for name, dim in (("clip", encoder.semantic_dim), ("sync", encoder.sync_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))

    def forward(self, frames: torch.Tensor) -> tuple[Conditions, torch.Tensor]:
        """Frames (B, T, C, H, W) in [0, 1] -> conditions, and the segment embeddings (B, S, D) that the reward compares."""
        features = self.encoder.encode_video(frames)
        clip = (features.semantic - self.clip_mean) / self.clip_std
        sync = (features.sync - self.sync_mean) / self.sync_std
        return Conditions(clip=clip, sync=sync), features.segments

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Measure the standardisation on batches of frames (B, T, C, H, W)."""
        features = [self.encoder.encode_video(frames) for frames in batches]
        for name, tokens in (("clip", [f.semantic for f in features]), ("sync", [f.sync for f in features])):
            std, mean = torch.std_mean(torch.cat(tokens).flatten(0, 1).float(), dim=0)
            getattr(self, f"{name}_mean").copy_(mean)
            # A channel that hardly moves carries little; the floor keeps the rare times it does from drowning all others.
            getattr(self, f"{name}_std").copy_(std.clamp_min(0.1 * std.square().mean().sqrt().clamp_min(1e-6)))
