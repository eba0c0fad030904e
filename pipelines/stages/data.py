"""Shards as the stages read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.decoding import ClipDecoder
from data_prep.index import ShardSet
from data_prep.stream import ClipStream, one_pass
from pipelines.config import Recipe, TrainConfig
from pipelines.engine.world import World


def clip_decoder(recipe: Recipe, seconds: float, random_crop: bool, want: tuple[str, ...] = ("frames", "waveform")) -> ClipDecoder:
    """Decoder of `seconds` of a clip in the recipe's format."""
    clip = recipe.clip
    return ClipDecoder(seconds=seconds, fps=clip.fps, sample_rate=clip.sample_rate, size=clip.size, random_crop=random_crop, want=want,
                       backend=clip.backend)


def training_stream(shards: ShardSet, decode, train: TrainConfig, seed: int, world: World, quarantine: Path) -> ClipStream:
    """Endless shuffled stream of this rank's slice of every global batch."""
    options = train.stream
    if options.disk_cache:
        shards = shards.cached(options.disk_cache, round(options.disk_cache_gb * 2**30))
    return ClipStream(shards, decode, batch_size=train.batch_size, rank=world.rank, world_size=world.size, seed=seed, window=options.window,
                      max_bad_share=options.max_bad_share, quarantine=str(quarantine), clip_timeout=options.clip_timeout,
                      cache_gb=options.cache_gb)


def clips(recipe: Recipe, split: str, batch_size: int, limit: int | None, want: tuple[str, ...] = ("frames", "waveform")) -> Iterator[dict]:
    """Whole clips of a split, once, in the order of the shards, without the unreadable ones: training quarantines and counts those."""
    decode = clip_decoder(recipe, recipe.clip.seconds, random_crop=False, want=want)
    return one_pass(ShardSet.open(recipe.data, split=split), decode, batch_size, limit=limit, on_bad=lambda clip: None)
