"""SF-CAVP: segment-level contrastive pretraining of two SlowFast towers (MultiSoundGen, arXiv:2509.19999, appendix B)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import slowfast
from models.encoders.features import AudioFeatures, VideoFeatures
from models.encoders.slowfast import SlowFast, SlowFastConfig
from models.objectives.infonce import segment_infonce

__all__ = ["PRESETS", "SFCAVP", "SFCAVPConfig"]


@dataclass(frozen=True, kw_only=True)
class SFCAVPConfig:
    """Both towers and how clips are cut into segments. The paper gives the segment's sizes; the rest are our choices."""

    video: SlowFastConfig = field(default_factory=lambda: slowfast.PRESETS["video_r50"])
    """Video tower."""
    audio: SlowFastConfig = field(default_factory=lambda: slowfast.PRESETS["audio_r50"])
    """Audio tower; its embedding is as long as the video tower's."""
    mel: str = "sf_cavp"
    """Name of the log-mel front end in data_prep.audio."""
    fps: float = 25.0
    """Frames per second of the video: 32 frames last as long as 128 mels of 10 ms."""
    segment_frames: int = 32
    """Video frames of a segment."""
    segment_mels: int = 128
    """Mel frames of a segment."""
    hop_frames: int = 32
    """Frames from one segment to the next. Overlap gives a reward more segments to rank, but repeats conditioning tokens."""
    temperature: float = 0.07
    """Temperature at the start; it is trained."""
    temperature_bounds: tuple[float, float] = (0.01, 1.0)
    """Open interval the temperature stays in."""
    feature_norm: Literal["none", "batch"] = "none"
    """"batch": standardise each channel of the embeddings by a batch norm without affine parameters; small towers start faster."""
    video_mean: tuple[float, ...] = (0.45, 0.45, 0.45)
    """Mean of the pixels in [0, 1], per channel (Kinetics SlowFast)."""
    video_std: tuple[float, ...] = (0.225, 0.225, 0.225)
    """Their standard deviation."""
    mel_mean: float = -5.0
    """Mean of the log-mels (natural logarithm; measured on a few recorded clips)."""
    mel_std: float = 2.0
    """Their standard deviation."""
    subtract_temporal_mean: bool = False
    """Show the video tower each segment minus its mean picture: a bright still background cannot drown what moves."""

    def __post_init__(self):
        if self.video.out_dim != self.audio.out_dim:
            raise ValueError(f"SFCAVPConfig: towers give {self.video.out_dim} and {self.audio.out_dim} channels: give both the same widths")
        if not 1 <= self.hop_frames <= self.segment_frames:
            raise ValueError(f"SFCAVPConfig.hop_frames is {self.hop_frames}: choose 1 to segment_frames ({self.segment_frames})")
        if self.hop_frames * self.segment_mels % self.segment_frames:
            raise ValueError(f"SFCAVPConfig.hop_frames is {self.hop_frames}: {self.segment_mels}/{self.segment_frames} mels per frame "
                             "must make a whole number of mels per hop")
        low, high = self.temperature_bounds
        if not 0 < low < self.temperature < high:
            raise ValueError(f"SFCAVPConfig.temperature is {self.temperature}: choose a value between temperature_bounds {low} and {high}")
        if not len(self.video_mean) == len(self.video_std) == self.video.in_channels:
            raise ValueError(f"SFCAVPConfig.video_mean, video_std: give {self.video.in_channels} values, the channels of the video tower")
        if min(*self.video_std, self.mel_std) <= 0:
            raise ValueError("SFCAVPConfig.video_std, mel_std: give values above 0")
        if self.feature_norm not in ("none", "batch"):
            raise ValueError(f"SFCAVPConfig.feature_norm is {self.feature_norm!r}: choose 'none' or 'batch'")

    @property
    def hop_mels(self) -> int:
        """Mel frames from one segment to the next."""
        return self.hop_frames * self.segment_mels // self.segment_frames


PRESETS: dict[str, SFCAVPConfig] = {
    "r50": SFCAVPConfig(),
    "tiny": SFCAVPConfig(
        video=slowfast.PRESETS["video_tiny"],
        audio=slowfast.PRESETS["audio_tiny"],
        temperature=0.1,
        feature_norm="batch",
        subtract_temporal_mean=True,
    ),
}


