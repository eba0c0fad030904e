"""What validation reads: damaged clips are told, and storage that fails does not make the measurement another one."""

import logging
import os
import shutil

import pytest
import torch

from data_prep.index import ShardSet, build_index
from data_prep.shards import ShardWriter
from data_prep.sidecar import ShardError
from pipelines.config import FeaturesConfig
from pipelines.features import npy
from pipelines.recipes import load_recipe
from pipelines.stages.data import clips, good_clips
from pipelines.stages.inputs import StoredFeatures, first_features
from tests.fixtures.made_shards import DECODE, damage, values, write
from tests.fixtures.tiny_chain import tiny_shards

FIVES = FeaturesConfig(batch_size=5)


def test_a_broken_clip_is_left_out_and_told_in_a_line(tmp_path, caplog):
    broken = damage(write(tmp_path / "set"), 3, 5, tmp_path / "copy")
    with caplog.at_level(logging.WARNING):
        assert values(good_clips(broken, DECODE, FIVES, 30)) == [number for number in range(30) if number != 18]
    assert len(caplog.messages) == 1
    assert "copy: 1 of 30 clips are broken and left out; the first: " in caplog.text and "clip clip-18 has a damaged value" in caplog.text
    caplog.clear()
    assert values(good_clips(broken, DECODE, FIVES, 18)) == list(range(18))
    assert len(list(good_clips(broken, DECODE, FeaturesConfig(batch_size=48, workers=2), None))) == 1
    assert ["1 of 48 clips" in message for message in caplog.messages] == [True]


def test_storage_that_fails_is_no_smaller_measurement(tmp_path):
    shards = write(tmp_path / "set")
    os.remove(tmp_path / "set" / "shard-000003.tar")
    with pytest.raises(ShardError, match="shard-000003.tar: clip clip-13 cannot be read: .*; nothing is measured without it"):
        list(good_clips(ShardSet.open(shards.url), DECODE, FIVES, None))


def test_features_and_clips_of_a_validation_are_read_so(tmp_path, caplog):
    with ShardWriter(tmp_path / "features", 0, split="heldout") as writer:
        for row in range(6):
            writer.add(f"clip-{row}", {"x.npy": npy(torch.tensor([row])) if row != 2 else b"junk"})
    build_index(tmp_path / "features", {})
    url = tiny_shards(tmp_path, clips=2, heldout=2)
    recipe = load_recipe("demo", [f"data={url}", "features.batch_size=2"])
    with caplog.at_level(logging.WARNING):
        found = first_features(StoredFeatures(recipe, str(tmp_path / "features")), "heldout", ("x",), 5, torch.device("cpu"))
        assert found["x"].flatten().tolist() == [0, 1, 3, 4] and "1 of 5 clips are broken" in caplog.text
        heldout = ShardSet.open(url, split="heldout")
        count, flac = len(heldout), heldout.entry(0, 0).members["flac"]
        with open(f"{url}/{heldout.shards[0].name}.tar", "r+b") as file:
            file.seek(flac.offset + 50)
            file.write(b"broken")
        assert sum(len(batch["key"]) for batch in clips(recipe, "heldout", None, want=("waveform",))) == count - 1
    assert f"1 of {count} clips are broken" in caplog.messages[-1]
    shutil.move(f"{url}/{heldout.shards[0].name}.tar", tmp_path / "aside")
    with pytest.raises(ShardError, match="nothing is measured without it"):
        list(clips(recipe, "heldout", None, want=("waveform",)))
