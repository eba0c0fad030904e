"""SlowFast residual networks (Feichtenhofer et al. 2019) for video and, on (time, frequency), for audio (Kazakos et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from models.encoders.batch_norm import POLICIES, BatchNorm
from models.recomputation import recomputed

__all__ = ["PRESETS", "SlowFast", "SlowFastConfig"]

_CONV = {1: nn.Conv2d, 2: nn.Conv3d}
_POOL = {1: nn.MaxPool2d, 2: nn.MaxPool3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_EXPANSION = 4


@dataclass(frozen=True, kw_only=True)
class SlowFastConfig:
    """One tower. Kernels and strides are given as (time, space); space is height and width, or frequency."""

    space_axes: int = 2
    """Axes besides time: 2 = video (height, width), 1 = audio (frequency)."""
    in_channels: int = 3
    """Input channels: 3 for RGB, 1 for a log-mel."""
    width: int = 64
    """Channels of the slow stem; stage i has 4 * width * 2**i."""
    alpha: int = 4
    """The slow pathway sees every alpha-th step."""
    beta: int = 8
    """The fast pathway has 1 / beta of the slow one's channels."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Bottlenecks per stage res2, res3, ..."""
    slow_kernels: tuple[int, ...] = (1, 1, 3, 3)
    """Temporal kernel per stage of the slow pathway (MultiSoundGen tables B1, B2)."""
    fast_kernels: tuple[int, ...] = (1, 3, 3, 3)
    """The same of the fast pathway. The tables have 1 in res2; the original SlowFast and its public weights have 3."""
    stage_strides: tuple[int, ...] = (1, 2, 2, 2)
    """Spatial stride per stage; time is never strided after the stem."""
    stem_kernel: int = 7
    """Spatial kernel of the stem."""
    stem_times: tuple[int, int] = (1, 5)
    """Temporal kernels of the slow and of the fast stem."""
    stem_stride: tuple[int, int] = (1, 2)
    """Stride of the stem's convolution."""
    pool_kernel: tuple[int, int] = (1, 3)
    """Kernel of the stem's max pooling."""
    pool_stride: tuple[int, int] = (1, 2)
    """Stride of the stem's max pooling."""
    lateral_kernel: int = 7
    """Temporal kernel of the fast-to-slow convolutions; their stride is alpha and they double the channels."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """What batch norm measures in training: "local" = this rank's batch; "sync" = that of all ranks; "frozen" = nothing, it applies the
    running statistics, for published weights and for batches too small to measure."""
    activation_checkpointing: tuple[str, ...] = ()
    """Parts whose activations are computed again in the backward pass rather than kept: "stem", "res2", "res3", ..."""
    channels_last: bool = False
    """Keep feature maps with the channels innermost in memory: faster convolutions on GPUs with tensor cores."""
    zero_init: bool = True
    """Start each bottleneck as its shortcut: the last batch norm's scale is zero."""

    def __post_init__(self):
        if self.space_axes not in _CONV:
            raise ValueError(f"SlowFastConfig.space_axes is {self.space_axes}: choose 2 (video) or 1 (audio)")
        for name in ("slow_kernels", "fast_kernels", "stage_strides"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(f"SlowFastConfig.{name} is {getattr(self, name)}: give one value per stage of depths {self.depths}")
        kernels = (*self.slow_kernels, *self.fast_kernels, *self.stem_times, *self.pool_kernel, self.stem_kernel, self.lateral_kernel)
        if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"SlowFastConfig: kernels are {kernels}: choose odd ones, so that both pathways stay aligned in time")
        if self.width % self.beta:
            raise ValueError(f"SlowFastConfig.width is {self.width}: choose a multiple of beta ({self.beta})")
        if self.batch_norm not in POLICIES:
            raise ValueError(f"SlowFastConfig.batch_norm is {self.batch_norm!r}: choose one of {', '.join(POLICIES)}")
        if unknown := sorted(set(self.activation_checkpointing) - set(self.parts)):
            raise ValueError(f"SlowFastConfig.activation_checkpointing has {', '.join(unknown)}: choose from {', '.join(self.parts)}")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stem and the stages, as in the papers' tables."""
        return ("stem", *(f"res{number}" for number in range(2, 2 + len(self.depths))))

    @property
    def slow_dim(self) -> int:
        """Channels of the slow pathway's last feature map."""
        return self.width * _EXPANSION * 2 ** (len(self.depths) - 1)

    @property
    def fast_dim(self) -> int:
        """Channels of the fast pathway's last feature map."""
        return self.slow_dim // self.beta

    @property
    def out_dim(self) -> int:
        """Length of the pooled embedding."""
        return self.slow_dim + self.fast_dim


_AUDIO = {"space_axes": 1, "in_channels": 1, "stem_stride": (2, 2), "pool_kernel": (3, 3), "pool_stride": (2, 2)}
_TINY = {"width": 16, "beta": 4, "depths": (1, 1, 1, 1), "stem_kernel": 5}

PRESETS: dict[str, SlowFastConfig] = {
    "video_r50": SlowFastConfig(),
    "audio_r50": SlowFastConfig(**_AUDIO),
    "video_tiny": SlowFastConfig(**_TINY),
    "audio_tiny": SlowFastConfig(**_AUDIO, **_TINY),
}
PRESETS["video_r50_kinetics"] = replace(PRESETS["video_r50"], fast_kernels=(3, 3, 3, 3))


