"""The encoder that scores sounds: this run's own, or another one, with what it sees in the videos computed once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from data_prep.audio import MEL_SPECS
from data_prep.index import ShardSet
from data_prep.shards import ShardWriter
from data_prep.stream import Batch
from models.encoders.rewards import Reward, load_reward
from pipelines.config import Recipe
from pipelines.encoding import frozen, reward_view, view_decoder
from pipelines.engine.checkpoint import weights_hash
from pipelines.engine.world import World
from pipelines.features import npy, training_videos
from pipelines.provenance import claim, known_provenance
from pipelines.recipes import RecipeError
from pipelines.sharing import Work, make_shards
from pipelines.views import views_of


def scoring_export(recipe: Recipe) -> Path:
    """Folder of the encoder that scores: `preference.reward`, or this run's own."""
    return Path(recipe.preference.reward) if recipe.preference.reward else recipe.folder / "contrastive" / "export"


def load_scorer(recipe: Recipe, device: torch.device) -> Reward:
    """The encoder that scores, frozen; RecipeError where there is none, or one of another sample rate or picture size than the clips."""
    folder, clip = scoring_export(recipe), recipe.clip
    try:
        reward = load_reward(folder)
    except (ValueError, OSError, SafetensorError) as error:
        raise RecipeError(f"preference.reward: no encoder in {folder} (empty takes this run's own): {error}") from None
    heard, seen = MEL_SPECS[reward.config.mel].sample_rate, _trained_size(folder)
    if heard != clip.sample_rate:
        raise RecipeError(f"preference.reward: the encoder in {folder} hears {heard} Hz and clip.sample_rate is {clip.sample_rate}: "
                          "name one of that rate; contrastive.model.mel=sf_cavp_44k trains one for 44100 Hz, sf_cavp for 16000")
    if seen not in (None, clip.size):
        raise RecipeError(f"preference.reward: the encoder in {folder} was trained with clip.size={seen} and clip.size is {clip.size}: "
                          "its scores would mean little; name one of that size")
    return frozen(reward, device)


def _trained_size(folder: Path) -> int | None:
    """Side of the pictures that an exported encoder learned from, as its run's recipe tells; None where that is not beside it."""
    path = folder.resolve().parent.parent / "recipe.yaml"
    return yaml.safe_load(path.read_text()).get("clip", {}).get("size") if path.is_file() else None


def extract_reward(recipe: Recipe, world: World) -> str:
    """Write the segment embeddings (S, D), `reward.npy`, that `preference.reward` sees in the training videos; the shards' folder.

    Shards have the keys and numbers of the clip shards, and are made once for all rounds. Resumable by shard. Collective.
    """
    folder = recipe.folder / "preference" / "reward"
    source = training_videos(recipe)
    claim(folder, partial(_provenance, recipe, source), world, "delete that folder, or restore the encoder that preference.reward names")
    start = partial(_work, recipe, world.device)
    make_shards(source, folder, world, "videos as the reward sees them", known_provenance(folder), start)
    return str(folder)


def _provenance(recipe: Recipe, source: ShardSet) -> dict[str, Any]:
    clip, encoder = recipe.clip, weights_hash(scoring_export(recipe))
    return {"data": source.hash, "preference.reward": encoder, "seconds": clip.seconds, "size": clip.size, "fps": clip.fps}


def _work(recipe: Recipe, device: torch.device) -> Work:
    reward, options = load_scorer(recipe, device), recipe.features
    view = reward_view(reward)

    @torch.no_grad()
    def write(writer: ShardWriter, batches: Iterator[Batch]) -> None:
        for batch in batches:
            segments = reward.encode_video(views_of(batch, (view,), device)[view]).segments
            for key, values in zip(batch["key"], segments, strict=True):
                writer.add(key, {"reward.npy": npy(values)})

    return Work(view_decoder(recipe, (view,), ("frames",)), options.batch_size, write, **options.decoding)
