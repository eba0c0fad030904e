"""Encoders as conditions of a generator: each fills some of MM-DiT's slots `clip`, `sync`, `text`, and they can be combined."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from models.encoders.sf_cavp import SFCAVP, SFCAVPConfig
from models.encoders.synchformer import Synchformer

__all__ = [
    *("CLIPImageConditioner", "CLIPTextConditioner", "CombinedConditioner", "Conditioner", "Conditions"),
    *("EncoderConditioner", "FrameView", "ImageTextEncoder", "SynchformerConditioner", "ends_within_segment"),
]

SLOTS = ("clip", "sync", "text")


@dataclass
class Conditions:
    """What a generator is told about a video; a missing one is None and is filled with what the generator learned for it."""

    clip: Tensor | None = None
    """Slow, semantic tokens (B, Tc, Dc)."""
    sync: Tensor | None = None
    """Fast tokens that carry the timing (B, Ts, Ds)."""
    text: Tensor | None = None
    """Text tokens (B, Tt, Dt)."""
    segments: Tensor | None = None
    """No condition: the segment embeddings (B, S, D) that the reward compares, where a contrastive encoder looked at the pictures."""

    def filled(self) -> dict[str, Tensor]:
        """The conditions that are there, by name."""
        return {name: value for name in SLOTS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class FrameView:
    """Pictures as an encoder wants to see them; whoever reads the video makes them, once for all encoders that want the same."""

    fps: float
    """Frames per second."""
    size: int | None = None
    """Side of the square pictures, pixels; None: as the recipe has them."""
    crop: bool = True
    """True: the shorter side is scaled to `size` and the centre kept; False: the whole picture is squashed into the square."""


class Conditioner(nn.Module, abc.ABC):
    """Turns pictures and captions into conditions. Its encoders are not trained here; callers choose `torch.no_grad`."""

    fills: tuple[str, ...]
    """Slots of `Conditions` that it fills, of "clip", "sync", "text"."""
    views: tuple[FrameView, ...] = ()
    """Pictures it needs; none for a text encoder."""

    @abc.abstractmethod
    def conditions(self, frames: Mapping[FrameView, Tensor], text: Sequence[str] | None = None) -> Conditions:
        """Frames (B, T, C, H, W) in [0, 1] by view and B captions -> conditions; those are None where no frames, or no text, are given."""

    @abc.abstractmethod
    def sizes(self, seconds: float) -> dict[str, int]:
        """Fields of MMDiTConfig that its tokens decide for clips of `seconds`: `clip_dim`, `clip_len`, `sync_group`, ..."""

    def pictures(self, frames: Mapping[FrameView, Tensor]) -> Tensor | None:
        """The frames of its only view; None without any, for sound from text alone."""
        (view,) = self.views
        if frames and view not in frames:
            raise ValueError(f"{type(self).__name__} needs frames as {view}: make those of all `views`")
        return frames.get(view)


class EncoderConditioner(Conditioner):
    """A contrastive encoder as conditioner: its slow path over time tells what is seen, its fast path when it happens.

    Each channel is standardised over a sample of the data. Features after a ReLU are all positive and of very different sizes;
    unscaled, the few large ones drown the transients that carry the timing.

    A clip has the tokens of its whole segments, whatever is left over: the generator lays them evenly over all of a clip, so where
    there is a rest they are spread over it too.
    """

    fills = ("clip", "sync")

    def __init__(self, encoder: SFCAVP):
        super().__init__()
        self.encoder = encoder
        self.views = (FrameView(fps=encoder.config.fps),)
        for name, dim in (("clip", encoder.semantic_dim), ("sync", encoder.sync_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))

    def forward(self, frames: Tensor) -> tuple[Conditions, Tensor]:
        """Frames (B, T, C, H, W) in [0, 1] -> conditions, and the segment embeddings (B, S, D) that the reward compares."""
        config, count = self.encoder.config, frames.shape[1]
        missing = -_rest(count, config) % config.hop_frames
        if missing:
            # The last picture stands until the segment ends, so that the rest is seen.
            frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        features = self.encoder.encode_video(frames)
        segments, semantic, sync = features.segments, features.semantic, features.sync
        if missing:
            whole, total = segments.shape[1] - 1, segments.shape[1]
            semantic, sync = (_in_time(x, x.shape[1] * whole // total, count / (count + missing)) for x in (semantic, sync))
            # A segment of sound is whole as well.
            segments = segments[:, :whole]
        clip = (semantic - self.clip_mean) / self.clip_std
        sync = (sync - self.sync_mean) / self.sync_std
        return Conditions(clip=clip, sync=sync), segments

    def conditions(self, frames: Mapping[FrameView, Tensor], text: Sequence[str] | None = None) -> Conditions:
        """Conditions alone, for callers that do not know which conditioner they have."""
        pictures = self.pictures(frames)
        if pictures is None:
            return Conditions()
        conditions, segments = self(pictures)
        return Conditions(clip=conditions.clip, sync=conditions.sync, segments=segments)

    def sizes(self, seconds: float) -> dict[str, int]:
        """One group of synchrony tokens per segment."""
        config, encoder = self.encoder.config, self.encoder
        size, hop = config.segment_frames, config.hop_frames
        segments = _segments(seconds, config.fps, size, hop)
        clip = {"clip_dim": encoder.semantic_dim, "clip_len": segments * -(-size // config.video.alpha)}
        return clip | _sync_sizes(encoder.sync_dim, segments, size, (size - hop) // hop)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure the standardisation on batches of frames (B, T, C, H, W)."""
        features = [self.encoder.encode_video(frames) for frames in batches]
        for name, tokens in (("clip", [f.semantic for f in features]), ("sync", [f.sync for f in features])):
            std, mean = torch.std_mean(torch.cat(tokens).flatten(0, 1).float(), dim=0)
            getattr(self, f"{name}_mean").copy_(mean)
            # A channel that hardly moves carries little; the floor keeps the rare times it does from drowning all others.
            getattr(self, f"{name}_std").copy_(std.clamp_min(0.1 * std.square().mean().sqrt().clamp_min(1e-6)))


