"""Sections of a recipe on clips: how they are made, how they come out of the shards, how training reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pydantic

from data_prep.settings import PrepareConfig
from pipelines.config.fields import check, text


@dataclass(kw_only=True)
class ClipConfig:
    """How clips come out of the shards."""

    seconds: float = 8.0
    """Length of a clip in training and the window of generation."""
    fps: float = 25.0
    """Frame rate of the shards and of what the encoder sees."""
    size: int = 224
    """Side of the square pictures that the encoder sees, pixels."""
    sample_rate: int = 16000
    """Audio rate of the shards, Hz."""
    backend: Literal["pyav", "decord", "torchcodec"] = "pyav"
    """Decoder of the pictures; decord and torchcodec must be installed (extra `decoders`)."""

    def __post_init__(self):
        check(self.seconds > 0 and self.fps > 0, "seconds and fps must be above 0")


@dataclass(kw_only=True)
class PrepareSection:
    """How the shards of `data` are made: what `prep shards --recipe` and `launch slurm` read."""

    reader: Literal["", "vggsound", "vggss", "audioset", "panda70m", "folder", "rendered"] = ""
    """Reader that lists the clips; empty where the manifest is there already."""
    arguments: tuple[Annotated[str, pydantic.BeforeValidator(text)], ...] = ()
    """What follows `foleyscale prep manifest READER` on the command line, without --out."""
    manifest: str = "manifest.parquet"
    """The manifest: a path or an fsspec URL."""
    tasks: int = 1
    """Tasks that share the shards, each of them a job of an array."""
    workers: int = 2
    """Processes per task."""
    settings: PrepareConfig = field(default_factory=PrepareConfig)
    """Format, filters and limits."""

    def __post_init__(self):
        check(self.tasks > 0 and self.workers > 0, "tasks and workers must be above 0")


@dataclass(kw_only=True)
class StreamConfig:
    """How training reads the shards."""

    workers: int = 0
    """Decoding processes per rank; 0 decodes in the training process."""
    window: int = 16
    """Shards that are shuffled together: larger mixes further, smaller reads closer to sequentially."""
    cache_gb: float = 0.0
    """Memory for decoded clips per process: worth it when the whole set fits, as in the demo. Each worker keeps its own part."""
    disk_cache: str = ""
    """Local folder that keeps what is read from an object store, shared by all processes of a node; empty for none."""
    disk_cache_gb: float = 100.0
    """Size that the folder never exceeds. Full, it drops other data sets; what it has of this one stays."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the clips cannot be read."""
    clip_timeout: float = 60.0
    """Seconds a clip may decode in a worker before the worker is killed and the clip quarantined; without workers nothing can watch."""
    allow_data_change: bool = False
    """Resume although the shards or the order's settings are not those of the checkpoint: clips may come twice, or not at all."""

    def __post_init__(self):
        check(self.workers >= 0 and self.window > 0, "workers must be 0 or more, window 1 or more")
        check(self.cache_gb >= 0 and self.disk_cache_gb > 0, "cache_gb must be 0 or more, disk_cache_gb above 0")
        check("://" not in self.disk_cache, "disk_cache must be a local folder, not a URL")
        check(0 <= self.max_bad_share <= 1 and self.clip_timeout > 0, "max_bad_share must be a share from 0 to 1, clip_timeout above 0")
