"""Pictures as encoders want to see them, from clips of shards and from any video file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_prep.decoding import ClipDecoder, Random, Sample
from data_prep.frames import resize, sample_indices
from data_prep.index import Entry
from data_prep.media import ClipError, read_video
from data_prep.streaming.backends import backend
from data_prep.transcoding.container import Source, name_of, opened, timed, video_stream
from models.conditioning import FrameView

Pictures = dict[FrameView, torch.Tensor]


def see(frames: torch.Tensor, fps: float, seconds: float, view: FrameView, size: int) -> torch.Tensor:
    """The first `seconds` of frames (T, C, H, W) uint8 at `fps`, as a view wants them; `size` where it leaves that open.

    What is missing at the end is filled with the last frame.
    """
    return _shaped(frames[_shown(fps, seconds, view, total=len(frames))], view, size)


def see_chunks(chunks: Iterator[np.ndarray], fps: float, seconds: float, views: Sequence[FrameView], size: int) -> list[torch.Tensor]:
    """What `see` gives of each view, of frames that come a few at a time, RGB (T, H, W, C): no more of them are held at once."""
    wanted, parts, first = [_shown(fps, seconds, view) for view in views], [list[torch.Tensor]() for _ in views], 0
    for chunk in chunks:
        for view, indices, pictures in zip(views, wanted, parts, strict=True):
            rows = indices[slice(*indices.searchsorted((first, first + len(chunk))))] - first
            if len(rows):
                pictures.append(_from_rgb(chunk[rows], view, size))
        first += len(chunk)
    for view, indices, pictures in zip(views, wanted, parts, strict=True):
        if missing := len(indices) - sum(map(len, pictures)):
            pictures.append(_from_rgb(chunk[-1:], view, size).expand(missing, -1, -1, -1))
    return [torch.cat(pictures) for pictures in parts]


def _shown(fps: float, seconds: float, view: FrameView, total: int | None = None) -> np.ndarray:
    return sample_indices(int(seconds * view.fps + 1e-6), view.fps, fps, total=total)


def _from_rgb(frames: np.ndarray, view: FrameView, size: int) -> torch.Tensor:
    # Resized with the colours still together, which takes a third of the time, and to the same pixels.
    return _shaped(torch.from_numpy(frames).permute(0, 3, 1, 2), view, size).contiguous()


def _shaped(frames: torch.Tensor, view: FrameView, size: int) -> torch.Tensor:
    side = view.size or size
    return resize(frames, side, crop=True) if view.crop else resize(frames, (side, side))


@dataclass(kw_only=True)
class ViewDecoder:
    """Decodes a clip of a shard once, to the pictures of every view: tensors "view0", "view1", ... in the place of "frames"."""

    clip: ClipDecoder
    """Decoder of the clip, with frames as stored (its size None)."""
    views: tuple[FrameView, ...]
    """What encoders want to see."""
    seconds: float
    """Length of the views; the decoder's own may be a little longer, for the last latent."""
    size: int
    """Side of the pictures, in pixels, where a view leaves it open."""

    def __post_init__(self):
        if not self.views:
            self.clip = replace(self.clip, want=tuple(name for name in self.clip.want if name != "frames"))

    @property
    def members(self) -> tuple[str, ...]:
        """Extensions of the members it reads."""
        return self.clip.members

    def __call__(self, raw: Mapping[str, bytes], entry: Entry, random: Random) -> Sample:
        """The views, and what else the clip's decoder gives."""
        if not self.views:
            return self.clip(raw, entry, random)
        spans, media = self.clip.spans(entry, random), {}
        chunks = backend(self.clip.backend)(raw["mp4"], *spans["frames"])
        pictures = see_chunks(chunks, self.clip.fps, self.seconds, self.views, self.size)
        if "waveform" in self.clip.want:
            media["waveform"] = self.clip.sound(raw, spans)
        rest = self.clip.finish(media, entry)
        return {f"view{number}": seen for number, seen in enumerate(pictures)} | rest

    def whole(self, raw: Mapping[str, bytes], entry: Entry) -> dict[str, torch.Tensor]:
        """The clip for the cache, as stored."""
        return self.clip.whole(raw, entry)

    def crop(self, media: Mapping[str, torch.Tensor], entry: Entry, random: Random) -> Sample:
        """The views of a clip that was decoded before."""
        return self._viewed(self.clip.crop(media, entry, random))

    def _viewed(self, sample: Sample) -> Sample:
        frames = sample.pop("frames", None)
        for number, view in enumerate(self.views):
            sample[f"view{number}"] = see(frames, self.clip.fps, self.seconds, view, self.size)
        return sample


def views_of(batch: Mapping[str, Any], views: Sequence[FrameView], device: torch.device) -> Pictures:
    """Pictures in [0, 1] on the device, by view, from a batch that a ViewDecoder made."""
    return {view: batch[f"view{number}"].to(device).float() / 255 for number, view in enumerate(views)}


@dataclass(frozen=True, kw_only=True)
class ClipReader:
    """Reads a video file as the shards of a recipe were made, so that generation sees what training saw."""

    fps: float
    """Frames per second of the shards."""
    size: int
    """Side of the pictures, in pixels, where a view leaves it open."""
    short_side: int
    """Shorter side of the pictures in the shards."""

    def __call__(self, source: Source, views: Sequence[FrameView], start: float, seconds: float) -> tuple[Pictures, float]:
        """Pictures (T, C, H, W) uint8 of `seconds` from `start` on, and `seconds`: a video that ends earlier shows its last one on."""
        frames = read_video(source, self.fps, start, start + seconds, short_side=self.short_side)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return {view: see(frames, self.fps, seconds, view, self.size) for view in views}, seconds


@dataclass(frozen=True, kw_only=True)
class MMAudioReader:
    """Reads a video file as MMAudio's inference does: at each tick of a view's rate the first frame that is not earlier."""

    def __call__(self, source: Source, views: Sequence[FrameView], start: float, seconds: float) -> tuple[Pictures, float]:
        """Pictures (T, C, H, W) uint8 of `seconds` from `start` on, and how many seconds they are: an early end is the shortest view's."""
        taken: dict[FrameView, list[torch.Tensor]] = {view: [] for view in views}
        due = dict.fromkeys(views, start)
        with opened(source) as media:
            video = video_stream(media)
            video.thread_type = "AUTO"
            for time, frame in timed(media, video, start):
                if time > start + seconds:
                    break
                for view in views if time >= start else ():
                    while time >= due[view]:
                        taken[view].append(_painted(frame, view))
                        # Summed up, and not counted, because MMAudio does: its rounding decides between two frames now and then.
                        due[view] += 1 / view.fps
        seconds = min([seconds, *(len(pictures) / view.fps for view, pictures in taken.items())])
        if not all(int(view.fps * seconds) for view in views):
            raise ClipError("too_short", f"{name_of(source)}: hardly a picture from {start:g} s on")
        return {view: torch.stack(pictures[: int(view.fps * seconds)]) for view, pictures in taken.items()}, seconds


def _painted(frame: Any, view: FrameView) -> torch.Tensor:
    """A decoded frame upright, squashed or cropped as torchvision's transforms do it, to the pixel."""
    picture = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    picture = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    size = view.size
    if not view.crop:
        return resize(picture, (size, size))
    height, width = picture.shape[1:]
    picture = resize(picture, (int(size * height / min(height, width)), int(size * width / min(height, width))))
    top, left = (round((side - size) / 2) for side in picture.shape[1:])
    return picture[:, top : top + size, left : left + size]
