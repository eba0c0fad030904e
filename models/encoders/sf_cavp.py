"""SF-CAVP: segment-level contrastive pretraining of two SlowFast towers (MultiSoundGen, arXiv:2509.19999, appendix B)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders import slowfast
from models.encoders.batch_norm import BatchNorm
from models.encoders.features import AudioFeatures, VideoFeatures
from models.encoders.slowfast import SlowFast, SlowFastConfig
from models.objectives.infonce import NEGATIVES, segment_infonce
from models.recomputation import in_chunks

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
    negatives: Literal["global", "local"] = "global"
    """Segments that the loss tells apart: those of all ranks, so that it does not depend on their number, or those of each rank."""
    feature_norm: Literal["none", "batch"] = "none"
    """"batch": standardise each channel of the embeddings by a batch norm without affine parameters; small towers start faster. It
    measures what its tower's `batch_norm` says, but is never frozen: published weights have no statistics of it."""
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
        if self.negatives not in NEGATIVES:
            raise ValueError(f"SFCAVPConfig.negatives is {self.negatives!r}: choose one of {', '.join(NEGATIVES)}")
        if self.feature_norm not in ("none", "batch"):
            raise ValueError(f"SFCAVPConfig.feature_norm is {self.feature_norm!r}: choose 'none' or 'batch'")

    def seconds(self, segments: int) -> float:
        """Length of `segments` segments, one hop apart, in seconds."""
        return (self.segment_frames + (segments - 1) * self.hop_frames) / self.fps

    @property
    def hop_mels(self) -> int:
        """Mel frames from one segment to the next."""
        return self.hop_frames * self.segment_mels // self.segment_frames


PRESETS: dict[str, SFCAVPConfig] = {
    "r50": SFCAVPConfig(),
    "r50_kinetics": SFCAVPConfig(video=slowfast.PRESETS["video_r50_kinetics"]),
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
        self.video_norm, self.audio_norm = (_feature_norm(config, tower) for tower in (config.video, config.audio))
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

    def forward(self, frames: Tensor, mel: Tensor, chunk: int = 0) -> dict[str, Tensor]:
        """Frames (B, T, C, H, W) and their log-mel (B, F, T') -> `loss`, `accuracy` (see `segment_infonce`), `temperature`.

        With `chunk` the towers see that many clips at a time, twice: the loss is that of all clips, the memory that of a chunk. A batch
        norm that is not frozen then measures chunks.
        """
        video = self.video_norm(in_chunks(lambda part: _pooled(self._video_tokens(part)), frames, chunk))
        audio = self.audio_norm(in_chunks(lambda part: _pooled(self._audio_tokens(part)), mel, chunk))
        _check_aligned(_per_clip(video, frames), _per_clip(audio, mel))
        temperature = self.temperature
        loss, accuracy = segment_infonce(audio, video, temperature, self.config.negatives)
        return {"loss": loss, "accuracy": accuracy, "temperature": temperature.detach()}

    def encode_video(self, frames: Tensor) -> VideoFeatures:
        """Frames (B, T, C, H, W), float in [0, 1] or uint8; a rest shorter than a hop is left out.

        Per segment 32 / alpha slow and 32 fast tokens.
        """
        tokens = self._video_tokens(frames)
        return VideoFeatures(_per_clip(self.video_norm(_pooled(tokens)), frames), *(_in_time(path, frames) for path in tokens))

    def encode_audio(self, mel: Tensor) -> AudioFeatures:
        """Log-mel (B, F, T') of the front end `config.mel`, cut like the frames."""
        tokens = self._audio_tokens(mel)
        return AudioFeatures(_per_clip(self.audio_norm(_pooled(tokens)), mel), _in_time(tokens[1], mel))

    def similarity(self, video: Tensor, audio: Tensor) -> Tensor:
        """Cosine of each pair of segment embeddings (B, S, D), (B, S, D) -> (B, S): the reward of AVP-RPO before equation 3."""
        _check_aligned(video, audio)
        return F.cosine_similarity(video.float(), audio.float(), dim=-1)

    def _video_tokens(self, frames: Tensor) -> list[Tensor]:
        """Slow and fast tokens (B*S, d, t) of each segment."""
        config = self.config
        segments = _segments(frames, 1, config.segment_frames, config.hop_frames, "frames")
        if frames.dtype == torch.uint8:
            segments = segments / 255
        mean, std = (segments.new_tensor(values).view(-1, 1, 1) for values in (config.video_mean, config.video_std))
        segments = (segments - mean) / std
        if config.subtract_temporal_mean:
            segments = segments - segments.mean(dim=1, keepdim=True)
        return _tokens(self.video, segments)

    def _audio_tokens(self, mel: Tensor) -> list[Tensor]:
        segments = _segments(mel, 2, self.config.segment_mels, self.config.hop_mels, "mel frames")
        return _tokens(self.audio, (segments - self.config.mel_mean) / self.config.mel_std)


def _tokens(tower: SlowFast, segments: Tensor) -> list[Tensor]:
    """Slow and fast feature maps without their space, (N, d, t)."""
    return [path.flatten(3).mean(dim=3) for path in tower.pathways(segments)]


def _pooled(tokens: list[Tensor]) -> Tensor:
    """Embeddings (N, D): both pathways' means over time, slow first."""
    return torch.cat([path.mean(dim=2) for path in tokens], dim=1)


def _per_clip(rows: Tensor, clips: Tensor) -> Tensor:
    """Rows (B*S, ...) of segments as (B, S, ...)."""
    return rows.unflatten(0, (len(clips), -1))


def _in_time(path: Tensor, clips: Tensor) -> Tensor:
    """Tokens (B*S, d, t) of segments -> (B, S*t, d), in order of time."""
    return _per_clip(path.transpose(1, 2), clips).flatten(1, 2)


def _segments(x: Tensor, axis: int, size: int, hop: int, unit: str) -> Tensor:
    """Windows of `size` every `hop` along `axis` of (B, ...), as one batch (B*S, ...)."""
    if x.shape[axis] < size:
        raise ValueError(f"SFCAVP: a clip of {x.shape[axis]} {unit} is shorter than one segment of {size}: use longer clips")
    return x.unfold(axis, size, hop).movedim(axis, 1).movedim(-1, axis + 1).flatten(0, 1)


def _check_aligned(video: Tensor, audio: Tensor) -> None:
    if video.shape != audio.shape:
        raise ValueError(f"SFCAVP: video gives segments {tuple(video.shape)}, audio {tuple(audio.shape)} (B, S, D): cut both to one length")


def _feature_norm(config: SFCAVPConfig, tower: SlowFastConfig) -> nn.Module:
    if config.feature_norm == "none":
        return nn.Identity()
    return BatchNorm(tower.out_dim, "sync" if tower.batch_norm == "sync" else "local", affine=False)


def _temperature_logit(config: SFCAVPConfig) -> Tensor:
    low, high = (math.log(bound) for bound in config.temperature_bounds)
    return torch.logit(torch.tensor((math.log(config.temperature) - low) / (high - low)))