class SFCAVP(nn.Module):
    """Two towers trained to embed the picture and the sound of one segment alike; encoder, conditioner and reward in one."""

    def __init__(self, config: SFCAVPConfig):
        super().__init__()
        self.config = config
        self.video, self.audio = SlowFast(config.video), SlowFast(config.audio)
        self.video_norm, self.audio_norm = (_feature_norm(config) for _ in range(2))
        self.temperature_logit = nn.Parameter(_temperature_logit(config))

    @property
    def semantic_dim(self) -> int:
        """Channels of `VideoFeatures.semantic`."""
        return self.config.video.slow_dim

    @property
    def sync_dim(self) -> int:
        """Channels of `VideoFeatures.sync`."""
        return self.config.video.fast_dim

    @property
    def temperature(self) -> Tensor:
        """Temperature within its bounds. A sigmoid between their logarithms: a clamp has no gradient once outside, and would stay there."""
        low, high = (math.log(bound) for bound in self.config.temperature_bounds)
        # The training engine holds scalars as vectors of one.
        return torch.exp(low + (high - low) * torch.sigmoid(self.temperature_logit.float())).squeeze()

    def forward(self, frames: Tensor, mel: Tensor) -> dict[str, Tensor]:
        """Frames (B, T, C, H, W) in [0, 1] and their log-mel (B, F, T') -> `loss` of the global batch, `accuracy`, `temperature`."""
        video, audio = self.encode_video(frames).segments, self.encode_audio(mel).segments
        _check_aligned(video, audio)
        temperature = self.temperature
        loss, accuracy = segment_infonce(audio.flatten(0, 1), video.flatten(0, 1), temperature)
        return {"loss": loss, "accuracy": accuracy, "temperature": temperature.detach()}

    def encode_video(self, frames: Tensor) -> VideoFeatures:
        """Frames (B, T, C, H, W) in [0, 1]; a rest shorter than a hop is left out. Per segment 32 / alpha slow and 32 fast tokens."""
        config = self.config
        mean, std = (frames.new_tensor(values).view(-1, 1, 1) for values in (config.video_mean, config.video_std))
        segments = _segments(frames, 1, config.segment_frames, config.hop_frames, "frames")
        segments = (segments - mean) / std
        if config.subtract_temporal_mean:
            segments = segments - segments.mean(dim=1, keepdim=True)
        return VideoFeatures(*self._encode(self.video, self.video_norm, segments, len(frames)))

    def encode_audio(self, mel: Tensor) -> AudioFeatures:
        """Log-mel (B, F, T') of the front end `config.mel`, cut like the frames."""
        config = self.config
        segments = _segments(mel, 2, config.segment_mels, config.hop_mels, "mel frames")
        segments = (segments - config.mel_mean) / config.mel_std
        embedding, _, fast = self._encode(self.audio, self.audio_norm, segments, len(mel))
        return AudioFeatures(embedding, fast)

    def similarity(self, video: Tensor, audio: Tensor) -> Tensor:
        """Cosine of each pair of segment embeddings (B, S, D), (B, S, D) -> (B, S): the reward of AVP-RPO before equation 3."""
        _check_aligned(video, audio)
        return F.cosine_similarity(video.float(), audio.float(), dim=-1)

    def _encode(self, tower: SlowFast, norm: nn.Module, segments: Tensor, clips: int) -> tuple[Tensor, Tensor, Tensor]:
        """Segments (B*S, ...) -> embeddings (B, S, D), slow tokens and fast tokens (B, S*t, d) in order of time."""
        tokens = [path.flatten(3).mean(dim=3) for path in tower.pathways(segments)]
        embedding = norm(torch.cat([path.mean(dim=2) for path in tokens], dim=1))
        slow, fast = (path.transpose(1, 2).unflatten(0, (clips, -1)).flatten(1, 2) for path in tokens)
        return embedding.unflatten(0, (clips, -1)), slow, fast


def _segments(x: Tensor, axis: int, size: int, hop: int, unit: str) -> Tensor:
    """Windows of `size` every `hop` along `axis` of (B, ...), as one batch (B*S, ...)."""
    if x.shape[axis] < size:
        raise ValueError(f"SFCAVP: a clip of {x.shape[axis]} {unit} is shorter than one segment of {size}: use longer clips")
    return x.unfold(axis, size, hop).movedim(axis, 1).movedim(-1, axis + 1).flatten(0, 1)


def _check_aligned(video: Tensor, audio: Tensor) -> None:
    if video.shape != audio.shape:
        raise ValueError(f"SFCAVP: video gives segments {tuple(video.shape)}, audio {tuple(audio.shape)} (B, S, D): cut both to one length")


def _feature_norm(config: SFCAVPConfig) -> nn.Module:
    return nn.BatchNorm1d(config.video.out_dim, affine=False) if config.feature_norm == "batch" else nn.Identity()


def _temperature_logit(config: SFCAVPConfig) -> Tensor:
    low, high = (math.log(bound) for bound in config.temperature_bounds)
    return torch.logit(torch.tensor((math.log(config.temperature) - low) / (high - low)))
