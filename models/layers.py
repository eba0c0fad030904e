"""Building blocks shared by the generators. Sequences are channel-last, (B, N, D)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from flash_attn import flash_attn_func
except ImportError:  # not installed, or built for another torch
    flash_attn_func = None

Method = TypeVar("Method", bound=Callable)

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each (N, head_dim / 2) in float32."""


def inside_forward(method: Method) -> Method:
    """Let a method of a module run as its forward, between the hooks: there, and nowhere else, ZeRO-3 gathers the module's own weights."""

    @functools.wraps(method)
    def run(self: nn.Module, *args, **kwargs):
        def once(*args, **kwargs):
            del self.forward  # back to the class's own, for the calls within
            return method(self, *args, **kwargs)

        self.forward = once
        try:
            return self(*args, **kwargs)
        finally:
            vars(self).pop("forward", None)  # a hook raised before

    return run


class ChannelLastConv1d(nn.Conv1d):
    """Convolution over time of a (B, N, C) sequence that keeps its length (odd kernels)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu:
            # oneDNN copies to its own layouts and back: one product with all neighbourhoods is quicker, forward and backward. Compiled
            # by inductor (torch 2.13), the backward pass of its convolution within a block gives wrong gradients besides.
            reach = self.kernel_size[0] // 2
            neighbourhoods = F.pad(x, (0, 0, reach, reach)).unfold(1, self.kernel_size[0], 1)
            return F.linear(neighbourhoods.flatten(2), self.weight.flatten(1), self.bias)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def token_map(in_dim: int, out_dim: int, kernel_size: int, bias: bool = True) -> nn.Module:
    """Linear map of each token, or of its neighbourhood when `kernel_size` > 1."""
    if kernel_size == 1:
        return nn.Linear(in_dim, out_dim, bias=bias)
    return ChannelLastConv1d(in_dim, out_dim, kernel_size, bias=bias)


def swiglu_width(dim: int, ratio: float, multiple: int) -> int:
    """Hidden width of a SwiGLU with the parameters of a plain MLP of `ratio * dim`, rounded up to `multiple`."""
    return multiple * math.ceil(int(2 * ratio * dim / 3) / multiple)


class SwiGLU(nn.Module):
    """`w2(silu(w1 x) * w3 x)` without biases; with `kernel_size` > 1 all three maps are convolutions (MMAudio's ConvMLP)."""

    def __init__(self, dim: int, hidden: int, kernel_size: int = 1):
        super().__init__()
        self.w1 = token_map(dim, hidden, kernel_size, bias=False)
        self.w2 = token_map(hidden, dim, kernel_size, bias=False)
        self.w3 = token_map(dim, hidden, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rotary_angles(length: int, head_dim: int, stride: float = 1.0, device: torch.device | None = None) -> Rotation:
    """Rotation of positions 0, stride, 2 stride, ...; a stride of latents per token aligns two sequences in time.

    Built per call rather than kept in a buffer: `model.bfloat16()` would round a buffer, and the angles must stay in float32.
    """
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, stride * frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate neighbouring channel pairs of `x` (B, H, N, head_dim) by their positions, computed in float32."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class AttentionHeads(nn.Module):
    """Queries, keys and values of a sequence, each (B, H, N, head_dim), with RMS-normalised and rotated queries and keys."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // heads)
        self.k_norm = nn.RMSNorm(dim // heads)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        # MMAudio packs (head, channel, q|k|v) with q|k|v fastest, unlike timm: its checkpoints depend on it.
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1, 3)).transpose(1, 2).unbind(-1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, H, N, head_dim) heads, merged to (B, N, D)."""
    if attention_kernel(q.device.type, q.dtype, q.shape[-1], installed=flash_attn_func is not None) == "flash_attn":
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).flatten(2)
    # Strided inputs crash the backward pass of some fused kernels (pytorch#133974).
    attended = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
    return attended.transpose(1, 2).flatten(2)


def attention_kernel(device: str, dtype: torch.dtype, head_dim: int, installed: bool) -> str:
    """"flash_attn" where that package is `installed` and takes the heads: half precision on CUDA, up to 256 wide; "sdpa" elsewhere."""
    fits = device == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256 and head_dim % 8 == 0
    return "flash_attn" if installed and fits else "sdpa"


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of `t` (B,) through an MLP, (B, D); wavelengths reach 2 pi `max_period`."""

    def __init__(self, dim: int, frequency_dim: int, max_period: float):
        super().__init__()
        self.frequency_dim = frequency_dim
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(0, self.frequency_dim, 2, dtype=torch.float32, device=t.device) / self.frequency_dim
        frequencies = 10_000.0 / self.max_period * 10_000.0**-steps
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.mlp[0].weight.dtype))


def adaptive_modulation(dim: int, parts: int) -> nn.Sequential:
    """Map from a condition (..., D) to `parts` modulation vectors of width D, side by side (adaLN)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x (1 + scale) + shift`."""
    return x * (1 + scale) + shift


class TransformerBlock(nn.Module):
    """One adaLN transformer block; `attention_only` keeps just its share in a joint attention."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, kernel_size: int, attention_only: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = AttentionHeads(dim, heads)
        self.adaLN_modulation = adaptive_modulation(dim, 2 if attention_only else 6)
        self.attention_only = attention_only
        if not attention_only:
            self.linear1 = token_map(dim, dim, kernel_size)
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
            self.ffn = SwiGLU(dim, mlp_hidden, kernel_size)

    def before_attention(self, x: Tensor, condition: Tensor, rotation: Rotation | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Queries, keys and values of `x` (B, N, D), and the modulation left for `after_attention`."""
        shift, scale, *rest = self.adaLN_modulation(condition).chunk(2 if self.attention_only else 6, dim=-1)
        return self.attn(modulate(self.norm1(x), shift, scale), rotation), tuple(rest)

    def after_attention(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Residual updates of `x` by its attended tokens, then by the feed-forward."""
        if self.attention_only:
            return x
        attention_gate, shift, scale, mlp_gate = modulation
        x = x + self.linear1(attended) * attention_gate
        return x + self.ffn(modulate(self.norm2(x), shift, scale)) * mlp_gate

    def forward(self, x: Tensor, condition: Tensor, rotation: Rotation | None) -> Tensor:
        heads, modulation = self.before_attention(x, condition, rotation)
        return self.after_attention(x, attend(*heads), modulation)


class FinalLayer(nn.Module):
    """Modulated norm and convolution from tokens (B, N, D) to outputs (B, N, C)."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int):
        super().__init__()
        self.adaLN_modulation = adaptive_modulation(dim, 2)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.conv = ChannelLastConv1d(dim, out_dim, kernel_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.conv(modulate(self.norm(x), shift, scale))
