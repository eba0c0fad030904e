"""A folder of shards knows what it was made from, and takes nothing else."""

import json

import pytest
import torch

from data_prep.shards import ShardWriter
from pipelines.engine.world import World
from pipelines.provenance import ProvenanceError, claim, known_provenance

ALONE = World(0, 1, torch.device("cpu"))
SETTINGS = {"model": "a", "steps": 25, "kinds": ("shift", "warp")}


def claimed(folder, **changes):
    claim(folder, lambda: SETTINGS | changes, ALONE, "delete that folder")


def test_the_first_claim_is_written_and_the_same_one_passes(tmp_path):
    claimed(tmp_path / "made")
    known = known_provenance(tmp_path / "made")
    assert known == {"model": "a", "steps": 25, "kinds": ["shift", "warp"]}
    claimed(tmp_path / "made")
    assert known_provenance(tmp_path / "made") == known and known_provenance(tmp_path / "other") == {}


def test_what_differs_is_named_and_nothing_is_written(tmp_path):
    claimed(tmp_path)
    before = (tmp_path / "provenance.json").read_bytes()
    with pytest.raises(ProvenanceError, match=rf"^{tmp_path} was made with another model, steps: delete that folder$"):
        claimed(tmp_path, model="b", steps=4)
    assert (tmp_path / "provenance.json").read_bytes() == before


def test_a_linked_folder_is_named_by_its_own_place(tmp_path):
    claimed(tmp_path / "shared")
    (tmp_path / "link").symlink_to("shared")
    with pytest.raises(ProvenanceError, match=rf"^{tmp_path}/shared was made with another model: "):
        claimed(tmp_path / "link", model="b")


def test_a_setting_that_was_not_known_then_differs_and_one_too_many_does_not(tmp_path):
    (tmp_path / "provenance.json").write_text(json.dumps({"model": "a", "kinds": ["shift", "warp"], "older": 1}))
    with pytest.raises(ProvenanceError, match="made with another steps: "):
        claimed(tmp_path)
    claim(tmp_path, lambda: {"model": "a"}, ALONE, "")


def test_shards_of_unknown_origin_are_refused(tmp_path):
    with ShardWriter(tmp_path, 3) as writer:
        writer.add("clip", {"a.npy": b"x"})
    with pytest.raises(ProvenanceError, match="holds shards and no provenance.json, so nobody knows what made them: delete that folder"):
        claimed(tmp_path)
    assert not (tmp_path / "provenance.json").exists()
