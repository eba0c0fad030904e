"""How a manifest becomes shards: every setting of the preparation."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_prep.downloads.download import DownloadConfig
from data_prep.filters import FilterConfig
from data_prep.transcoding.encode import ClipFormat


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a manifest becomes shards."""

    format: ClipFormat = field(default_factory=ClipFormat)
    """Pictures and sound."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which clips are kept."""
    rows_per_shard: int | None = None
    """Manifest rows per shard; by default as many as should fill `shard_mb`."""
    shard_mb: int = 256
    """Design size of a shard, MB."""
    seed: int = 0
    """Seed of the global shuffle: clips of one source must not stay neighbours."""
    clip_timeout: float = 120.0
    """Seconds after which a clip's decoder is killed; that clip fails, the shard goes on. May change from run to run."""
    clip_memory_mb: int = 4096
    """MB that one clip may take in its worker process; one that takes more fails. May change from run to run."""
    media_root: str = ""
    """Path or URL that relative sources lie below. May change from run to run."""
    download: DownloadConfig | None = None
    """How sources at http(s) addresses are fetched; None reads them in place. May change from run to run."""

    def __post_init__(self):
        if self.rows_per_shard is not None and self.rows_per_shard < 1:
            raise ValueError(f"PrepareConfig.rows_per_shard is {self.rows_per_shard}: choose 1 or more, or None")
        if self.shard_mb < 1 or not self.clip_timeout > 0:
            raise ValueError(f"PrepareConfig.shard_mb, clip_timeout are {self.shard_mb}, {self.clip_timeout}: both must be positive")
        if self.clip_memory_mb < 128:
            raise ValueError(f"PrepareConfig.clip_memory_mb is {self.clip_memory_mb}: decoders of ordinary clips need 128 or more")
