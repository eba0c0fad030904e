from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import plan as plan_module
from data_prep.digests import keys_digest
from data_prep.manifest import Manifest, ManifestRow, write_manifest
from data_prep.plan import ShardPlan, Survey, plan_shards, rows_of, walks


def survey_of(splits, tmp_path):
    rows = (ManifestRow(key=f"k{i}", dataset="d", source="s", split=split, start=1.0, end=3.0 + i % 2) for i, split in enumerate(splits))
    write_manifest(rows, tmp_path / "m.parquet")
    with Manifest(tmp_path / "m.parquet") as manifest:
        return Survey.of(manifest), manifest.hash()


def test_survey_of_a_manifest(tmp_path):
    survey, contents = survey_of(["train", "test", "train", "train"], tmp_path)
    assert (survey.rows, survey.hash, survey.splits, survey.mean_seconds) == (4, contents, ["test", "train"], 2.5)
    assert survey.keys == keys_digest(["k3", "k0", "k1", "k2"])
    assert survey.counts == {"test": 1, "train": 3}
    assert survey.numbers("train", np.array([2, 0])).tolist() == [3, 0]


def test_too_many_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="more than 256 splits"):
        survey_of([f"s{i}" for i in range(300)], tmp_path)


SPLITS = st.lists(st.sampled_from(["train", "test", "other"]), min_size=1, max_size=80)


@given(SPLITS, st.integers(1, 20), st.integers(0, 3), st.integers(1, 9))
def test_every_row_is_dealt_once_to_a_shard_of_its_split(splits, rows_per_shard, seed, block):
    names = sorted(set(splits))
    codes = np.array([names.index(split) for split in splits], np.uint8)
    survey = Survey("", "", None, names, codes)
    usual, plan_module._BLOCK = plan_module._BLOCK, block
    try:
        plans = plan_shards(survey.counts, rows_per_shard)
        dealt = [rows_of(plan, survey, seed).tolist() for plan in plans]
    finally:
        plan_module._BLOCK = usual
    assert sorted(row for rows in dealt for row in rows) == list(range(len(splits)))
    assert [plan.number for plan in plans] == list(range(len(plans)))
    for plan, rows in zip(plans, dealt, strict=True):
        assert {splits[row] for row in rows} == {plan.split} and len(rows) == len(plan) <= rows_per_shard
        sizes = [len(other) for other in plans if other.split == plan.split]
        assert max(sizes) - min(sizes) <= 1


def test_neighbours_are_scattered_and_seeds_differ():
    survey = Survey("", "", None, ["train"], np.zeros(1000, np.uint8))
    first, second = (rows_of(ShardPlan(0, "train", 0, 100), survey, seed) for seed in (0, 1))
    assert first[:50].tolist() == rows_of(ShardPlan(0, "train", 0, 50), survey, 0).tolist()
    assert first.min() < 50 and first.max() > 950 and len(set(first.tolist()) & set(second.tolist())) < 30
    assert abs(np.corrcoef(first, np.arange(100))[0, 1]) < 0.3


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 30))
def test_walks_keep_the_order_and_the_limit(sizes, rows):
    plans = [ShardPlan(number, "train", 0, size) for number, size in enumerate(sizes)]
    groups = list(walks(plans, rows))
    assert [plan for group in groups for plan in group] == plans
    for group in groups:
        assert len(group) == 1 or sum(map(len, group)) <= rows
    for group, following in pairwise(groups):
        assert sum(map(len, group)) + len(following[0]) > rows