class SlowFast(nn.Module):
    """Video (B, T, C, H, W) or log-mel (B, F, T) -> embedding (B, out_dim): both pathways' global means, slow first."""

    def __init__(self, config: SlowFastConfig):
        super().__init__()
        self.config = config
        slow, fast = config.width, config.width // config.beta
        self.slow_stem = _stem(config, slow, config.stem_times[0])
        self.fast_stem = _stem(config, fast, config.stem_times[1])
        self.laterals, self.slow_stages, self.fast_stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        slow_in, fast_in = slow, fast
        for stage in range(len(config.depths)):
            scale = 2**stage
            self.laterals.append(_lateral(config, fast_in))
            self.slow_stages.append(_stage(config, stage, slow_in + 2 * fast_in, slow * scale, config.slow_kernels))
            self.fast_stages.append(_stage(config, stage, fast_in, fast * scale, config.fast_kernels))
            slow_in, fast_in = slow * scale * _EXPANSION, fast * scale * _EXPANSION
        self._initialise()

    def pathways(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Last feature maps before pooling: slow (B, slow_dim, T / alpha, ...space) and fast (B, fast_dim, T, ...space)."""
        x = self._time_first(x).to(self.slow_stem[0].conv.weight.dtype)
        if self.config.channels_last:
            x = x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
        paths = self._run("stem", self._stems, x)
        for number, part in enumerate(self.config.parts[1:]):
            paths = self._run(part, partial(self._stages, number), *paths)
        return paths

    def _run(self, part: str, function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return recomputed(function, *inputs) if part in self.config.activation_checkpointing else function(*inputs)

    def _stems(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.slow_stem(x[:, :, :: self.config.alpha]), self.fast_stem(x)

    def _stages(self, number: int, slow: Tensor, fast: Tensor) -> tuple[Tensor, Tensor]:
        slow = torch.cat([slow, self.laterals[number](fast)], dim=1)
        return self.slow_stages[number](slow), self.fast_stages[number](fast)

    def forward(self, x: Tensor) -> Tensor:
        """Embedding (B, out_dim), not normalised."""
        return torch.cat([path.flatten(2).mean(dim=2) for path in self.pathways(x)], dim=1)

    def _time_first(self, x: Tensor) -> Tensor:
        """Input as (B, C, T, ...space)."""
        axes, layout = (3, "log-mel (B, F, T)") if self.config.space_axes == 1 else (5, "frames (B, T, C, H, W)")
        if x.dim() != axes:
            raise ValueError(f"SlowFast takes {layout}, not {tuple(x.shape)}: check which tower this is")
        x = x.transpose(1, 2).unsqueeze(1) if self.config.space_axes == 1 else x.transpose(1, 2).contiguous()
        if x.shape[1] != self.config.in_channels:
            raise ValueError(f"SlowFast takes {self.config.in_channels} channels, not {x.shape[1]}: pass {layout}")
        return x

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck) and self.config.zero_init:
                nn.init.zeros_(module.c.norm.weight)


class Bottleneck(nn.Module):
    """Temporal convolution `a`, spatial `b`, expansion `c`, around a shortcut."""

    def __init__(self, config: SlowFastConfig, in_dim: int, dim: int, time: int, stride: int):
        super().__init__()
        out_dim = dim * _EXPANSION
        self.a = ConvNorm(config, in_dim, dim, (time, 1))
        self.b = ConvNorm(config, dim, dim, (1, 3), (1, stride))
        self.c = ConvNorm(config, dim, out_dim, (1, 1))
        same = in_dim == out_dim and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(config, in_dim, out_dim, (1, 1), (1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, T, ...space) -> (B, 4 * dim, T, ...space / stride)."""
        h = self.c(self.b(self.a(x).relu()).relu())
        return (self.shortcut(x) + h).relu()


class ConvNorm(nn.Module):
    """Convolution without bias, padded to keep the size at stride 1, and its batch norm."""

    def __init__(self, config: SlowFastConfig, in_dim: int, out_dim: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)):
        super().__init__()
        size, step = _axes(config, kernel), _axes(config, stride)
        self.conv = _CONV[config.space_axes](in_dim, out_dim, size, step, padding=_same(size), bias=False)
        self.norm = BatchNorm(out_dim, config.batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, T, ...space) -> (B, out_dim, ...)."""
        return self.norm(self.conv(x))


def _axes(config: SlowFastConfig, time_space: tuple[int, int]) -> tuple[int, ...]:
    return (time_space[0],) + (time_space[1],) * config.space_axes


def _same(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size // 2 for size in kernel)


def _stem(config: SlowFastConfig, dim: int, time: int) -> nn.Sequential:
    kernel = _axes(config, config.pool_kernel)
    return nn.Sequential(
        ConvNorm(config, config.in_channels, dim, (time, config.stem_kernel), config.stem_stride),
        nn.ReLU(),
        _POOL[config.space_axes](kernel, _axes(config, config.pool_stride), _same(kernel)),
    )


def _lateral(config: SlowFastConfig, dim: int) -> nn.Sequential:
    return nn.Sequential(ConvNorm(config, dim, 2 * dim, (config.lateral_kernel, 1), (config.alpha, 1)), nn.ReLU())


def _stage(config: SlowFastConfig, stage: int, in_dim: int, dim: int, kernels: tuple[int, ...]) -> nn.Sequential:
    dims = [in_dim] + [dim * _EXPANSION] * (config.depths[stage] - 1)
    strides = [config.stage_strides[stage]] + [1] * (config.depths[stage] - 1)
    return nn.Sequential(*(Bottleneck(config, d, dim, kernels[stage], s) for d, s in zip(dims, strides, strict=True)))
