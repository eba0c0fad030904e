"""Latents and conditions for training: from feature shards, or made on the way from clip shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from data_prep.decoding import TensorDecoder
from data_prep.index import ShardSet
from pipelines.config import Recipe
from pipelines.encoding import ClipEncoder
from pipelines.stages.data import good_clips

LATENTS = ("latent_mean", "latent_std")


class StoredFeatures:
    """Features that were computed beforehand."""

    def __init__(self, recipe: Recipe, url: str):
        self.recipe, self.url = recipe, url
        # Tensors are read in no time, and no decoder can hang over them.
        self.reading = dataclasses.replace(recipe.features, workers=0)

    def shards(self, split: str) -> ShardSet:
        """Where they lie."""
        return ShardSet.open(self.url, split=split)

    def decoder(self, names: Sequence[str]) -> TensorDecoder:
        """Decoder of the shards for what `tensors` is to give."""
        return TensorDecoder(tuple(names))

    def tensors(self, batch: dict[str, Any], names: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
        """The named features of a batch of the decoder."""
        return {name: batch[name].to(device) for name in names}


class LiveFeatures:
    """The same features of clips, made when they are needed."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.reading = recipe, recipe.features
        self._encoder: ClipEncoder | None = None

    def shards(self, split: str) -> ShardSet:
        """The clips."""
        return ShardSet.open(self.recipe.data, split=split)

    def decoder(self, names: Sequence[str]):
        """Decoder of the clips for what `tensors` is to give: pictures only where there are conditions among the names."""
        return self._encoders().decoder(("waveform",) if set(names) <= set(LATENTS) else ("frames", "waveform"))

    def tensors(self, batch: dict[str, Any], names: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
        """The named features of a batch of the decoder."""
        encoder = self._encoders()
        found = encoder.latents(batch) if set(names) <= set(LATENTS) else encoder(batch)
        encoder.forget_captions()
        return {name: found[name].to(device) for name in names}

    def _encoders(self) -> ClipEncoder:
        """The run's encoders, loaded once, on this process's GPU where there is one."""
        if self._encoder is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
            self._encoder = ClipEncoder.of_run(self.recipe, self.recipe.folder, device, reward=False)
        return self._encoder


Features = StoredFeatures | LiveFeatures


def features_of(recipe: Recipe, url: str) -> Features:
    """As the recipe decides: those of the feature shards at `url`, or those of its clips."""
    return StoredFeatures(recipe, url) if recipe.conditioning.precompute else LiveFeatures(recipe)


def first_features(features: Features, split: str, names: Sequence[str], limit: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The named features of the first `limit` clips of a split, on the CPU."""
    batches = list(_pass(features, split, names, limit, device))
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


def _pass(features: Features, split: str, names: Sequence[str], limit: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    for batch in good_clips(features.shards(split), features.decoder(names), features.reading, limit):
        yield {name: values.cpu().float() for name, values in features.tensors(batch, names, device).items()}