class SynchformerConditioner(Conditioner):
    """Synchrony tokens of Synchformer's visual encoder, as MMAudio takes them: 192 of 768 channels for 8 s."""

    fills = ("sync",)

    def __init__(self, encoder: Synchformer):
        super().__init__()
        self.encoder = encoder
        self.views = (FrameView(fps=encoder.config.fps, size=encoder.config.image_size),)

    def conditions(self, frames: Mapping[FrameView, Tensor], text: Sequence[str] | None = None) -> Conditions:
        """Synchrony of the pictures."""
        pictures = self.pictures(frames)
        return Conditions() if pictures is None else Conditions(sync=self.encoder.encode_video(pictures))

    def sizes(self, seconds: float) -> dict[str, int]:
        """One group of synchrony tokens per segment."""
        config = self.encoder.config
        size, hop = config.segment_frames, config.hop_frames
        segments = _segments(seconds, config.fps, size, hop)
        return _sync_sizes(config.dim, segments, config.segment_tokens, (size - hop) // hop)


class ImageTextEncoder(Protocol):
    """A CLIP: pictures and captions in one space."""

    image_dim: int
    """Channels of a picture's embedding."""
    text_dim: int
    """Channels of a caption's token."""
    text_len: int
    """Tokens of a caption, padding included."""

    def encode_image(self, frames: Tensor) -> Tensor:
        """Frames (B, T, C, H, W) in [0, 1] -> embeddings (B, T, image_dim), L2-normalised."""
        ...

    def encode_text(self, text: Sequence[str]) -> Tensor:
        """B captions -> tokens (B, text_len, text_dim)."""
        ...


class CLIPImageConditioner(Conditioner):
    """One semantic token per picture, at few pictures per second (MMAudio: 8, squashed to 384 pixels)."""

    fills = ("clip",)

    def __init__(self, encoder: ImageTextEncoder, fps: float = 8.0, size: int = 384):
        super().__init__()
        self.encoder = encoder
        self.views = (FrameView(fps=fps, size=size, crop=False),)

    def conditions(self, frames: Mapping[FrameView, Tensor], text: Sequence[str] | None = None) -> Conditions:
        """Embeddings of the pictures."""
        pictures = self.pictures(frames)
        return Conditions() if pictures is None else Conditions(clip=self.encoder.encode_image(pictures))

    def sizes(self, seconds: float) -> dict[str, int]:
        """As many tokens as pictures."""
        return {"clip_dim": self.encoder.image_dim, "clip_len": _frames(seconds, self.views[0].fps)}


class CLIPTextConditioner(Conditioner):
    """Tokens of the caption."""

    fills = ("text",)

    def __init__(self, encoder: ImageTextEncoder):
        super().__init__()
        self.encoder = encoder

    def conditions(self, frames: Mapping[FrameView, Tensor], text: Sequence[str] | None = None) -> Conditions:
        """Tokens of the captions."""
        return Conditions() if text is None else Conditions(text=self.encoder.encode_text(text))

    def sizes(self, seconds: float) -> dict[str, int]:
        """The same for any length of clip."""
        return {"text_dim": self.encoder.text_dim, "text_len": self.encoder.text_len}


class CombinedConditioner(Conditioner):
    """Each slot from a conditioner of its own; one given for several slots runs once."""

    def __init__(self, *, clip: Conditioner | None = None, sync: Conditioner | None = None, text: Conditioner | None = None):
        super().__init__()
        given = {name: part for name, part in zip(SLOTS, (clip, sync, text), strict=True) if part is not None}
        for name, part in given.items():
            if name not in part.fills:
                raise ValueError(f"CombinedConditioner: {type(part).__name__} fills {', '.join(part.fills)}, not {name}: give another one")
        self.parts = nn.ModuleList(dict.fromkeys(given.values()))
        self.sources = {name: list(self.parts).index(part) for name, part in given.items()}
        self.fills = tuple(given)
        self.views = tuple(dict.fromkeys(view for part in self.parts for view in part.views))

    def conditions(self, frames: Mapping[FrameView, Tensor], text: Sequence[str] | None = None) -> Conditions:
        """Every slot from its conditioner."""
        made = [part.conditions(frames, text) for part in self.parts]
        segments = next((each.segments for each in made if each.segments is not None), None)
        return Conditions(**{name: getattr(made[index], name) for name, index in self.sources.items()}, segments=segments)

    def sizes(self, seconds: float) -> dict[str, int]:
        """Of the slots that are filled."""
        sizes = [part.sizes(seconds) for part in self.parts]
        chosen = [(name, sizes[index]) for name, index in self.sources.items()]
        return {field: value for name, fields in chosen for field, value in fields.items() if field.startswith(f"{name}_")}


def ends_within_segment(seconds: float, config: SFCAVPConfig) -> bool:
    """Whether a clip of `seconds` is no whole number of a contrastive encoder's segments."""
    return _rest(_frames(seconds, config.fps), config) > 0


def _rest(frames: int, config: SFCAVPConfig) -> int:
    """Frames after the last whole segment; 0 too where there is none, which an encoder refuses."""
    return max(0, frames - config.segment_frames) % config.hop_frames


def _in_time(tokens: Tensor, count: int, share: float) -> Tensor:
    """Tokens (B, N, D) -> `count` fewer ones (B, count, D) that lie evenly over the first `share` of their time: means, so none is lost."""
    length = tokens.shape[1]
    width = share * length / count
    starts, places = (torch.arange(n, device=tokens.device, dtype=torch.float64) for n in (count, length))
    starts = starts[:, None] * width
    overlap = torch.minimum(starts + width, places + 1) - torch.maximum(starts, places)
    return (overlap.clamp_min(0) / width).to(tokens.dtype) @ tokens


def _frames(seconds: float, fps: float) -> int:
    """Whole frames of a clip. The margin stops 0.28 * 25 = 6.999... from being 6."""
    return int(seconds * fps + 1e-6)


def _segments(seconds: float, fps: float, size: int, hop: int) -> int:
    frames = _frames(seconds, fps)
    if frames < size:
        raise ValueError(f"a clip of {seconds:g} s has {frames} frames at {fps:g} fps, fewer than one segment of {size}: use longer clips")
    return (frames - size) // hop + 1


def _sync_sizes(dim: int, segments: int, group: int, margin: int) -> dict[str, int]:
    return {"sync_dim": dim, "sync_len": segments * group, "sync_group": group, "sync_margin": margin}
