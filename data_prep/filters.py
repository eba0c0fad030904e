"""Which clips to keep: each rule has a name, which is the reason the sidecar gives for a clip that was dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DROPPED = {
    "no_audio": "the file has no audio stream",
    "too_short": "less than ClipFormat.min_seconds is left of it",
    "silent": "its root mean square level is below FilterConfig.min_loudness",
    "mostly_silent": "more than FilterConfig.max_silence of it is silence",
    "still": "its picture moves less than FilterConfig.min_motion",
    "small": "its picture is smaller than FilterConfig.min_side",
    "slow": "it has fewer pictures a second than FilterConfig.min_fps",
    "out_of_step": "the sound and picture of its source begin more than FilterConfig.max_offset apart",
    "near_duplicate": "it is more similar to another clip of its source than FilterConfig.max_similarity",
}
"""Reasons that speak of the content; any other reason means that the clip could not be made."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Bounds of the rules. Public collections hold silent, still and mute clips; what to drop is the project's own choice.

    The sidecar holds what the rules judge by for dropped clips as for kept ones, so bounds can be tried without a new pass.
    """

    min_loudness: float = -60.0
    """dBFS, root mean square over the clip."""
    max_silence: float = 0.9
    """Share of 50 ms stretches below ClipFormat.silence_dbfs; 1 keeps all."""
    min_motion: float = 0.0002
    """Mean change of brightness from frame to frame, of 1; 0 keeps all. Still photographs have less than 0.0001 after H.264 and VP9,
    a real clip of a camera at rest 0.003 at 256 pixels and 0.0003 at 32."""
    min_side: int = 0
    """Pixels of the shorter side of the source; 0 keeps all."""
    min_fps: float = 0.0
    """Pictures per second of the source; 0 keeps all."""
    max_offset: float | None = 1.0
    """Seconds between the beginnings of the source's sound and picture; None keeps all. Clips are cut by both streams' timestamps,
    so an offset does no harm by itself; one this large tells of a file whose timestamps are broken."""
    max_similarity: float | None = None
    """Share of equal bits of the fingerprints of two clips of one source, of 1; None keeps all. `prep subset` judges it, because
    the clips of a source lie in many shards. Different clips have about 0.5, copies of one more than 0.85."""

    def __post_init__(self):
        if not 0 <= self.max_silence <= 1:
            raise ValueError(f"FilterConfig.max_silence is {self.max_silence}: choose a share from 0 to 1")
        if self.min_loudness > 0:
            raise ValueError(f"FilterConfig.min_loudness is {self.min_loudness} dBFS: full scale is 0, choose a value below")
        if self.max_similarity is not None and not 0.5 <= self.max_similarity <= 1:
            raise ValueError(f"FilterConfig.max_similarity is {self.max_similarity}: choose 0.5 to 1, half of all bits agree by chance")
        for name in ("min_motion", "min_side", "min_fps", "max_offset"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"FilterConfig.{name} is {getattr(self, name)}: it must not be negative")


def verdict(stats: Mapping[str, Any], config: FilterConfig) -> str | None:
    """The first rule that a clip breaks by itself, None to keep it; `stats` are the measurements of `media.EncodedClip.columns`."""
    if stats["loudness"] < config.min_loudness:
        return "silent"
    if stats["silence"] > config.max_silence:
        return "mostly_silent"
    if stats["motion"] < config.min_motion:
        return "still"
    if stats["source_side"] < config.min_side:
        return "small"
    if stats["source_fps"] < config.min_fps:
        return "slow"
    if config.max_offset is not None and abs(stats["av_offset"]) > config.max_offset:
        return "out_of_step"
    return None
