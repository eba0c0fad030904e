"""From a clip's bytes to tensors: cropping in time, fixed shapes, stored features, and a cache of decoded clips.

A decoder is a callable `(raw, entry, random) -> {name: tensor}` with `members`, the extensions it reads; `random()` makes the
generator of the clip's position, which costs more than to read a small clip, so only those who draw from it ask. One that also has
`whole(raw, entry) -> media` and `crop(media, entry, random)`, together equal to the call to the last bit, can be cached.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.frames import resize
from data_prep.index import Entry, ShardError
from data_prep.media import ClipError, decode_audio
from data_prep.streaming.backends import backend

Sample = dict[str, Any]
Random = Callable[[], np.random.Generator]
Spans = dict[str, tuple[int, int | None]]
_PCM_SCALE = 32768


@dataclass(kw_only=True)
class ClipDecoder:
    """Decodes a clip shard's members to "frames" (T, C, H, W) uint8 and "waveform" (N,) float32 in [-1, 1].

    Crops start on a video frame f and on the audio sample round(f / fps * sample_rate), so the two stay together.
    """

    seconds: float | None = None
    """Length of the crop; shorter clips are filled with their last frame and with silence. None: whole clips, as long as they are."""
    fps: float = 25.0
    """Frames per second the shards were made with."""
    sample_rate: int = 16000
    """Samples per second the shards were made with."""
    size: int | None = None
    """Side of square frames, in pixels: the shorter side is resized to it and the centre kept. None: frames as stored."""
    random_crop: bool = False
    """Crop anywhere in the clip, by the random generator of the position. False: at the start."""
    want: tuple[str, ...] = ("frames", "waveform")
    """What to decode; the member behind what is left out is not read."""
    columns: tuple[str, ...] = ()
    """Columns of the sidecar to hand on, such as "caption" and "labels"."""
    backend: str = "pyav"
    """Decoder of the pictures: "pyav", or "decord" or "torchcodec" where installed; all give the same frames."""

    def __post_init__(self) -> None:
        backend(self.backend)  # a missing package is told now and not clip by clip
        if self.seconds is not None and round(self.seconds * self.fps) < 1:
            raise ValueError(f"seconds is {self.seconds}: shorter than one frame at {self.fps} fps; take more, or None for whole clips")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}: frames need at least one pixel; None keeps them as stored")
        if not self.want or set(self.want) - {"frames", "waveform"}:
            raise ValueError(f"want is {self.want}: name 'frames', 'waveform' or both")
        self.want, self.columns = tuple(self.want), tuple(self.columns)

    @property
    def members(self) -> tuple[str, ...]:
        """Extensions of the members it reads."""
        return tuple({"frames": "mp4", "waveform": "flac"}[name] for name in self.want)

    def __call__(self, raw: Mapping[str, bytes], entry: Entry, random: Random) -> Sample:
        """Decode the crop alone, from the key frame before it."""
        spans, media = self.spans(entry, random), {}
        if "frames" in self.want:
            media["frames"] = self._video(raw["mp4"], *spans["frames"])
        if "waveform" in self.want:
            media["waveform"] = self.sound(raw, spans)
        return self.finish(media, entry)

    def sound(self, raw: Mapping[str, bytes], spans: Spans) -> torch.Tensor:
        """The samples of the crop."""
        return torch.from_numpy(decode_audio(raw["flac"], *spans["waveform"]))

    def whole(self, raw: Mapping[str, bytes], entry: Entry) -> dict[str, torch.Tensor]:
        """Decode the clip for the cache: frames in their final size, audio as 16-bit samples where that loses nothing."""
        media = {}
        if "frames" in self.want:
            media["frames"] = self._video(raw["mp4"], 0, None)
        if "waveform" in self.want:
            media["waveform"] = _packed(torch.from_numpy(decode_audio(raw["flac"])))
        return media

    def crop(self, media: Mapping[str, torch.Tensor], entry: Entry, random: Random) -> Sample:
        """The crop that a call would decode, out of the decoded clip."""
        spans, cut = self.spans(entry, random), {}
        for name, whole in media.items():
            start, count = spans[name]
            if len(whole) < start + (count or 1):
                raise ClipError("too_short", f"clip {entry.key} of {entry.shard}: {name} end after {len(whole)}, before the sidecar says")
            cut[name] = _unpacked(whole[start:][:count])
        return self.finish(cut, entry)

    def spans(self, entry: Entry, random: Random) -> Spans:
        """First index and number to decode of frames and of samples; None for as many as there are."""
        rates = {"fps": self.fps, "sample_rate": self.sample_rate}
        for name, ours in rates.items():
            if (stored := entry.columns.get(name)) is not None and abs(stored - ours) > 1e-3:
                # Not a fault of this clip: all of them would go to the quarantine one by one.
                raise RuntimeError(f"clip {entry.key} of {entry.shard} has {name} {stored:g}, the decoder expects {ours:g}; set its {name}")
        if self.seconds is None:
            return {"frames": (0, None), "waveform": (0, None)}
        if (duration := entry.columns.get("duration")) is None:
            raise RuntimeError(f"clip {entry.key} of {entry.shard} has no duration in its sidecar, so no crop; set seconds to None")
        frames, wanted = round(duration * self.fps), round(self.seconds * self.fps)
        start = int(random().integers(max(0, frames - wanted) + 1)) if self.random_crop else 0
        first, samples = round(start / self.fps * self.sample_rate), round(duration * self.sample_rate)
        count = min(round(self.seconds * self.sample_rate), samples - first)
        return {"frames": (start, min(wanted, frames - start)), "waveform": (first, count)}

    def _video(self, mp4: bytes, start: int, count: int | None) -> torch.Tensor:
        return torch.cat([self._sized(chunk) for chunk in backend(self.backend)(mp4, start, count)])

    def _sized(self, chunk: np.ndarray) -> torch.Tensor:
        frames = torch.from_numpy(chunk).permute(0, 3, 1, 2)
        return (frames if self.size is None else resize(frames, self.size, crop=True)).contiguous()

    def finish(self, media: dict[str, torch.Tensor], entry: Entry) -> Sample:
        """Media of the crop filled to its length, and the columns to hand on."""
        if self.seconds is not None and "frames" in media:
            media["frames"] = _filled(media["frames"], round(self.seconds * self.fps), media["frames"][-1:])
        if self.seconds is not None and "waveform" in media:
            media["waveform"] = _filled(media["waveform"], round(self.seconds * self.sample_rate), torch.zeros(1))
        return {**media, **{name: entry.columns.get(name) for name in self.columns}}


@dataclass
class TensorDecoder:
    """Reads stored features: `<name>.npy` becomes the tensor `name`, float32 where it is a fraction of any width."""

    names: tuple[str, ...]
    """Features to read, without ".npy"."""
    columns: tuple[str, ...] = ()
    """Columns of the sidecar to hand on."""

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not self.names:
            raise ValueError(f"names is {self.names!r}: give a list of features, such as ['latent_mean']")
        self.names, self.columns = tuple(self.names), tuple(self.columns)

    @property
    def members(self) -> tuple[str, ...]:
        """Extensions of the members it reads."""
        return tuple(f"{name}.npy" for name in self.names)

    def __call__(self, raw: Mapping[str, bytes], entry: Entry, random: Random) -> Sample:
        """Load the arrays; nothing is left to chance."""
        return self.crop(self.whole(raw, entry), entry, random)

    def whole(self, raw: Mapping[str, bytes], entry: Entry) -> dict[str, torch.Tensor]:
        """The arrays as stored."""
        return {name: torch.from_numpy(self._load(raw[f"{name}.npy"], name, entry)) for name in self.names}

    def crop(self, media: Mapping[str, torch.Tensor], entry: Entry, random: Random) -> Sample:
        """The arrays as tensors to compute with."""
        tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in media.items()}
        return {**tensors, **{name: entry.columns.get(name) for name in self.columns}}

    def _load(self, data: bytes, name: str, entry: Entry) -> np.ndarray:
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            message = f"clip {entry.key} of {entry.shard}: {name}.npy is not an array ({error})"
            raise ShardError(message, entry.shard, entry.key, "bad_array") from None


class DecodedCache:
    """Decoded clips up to a number of bytes, for one process. What came first stays.

    Every epoch visits each clip once in a new order, so the least recently used clip is as likely to come next as any other:
    throwing clips out would only cost decoding.
    """

    def __init__(self, limit: float):
        self._media: dict[Hashable, dict[str, torch.Tensor]] = {}
        self._left = limit
        self.full = limit <= 0

    def get(self, key: Hashable) -> dict[str, torch.Tensor] | None:
        """The decoded clip, or None."""
        return self._media.get(key)

    def add(self, key: Hashable, media: dict[str, torch.Tensor]) -> None:
        """Keep a decoded clip if it still fits."""
        size = sum(tensor.nbytes for tensor in media.values())
        self.full = self.full or size > self._left
        if not self.full:
            self._media[key] = media
            self._left -= size


def _filled(values: torch.Tensor, length: int, filler: torch.Tensor) -> torch.Tensor:
    missing = length - len(values)
    return torch.cat([values, filler.expand(missing, *filler.shape[1:])]) if missing > 0 else values


def _packed(waveform: torch.Tensor) -> torch.Tensor:
    samples = (waveform * _PCM_SCALE).round().clamp(-_PCM_SCALE, _PCM_SCALE - 1).to(torch.int16)
    return samples if torch.equal(_unpacked(samples), waveform) else waveform


def _unpacked(waveform: torch.Tensor) -> torch.Tensor:
    return waveform.float() / _PCM_SCALE if waveform.dtype == torch.int16 else waveform
