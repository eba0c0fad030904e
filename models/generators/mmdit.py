"""MM-DiT: a flow-matching transformer over audio latents, conditioned on frames, synchrony and text (MMAudio, arXiv:2412.15322).

Names in the state dict are those of the public MMAudio checkpoints, so their weights load with `strict=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generators.guidance import Guidance, Prepared
from models.generators.mmdit_config import PRESETS, MMDiTConfig
from models.layers import (
    ChannelLastConv1d,
    FinalLayer,
    Rotation,
    SwiGLU,
    TimestepEmbedding,
    TransformerBlock,
    attend,
    inside_forward,
    rotary_angles,
)

__all__ = ["PRESETS", "JointBlock", "MMDiT", "MMDiTConfig", "TopBlocks", "TopState"]


class JointBlock(nn.Module):
    """Latents, frames and text: own weights each, one attention over all. The `last` block updates the latents only."""

    def __init__(self, config: MMDiTConfig, last: bool):
        super().__init__()
        sizes = (config.hidden, config.heads, config.mlp_hidden)
        self.latent_block = TransformerBlock(*sizes, kernel_size=3)
        self.clip_block = TransformerBlock(*sizes, kernel_size=3, attention_only=last)
        self.text_block = TransformerBlock(*sizes, kernel_size=1, attention_only=last)

    def forward(self, streams: tuple[Tensor, ...], conditions: tuple[Tensor, ...], rotations: tuple[Rotation | None, ...]) -> list[Tensor]:
        """Updated streams; all three arguments are (latent, clip, text)."""
        blocks = (self.latent_block, self.clip_block, self.text_block)
        inputs = [block.before_attention(*rest) for block, *rest in zip(blocks, streams, conditions, rotations, strict=True)]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*(heads for heads, _ in inputs), strict=True))
        attended = attend(q, k, v).split([x.shape[1] for x in streams], dim=1)
        modulations = [modulation for _, modulation in inputs]
        return [block.after_attention(*rest) for block, *rest in zip(blocks, streams, attended, modulations, strict=True)]


class TopState(NamedTuple):
    """What the last fused block and the final layer need: the output of the trunk below them."""

    latent: Tensor
    """Latent tokens (B, N, D)."""
    condition: Tensor
    """Condition of each latent (B, N, D): time, frames, text and synchrony."""
    final_condition: Tensor
    """Condition of the final layer, (B, 1, D) or (B, N, D)."""
    rotation: Rotation
    """Rotary angles of the N latents."""


def _top_flow(block: TransformerBlock, final_layer: FinalLayer, state: TopState) -> Tensor:
    latent = block(state.latent, state.condition, state.rotation)
    return final_layer(latent, state.final_condition)


class TopBlocks(nn.Module):
    """Frozen last fused block and final layer: with the shared trunk's state, the reference model of AVP-RPO."""

    def __init__(self, fused_block: TransformerBlock, final_layer: FinalLayer):
        super().__init__()
        self.fused_block = fused_block
        self.final_layer = final_layer
        self.requires_grad_(False)

    @classmethod
    def copy_of(cls, mmdit: MMDiT) -> TopBlocks:
        """Deep copy of the top of `mmdit`. Take it before ZeRO-3 partitions the weights, which cannot be copied after."""
        return cls(copy.deepcopy(mmdit.fused_blocks[-1]), copy.deepcopy(mmdit.final_layer))

    def forward(self, state: TopState) -> Tensor:
        return _top_flow(self.fused_block, self.final_layer, state)


