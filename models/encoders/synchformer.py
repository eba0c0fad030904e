"""Visual encoder of Synchformer (Iashin et al. 2024, arXiv:2401.16423): what moves when, in tokens of two frames.

A MotionFormer (Patrick et al. 2021, arXiv:2106.05392) with divided space-time attention (Bertasius et al. 2021, arXiv:2102.05095,
section 3), then one transformer layer that gathers each frame pair into a token. Names in the state dict are those of the public
checkpoint without their prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.layers import attend

__all__ = ["PRESETS", "Synchformer", "SynchformerConfig", "video_segments"]

_EPS = 1e-6
"""Of every layer norm in the public model."""


@dataclass(frozen=True, kw_only=True)
class SynchformerConfig:
    """Sizes of the encoder, and how a video is cut for it; the defaults are those of the public weights as MMAudio uses them."""

    image_size: int = 224
    """Side of the square pictures, pixels."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    patch_frames: int = 2
    """Frames of a patch; a segment gives one token per so many frames."""
    segment_frames: int = 16
    """Frames of a segment."""
    hop_frames: int = 8
    """Frames from one segment to the next. Synchformer itself was pretrained on segments that do not overlap, 16."""
    fps: float = 25.0
    """Frames per second of the video."""
    dim: int = 768
    """Width D of every token."""
    heads: int = 12
    """Attention heads."""
    depth: int = 12
    """Blocks of time attention, space attention and MLP."""
    mlp_ratio: int = 4
    """Hidden width of an MLP over D."""
    mean: float = 0.5
    """Mean of the pixels in [0, 1], all channels."""
    std: float = 0.5
    """Their standard deviation."""
    segments_at_once: int = 48
    """Segments encoded in one pass. Bounds memory; time attention has a batch row per patch, and CUDA kernels take 65,535 at most."""

    def __post_init__(self):
        for name in ("image_size", "patch_size", "patch_frames", "segment_frames", "fps", "dim", "heads", "depth", "mlp_ratio", "std",
                     "segments_at_once"):
            if getattr(self, name) <= 0:
                raise ValueError(f"SynchformerConfig.{name} is {getattr(self, name)}: give a positive value")
        for whole, part in (("image_size", "patch_size"), ("segment_frames", "patch_frames"), ("dim", "heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"SynchformerConfig.{whole} is {getattr(self, whole)}: give a multiple of {part} = {getattr(self, part)}")
        if not 1 <= self.hop_frames <= self.segment_frames:
            raise ValueError(f"SynchformerConfig.hop_frames is {self.hop_frames}: choose 1 to segment_frames ({self.segment_frames})")

    @property
    def segment_tokens(self) -> int:
        """Tokens of a segment."""
        return self.segment_frames // self.patch_frames

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2


PRESETS: dict[str, SynchformerConfig] = {
    "divided_224_16x4": SynchformerConfig(),
    "tiny": SynchformerConfig(image_size=32, dim=32, heads=2, depth=2),
}
"""The public encoder by the name of its MotionFormer, and a laptop's."""


def video_segments(video: Tensor, config: SynchformerConfig) -> Tensor:
    """Video (B, T, C, H, W) in [0, 1] at `config.fps` -> normalised segments (B, S, 16, C, H, W), S = (T - 16) // 8 + 1.

    A rest shorter than a hop is left out; 8 s give 24 segments.
    """
    size = config.segment_frames
    if video.dim() != 5 or not video.is_floating_point():
        raise ValueError(f"Synchformer takes float video (B, T, C, H, W) in [0, 1], not {video.dtype} {tuple(video.shape)}")
    if video.shape[1] < size:
        raise ValueError(f"Synchformer: a video of {video.shape[1]} frames is shorter than one segment of {size}: use longer videos")
    return ((video - config.mean) / config.std).unfold(1, size, config.hop_frames).movedim(-1, 2)


class Synchformer(nn.Module):
    """Normalised segments (B, S, T, C, H, W) -> tokens (B, S, T / 2, D), one per pair of frames."""

    def __init__(self, config: SynchformerConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, config.dim))
        self.temp_embed = nn.Parameter(torch.zeros(1, config.segment_tokens, config.dim))
        self.patch_embed_3d = PatchEmbedding(config)
        self.blocks = nn.ModuleList(DividedBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=_EPS)
        self.spatial_attn_agg = SpaceAggregation(config)
        for embedding in (self.cls_token, self.pos_embed, self.temp_embed):
            nn.init.trunc_normal_(embedding, std=0.02)

    def forward(self, segments: Tensor) -> Tensor:
        """Segments as `video_segments` cuts them; each is encoded by itself."""
        config = self.config
        wanted = (config.segment_frames, 3, config.image_size, config.image_size)
        if segments.dim() != 6 or segments.shape[2:] != wanted:
            found = tuple(segments.shape)
            raise ValueError(f"Synchformer takes segments (B, S, T, C, H, W) of {wanted}, not {found}: resize and cut the video")
        parts = segments.flatten(0, 1).to(self.cls_token.dtype).split(config.segments_at_once)
        return torch.cat([self._encode(part) for part in parts]).unflatten(0, segments.shape[:2])

    def encode_video(self, video: Tensor) -> Tensor:
        """Video (B, T, C, H, W) in [0, 1] at 25 fps -> tokens (B, 8 S, D) of its overlapping segments, one segment after the other."""
        return self(video_segments(video, self.config)).flatten(1, 2)

    def _encode(self, segments: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, T / 2, D)."""
        frames = self.config.segment_tokens
        position = self.pos_embed[:, None, 1:] + self.temp_embed[:, :, None]
        patches = self.patch_embed_3d(segments) + position.flatten(1, 2)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat((cls.expand(len(patches), -1, -1), patches), dim=1)
        for block in self.blocks:
            x = block(x, frames)
        pictures = self.norm(x[:, 1:]).unflatten(1, (frames, -1))
        return self.spatial_attn_agg(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])


class PatchEmbedding(nn.Module):
    """Segments (B, T, C, H, W) -> patches (B, F * N, D), F = T / 2 frame pairs of N patches each, in order of time."""

    def __init__(self, config: SynchformerConfig):
        super().__init__()
        size = (config.patch_frames, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.dim, size, size)

    def forward(self, segments: Tensor) -> Tensor:
        return self.proj(segments.transpose(1, 2)).flatten(2).transpose(1, 2)


class DividedBlock(nn.Module):
    """Attention over time, then over space, then an MLP, each on a normed input and added to it."""

    def __init__(self, config: SynchformerConfig):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.dim, eps=_EPS) for _ in range(3))
        self.timeattn = DividedAttention(config, "time")
        self.attn = DividedAttention(config, "space")
        hidden = config.mlp_ratio * config.dim
        layers = (("fc1", nn.Linear(config.dim, hidden)), ("act", nn.GELU()), ("fc2", nn.Linear(hidden, config.dim)))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Class token and patches (B, 1 + F * N, D) of F = `frames` frame pairs."""
        x = x + self.timeattn(self.norm3(x), frames)
        x = x + self.attn(self.norm1(x), frames)
        return x + self.mlp(self.norm2(x))


class DividedAttention(nn.Module):
    """The class token attends to all; a patch to the class token and to its own place over time, or to its own frame pair."""

    def __init__(self, config: SynchformerConfig, over: Literal["time", "space"]):
        super().__init__()
        self.heads, self.over = config.heads, over
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Class token and patches (B, 1 + F * N, D) of F = `frames` frame pairs."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        cls = attend(q[:, :, :1], k, v)
        patches = attend(self._groups(q, frames), *(self._with_cls(part, frames) for part in (k, v)))
        patches = patches.unflatten(0, (len(x), -1))
        if self.over == "time":
            patches = patches.transpose(1, 2)
        return self.proj(torch.cat((cls, patches.flatten(1, 2)), dim=1))

    def _groups(self, heads: Tensor, frames: int) -> Tensor:
        """Heads (B, H, 1 + F * N, d) -> those of the patches that see one another, (B * G, H, L, d): over time G = N and L = F."""
        patches = heads[:, :, 1:].unflatten(2, (frames, -1))
        if self.over == "time":
            patches = patches.transpose(2, 3)
        return patches.transpose(1, 2).flatten(0, 1)

    def _with_cls(self, heads: Tensor, frames: int) -> Tensor:
        groups = self._groups(heads, frames)
        cls = heads[:, :, :1].repeat_interleave(len(groups) // len(heads), dim=0)
        return torch.cat((cls, groups), dim=2)


class SpaceAggregation(nn.Module):
    """Patches of a frame pair (B, N, D) -> one token (B, D): a pre-norm transformer layer over a class token and them, read at the former.

    Only the class token is computed past the keys and values: nobody reads the others.
    """

    def __init__(self, config: SynchformerConfig):
        super().__init__()
        dim, hidden = config.dim, config.mlp_ratio * config.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.self_attn = nn.MultiheadAttention(dim, config.heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=_EPS) for _ in range(2))
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, patches: Tensor) -> Tensor:
        cls = self.cls_token.expand(len(patches), -1, -1)
        x = self.norm1(torch.cat((cls, patches), dim=1))
        cls = cls + self.self_attn(x[:, :1], x, x, need_weights=False)[0]
        return (cls + self.linear2(nn.functional.gelu(self.linear1(self.norm2(cls))))).squeeze(1)
