"""Held-out clips: which are evaluated and which watch the rounds, and that just those are read."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.decoding import TensorDecoder
from data_prep.index import ShardSet, build_index
from data_prep.shards import ShardWriter
from data_prep.sidecar import ShardError
from pipelines.features import npy
from pipelines.heldout import Shares, heldout_batches
from pipelines.recipes import load_recipe

SIZES = (3, 4, 5)
"""Held-out clips by shard."""


@given(st.integers(2, 400), st.integers(2, 200), st.just(0) | st.integers(2, 100))
def test_shares_never_overlap(count, evaluation, watch):
    shares = Shares.divide(count, evaluation, watch)
    assert shares.evaluation.start == 0 and 2 <= len(shares.evaluation) <= evaluation
    assert shares.evaluation.stop <= shares.watch.start and shares.watch.stop == count and len(shares.watch) <= watch
    if count >= evaluation + watch:
        assert (len(shares.evaluation), len(shares.watch)) == (evaluation, watch)


@pytest.mark.parametrize(("count", "shares"), [
    (300, (192, 64)), (256, (192, 64)), (230, (173, 57)), (192, (144, 48)), (8, (6, 2)), (4, (2, 2)), (3, (3, 0)), (2, (2, 0)),
])
def test_too_few_clips_are_shared(count, shares):
    found = Shares.divide(count, 192, 64)
    assert (len(found.evaluation), len(found.watch)) == shares


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe over shards of which two thirds are not held out."""
    folder, number = tmp_path_factory.mktemp("heldout"), 0
    for split, sizes in (("train", (2, 2)), ("heldout", SIZES)):
        for size in sizes:
            with ShardWriter(folder, number, split=split) as writer:
                for row in range(size):
                    writer.add(f"{split}_{number}_{row}", {"x.npy": npy(torch.tensor([number, row]))})
            number += 1
    build_index(folder, {})
    return load_recipe("demo", [f"data={folder}", "features.batch_size=2"])


@pytest.mark.parametrize("positions", [range(12), range(3), range(2, 6), range(3, 12), range(7, 12), range(11, 12), range(5, 6)], ids=str)
def test_just_these_clips_are_read(recipe, positions):
    batches = list(heldout_batches(recipe, TensorDecoder(("x",)), positions))
    places = [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)][positions.start:positions.stop]
    assert [place for batch in batches for place in zip(batch["shard"].tolist(), batch["row"].tolist(), strict=True)] == places
    assert [key for batch in batches for key in batch["key"]] == [f"heldout_{shard + 2}_{row}" for shard, row in places]
    assert np.array_equal(torch.cat([batch["x"] for batch in batches]), [(shard + 2, row) for shard, row in places])
    assert [position for batch in batches for position in batch["position"].tolist()] == list(positions)


def test_a_broken_clip_is_left_out_and_storage_that_fails_is_told(recipe, tmp_path):
    shutil.copytree(recipe.data, tmp_path / "shards")
    shards = ShardSet.open(tmp_path / "shards", split="heldout")
    copied = dataclasses.replace(recipe, data=str(tmp_path / "shards"))
    with open(tmp_path / "shards" / "shard-000003.tar", "r+b") as file:
        file.seek(shards.entry(1, 2).members["x.npy"].offset)
        file.write(b"broken")
    batches = heldout_batches(copied, TensorDecoder(("x",)), range(4, 9))
    assert [position for batch in batches for position in batch["position"].tolist()] == [4, 6, 7, 8]
    os.remove(tmp_path / "shards" / "shard-000003.tar")
    with pytest.raises(ShardError, match="shard-000003.tar: clip heldout_3_0 cannot be read: .*; nothing is measured without it"):
        list(heldout_batches(copied, TensorDecoder(("x",)), range(4, 9)))


def test_a_split_that_is_too_small_is_told(recipe):
    shares = Shares.of(recipe)
    assert shares == Shares(12, range(9), range(9, 12))
    assert shares.complaint(recipe) == (
        "split 'heldout' has 12 clips for evaluation.clips=176 and preference.watch.clips=64: 9 are evaluated and 3 others watch the "
        "preference rounds; hold out 240")
    assert Shares.divide(3, 192, 64).complaint(recipe).endswith(
        "too few to watch the preference rounds by, so the last round is kept; hold out at least 4")
    enough = load_recipe("demo", [f"data={recipe.data}", "evaluation.clips=8", "preference.watch.clips=4"])
    assert Shares.of(enough) == Shares(12, range(8), range(8, 12)) and not Shares.of(enough).complaint(enough)
    none = load_recipe("demo", [f"data={recipe.data}", "preference.rounds=0"])
    assert Shares.of(none) == Shares(12, range(12), range(12, 12)) and not Shares.of(none).complaint(none)