class MMDiT(nn.Module):
    """Flow (B, N, C) of noisy latents towards data; t = 0 is noise, t = 1 is data. Latents are normalised (see `normalise`)."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        dim, joint_depth = config.hidden, config.depth - config.fused_depth
        self.audio_input_proj = _input_projection(config, ChannelLastConv1d(config.latent_dim, dim, 7), nn.SELU(), kernel_size=7)
        self.clip_input_proj = _input_projection(config, nn.Linear(config.clip_dim, dim), None, kernel_size=3)
        self.sync_input_proj = _input_projection(config, ChannelLastConv1d(config.sync_dim, dim, 7), nn.SELU(), kernel_size=3)
        self.text_input_proj = _input_projection(config, nn.Linear(config.text_dim, dim), None, kernel_size=1)
        self.clip_cond_proj = nn.Linear(dim, dim)
        self.text_cond_proj = nn.Linear(dim, dim)
        self.global_cond_mlp = SwiGLU(dim, config.mlp_hidden)
        self.t_embed = TimestepEmbedding(dim, dim if config.v2 else 256, max_period=1.0 if config.v2 else 10_000.0)
        self.joint_blocks = nn.ModuleList(JointBlock(config, last=i == joint_depth - 1) for i in range(joint_depth))
        sizes = (dim, config.heads, config.mlp_hidden)
        self.fused_blocks = nn.ModuleList(TransformerBlock(*sizes, kernel_size=3) for _ in range(config.fused_depth))
        self.final_layer = FinalLayer(dim, config.latent_dim, kernel_size=7)

        self.sync_pos_emb = nn.Parameter(torch.zeros(1, 1, config.sync_group, config.sync_dim))
        self.empty_clip_feat = nn.Parameter(torch.zeros(1, config.clip_dim))
        self.empty_sync_feat = nn.Parameter(torch.zeros(1, config.sync_dim))
        self.empty_string_feat = nn.Parameter(torch.zeros(config.text_len, config.text_dim), requires_grad=False)
        self.latent_mean = nn.Parameter(torch.zeros(1, 1, config.latent_dim), requires_grad=False)
        self.latent_std = nn.Parameter(torch.ones(1, 1, config.latent_dim), requires_grad=False)
        self._initialise()

    def forward(
        self,
        latent: Tensor,
        clip: Tensor | None,
        sync: Tensor | None,
        text: Tensor | None,
        t: Tensor,
        *,
        drop_video: Tensor | None = None,
        drop_text: Tensor | None = None,
        lengths: tuple[int, int] | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, TopState]:
        """Flow of `latent` (B, N, C) at `t` (B,), given clip (B, Tc, Dc), sync (B, Ts, Ds) and text (B, Tt, Dt).

        A condition that is None, or dropped for a sample by a (B,) bool mask, becomes its empty feature. Dropping happens here so that
        ZeRO-3 gathers the empties. Sequences may have any length; `lengths` are (Tc, Ts) of a clip and a sync that are None, by default
        what `condition_lengths` says. `return_state` adds what `TopBlocks` needs. Inputs are cast to the weights' type: the path from
        noise to data is best kept in float32.
        """
        lengths = self._lengths(latent.shape[1], lengths)
        _check_shapes(self.config, latent.shape[0], latent=latent, t=t, clip=clip, sync=sync, text=text)
        prepared = self._prepare(latent.shape[1], clip, sync, text, lengths, drop_video, drop_text)
        state = self._trunk(*self.embed(latent, t), prepared)
        flow = _top_flow(self.fused_blocks[-1], self.final_layer, state)
        return (flow, state) if return_state else flow

    def guided_flow(
        self,
        latent: Tensor,
        t: Tensor,
        clip: Tensor | None,
        sync: Tensor | None,
        text: Tensor | None,
        strength: float,
        negative_text: Tensor | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> Tensor:
        """Classifier-free guidance: `strength * conditional + (1 - strength) * unconditional`; up to 1, the conditional flow alone.

        `negative_text` (B, Tt, Dt) takes the place of the empty text in the unconditional flow, `lengths` are as in `forward`. Many steps
        under the same conditions are quicker with `guidance`.
        """
        return self.guidance(latent.shape[:2], clip, sync, text, strength, negative_text, lengths)(latent, t)

    def guidance(
        self, shape: tuple[int, int], clip: Tensor | None, sync: Tensor | None, text: Tensor | None, strength: float,
        negative_text: Tensor | None = None, lengths: tuple[int, int] | None = None,
    ) -> Guidance:
        """`guided_flow` of latents of `shape` (B, N) as a function of (latent, t): what the steps of a sampler share is computed here."""
        _check_shapes(self.config, shape[0], clip=clip, sync=sync, text=text, negative_text=negative_text)
        lengths = self._lengths(shape[1], lengths)
        return Guidance(self, self._prepare_guidance(shape, clip, sync, text, strength, negative_text, lengths), strength)

    def embed(self, latent: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) of the latents and embedding (B, D) of their times."""
        return self.audio_input_proj(latent.to(self.latent_mean.dtype)), self.t_embed(t)

    def flow(self, tokens: Tensor, time: Tensor, prepared: Prepared) -> Tensor:
        """Flow (B, N, C) of what `embed` gives, under prepared conditions."""
        return _top_flow(self.fused_blocks[-1], self.final_layer, self._trunk(tokens, time, prepared))

    def compile_blocks(self, **options) -> None:
        """`torch.compile` each transformer block; names in the state dict stay. Not with ZeRO-3: its hooks break the graphs."""
        for block in (*self.joint_blocks, *self.fused_blocks):
            block.compile(**options)

    @inside_forward
    def normalise(self, latent: Tensor) -> Tensor:
        """Latents (B, N, C) of the autoencoder to the unit scale that the transformer works in."""
        return (latent - self.latent_mean) / self.latent_std

    @inside_forward
    def unnormalise(self, latent: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return latent * self.latent_std + self.latent_mean

    @torch.no_grad()
    def set_latent_stats(self, mean: Tensor, std: Tensor) -> None:
        """Set the per-channel mean and deviation (C,) of the training latents."""
        channels = self.config.latent_dim
        for name, value in (("mean", mean), ("std", std)):
            if value.numel() != channels or not value.isfinite().all():
                raise ValueError(f"latent {name} has shape {tuple(value.shape)}: give one finite value for each of {channels} channels")
        if not (std > 0).all():
            raise ValueError(f"latent std has a minimum of {std.min().item():g}: every channel must vary, check the autoencoder")
        self.latent_mean.copy_(mean.reshape(1, 1, -1))
        self.latent_std.copy_(std.reshape(1, 1, -1))

    def top_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that AVP-RPO trains: the last fused block and the final layer (8,039,060 of small_16k)."""
        yield from self.fused_blocks[-1].parameters()
        yield from self.final_layer.parameters()

    @inside_forward
    def _prepare_guidance(
        self, shape: tuple[int, int], clip: Tensor | None, sync: Tensor | None, text: Tensor | None, strength: float,
        negative_text: Tensor | None, lengths: tuple[int, int],
    ) -> Prepared:
        """Conditions of the conditional flow and, for a strength above 1, below them those of the unconditional one."""
        batch, length = shape
        conditional = self._prepare(length, clip, sync, text, lengths).expand(batch)
        if strength <= 1:
            return conditional
        # The empties must be as long as the conditions they stand for.
        clip, sync = self._empties(lengths, clip, sync)
        return conditional.join(self._prepare(length, clip, sync, negative_text, lengths).expand(batch))

    def _prepare(
        self, length: int, clip: Tensor | None, sync: Tensor | None, text: Tensor | None, lengths: tuple[int, int],
        drop_video: Tensor | None = None, drop_text: Tensor | None = None,
    ) -> Prepared:
        """Conditions for `length` latents, with their empties where they are missing, of `lengths`, or dropped."""
        empty_clip, empty_sync = self._empties(lengths, clip, sync)
        clip = self.clip_input_proj(_fill(clip, empty_clip, drop_video))
        sync = self._align_sync(_fill(sync, empty_sync, drop_video), length)
        text = self.text_input_proj(_fill(text, self.empty_string_feat[None], drop_text))
        pooled = self.global_cond_mlp(self.clip_cond_proj(clip.mean(dim=1)) + self.text_cond_proj(text.mean(dim=1)))
        return Prepared(clip, text, pooled, sync, self._rotations(length, clip.shape[1], clip.device))

    def _lengths(self, length: int, lengths: tuple[int, int] | None) -> tuple[int, int]:
        """Tokens of missing frames and synchrony: as given, or as fits `length` latents."""
        if lengths is None:
            return self.config.condition_lengths(length)
        if min(lengths) < 1 or lengths[1] % self.config.sync_group:
            group = self.config.sync_group
            raise ValueError(f"lengths are {lengths}: give at least one frame token, and a multiple of sync_group = {group}")
        return lengths

    def _empties(self, lengths: tuple[int, int], clip: Tensor | None, sync: Tensor | None) -> tuple[Tensor, Tensor]:
        """What takes the place of frames and synchrony, (1, Tc, Dc) and (1, Ts, Ds): as long as they are, else of `lengths`."""
        clip_len, sync_len = (n if x is None else x.shape[1] for n, x in zip(lengths, (clip, sync), strict=True))
        return self.empty_clip_feat.expand(1, clip_len, -1), self.empty_sync_feat.expand(1, sync_len, -1)

    def _trunk(self, latent: Tensor, time: Tensor, prepared: Prepared) -> TopState:
        """Everything below the top, from embedded latents (B, N, D) and times (B, D)."""
        clip, text, pooled, sync, (rotation, clip_rotation) = prepared.expand(len(latent))
        shared = (time + pooled)[:, None]
        aligned = shared + sync

        streams, conditions, rotations = (latent, clip, text), (aligned, shared, shared), (rotation, clip_rotation, None)
        for block in self.joint_blocks:
            streams = block(streams, conditions, rotations)
        latent = streams[0]
        for block in self.fused_blocks[:-1]:
            latent = block(latent, aligned, rotation)
        return TopState(latent, aligned, aligned if self.config.final_layer_extended_condition else shared, rotation)

    def _align_sync(self, sync: Tensor, length: int) -> Tensor:
        """Synchrony tokens (B, Ts, Ds) as one condition per latent (B, length, D)."""
        grouped = sync.unflatten(1, (-1, self.config.sync_group)) + self.sync_pos_emb
        projected = self.sync_input_proj(grouped.flatten(1, 2))
        return F.interpolate(projected.transpose(1, 2), size=length, mode="nearest-exact").transpose(1, 2)

    def _rotations(self, length: int, clip_len: int, device: torch.device) -> tuple[Rotation, Rotation]:
        head_dim = self.config.hidden // self.config.heads
        return rotary_angles(length, head_dim, device=device), rotary_angles(clip_len, head_dim, length / clip_len, device)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.t_embed.mlp[0], self.t_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # Closed gates and a zero output: every block starts as the identity, and the first flow is exactly 0.
        for module in self.modules():
            if isinstance(module, TransformerBlock | FinalLayer):
                nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.conv.weight)
        nn.init.zeros_(self.final_layer.conv.bias)


def _input_projection(config: MMDiTConfig, first: nn.Module, activation: nn.Module | None, kernel_size: int) -> nn.Sequential:
    """First map to width D, its activation, and a SwiGLU; the second release has a SiLU everywhere."""
    if config.v2:
        activation = nn.SiLU()
    layers = (first, activation, SwiGLU(config.hidden, config.mlp_hidden, kernel_size))
    return nn.Sequential(*(layer for layer in layers if layer is not None))


def _fill(value: Tensor | None, empty: Tensor, drop: Tensor | None) -> Tensor:
    """`value`, or `empty` (1, T, D) in its place; where `drop` (B,) says so, for those samples."""
    if value is None:
        return empty
    value = value.to(empty.dtype)
    return value if drop is None else torch.where(drop[:, None, None], empty, value)


def _check_shapes(config: MMDiTConfig, batch: int, t: Tensor | None = None, **given: Tensor | None) -> None:
    widths = {"latent": config.latent_dim, "clip": config.clip_dim, "sync": config.sync_dim}
    for name, value in given.items():
        width = widths.get(name, config.text_dim)
        if value is not None and (value.ndim != 3 or value.shape[0] != batch or value.shape[2] != width):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: give ({batch}, length, {width}), the batch being that of the latents")
    if t is not None and t.shape != (batch,):
        raise ValueError(f"t has shape {tuple(t.shape)}: give ({batch},), a time for each sample")
    sync = given["sync"]
    if sync is not None and sync.shape[1] % config.sync_group:
        raise ValueError(f"sync has {sync.shape[1]} tokens: give a multiple of sync_group = {config.sync_group}")
    for name in ("text", "negative_text"):
        text = given.get(name)
        if text is not None and text.shape[1] != config.text_len:
            raise ValueError(f"{name} has {text.shape[1]} tokens: pad or cut it to text_len = {config.text_len}")
