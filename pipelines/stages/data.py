"""Shards as the stages read them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from data_prep.decoding import ClipDecoder
from data_prep.index import ShardSet
from data_prep.stream import BadClip, Batch, ClipStream, one_pass
from data_prep.streaming.reading import Decode
from pipelines.config import FeaturesConfig, Recipe, TrainConfig
from pipelines.engine.watchdog import beat
from pipelines.engine.world import World
from pipelines.heldout import leave_broken

_log = logging.getLogger(__name__)


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
                      cache_gb=options.cache_gb, total=world.total if world.size > 1 else None)


def clips(recipe: Recipe, split: str, limit: int | None, want: tuple[str, ...] = ("frames", "waveform")) -> Iterator[dict]:
    """Whole clips of a split, once, in the order of the shards, without the broken ones: see `good_clips`."""
    decode = clip_decoder(recipe, recipe.clip.seconds, random_crop=False, want=want)
    return good_clips(ShardSet.open(recipe.data, split=split), decode, recipe.features, limit)


def good_clips(shards: ShardSet, decode: Decode, options: FeaturesConfig, limit: int | None) -> Iterator[Batch]:
    """One pass over the first `limit` clips; broken ones are left out, and a line of the log says how many.

    ShardError where storage did not give a clip: a measurement over fewer clips cannot be compared with those before it.
    """
    bad: list[BadClip] = []

    def leave_out(clip: BadClip) -> None:
        leave_broken(clip)
        bad.append(clip)

    for batch in one_pass(shards, decode, options.batch_size, limit=limit, on_bad=leave_out, **options.decoding):
        beat()
        yield batch
    if bad:
        _log.warning("%s: %d of %d clips are broken and left out; the first: %s",
                     shards.url, len(bad), min(len(shards), limit or len(shards)), bad[0].message)
