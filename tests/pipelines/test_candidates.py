"""Candidates of a round: who wins and who loses, seeds that bring any of them back, and shards that do not depend on how they were made."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.index import ShardSet, build_index
from data_prep.shards import ShardWriter
from data_prep.sidecar import read_sidecar
from data_prep.storage import Folder
from data_prep.stream import one_pass
from models.conditioning import Conditions
from models.objectives.flow_dpo import segment_score
from pipelines.candidates import Choice, _Maker, choose, make_candidates, seeds_of
from pipelines.engine.world import World
from pipelines.features import npy
from pipelines.provenance import ProvenanceError
from pipelines.recipes import RecipeError, load_recipe
from pipelines.sounding import SoundModel
from tests.fixtures.tiny_chain import REPOSITORY, overrides
from tests.fixtures.two_ranks import run_on_two_ranks

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
SCORES = st.lists(st.one_of(st.floats(-1, 1, width=32), st.just(float("nan")), st.just(float("-inf"))), min_size=1, max_size=6)


@given(SCORES, st.sampled_from(["truth", "best_of_n"]))
def test_the_lowest_finite_score_loses(scores, winner):
    found, finite = choose(np.array(scores), winner), [score for score in scores if np.isfinite(score)]
    if not finite:
        assert found.reason == "not_finite"
    elif winner == "best_of_n" and min(finite) == max(finite):
        assert found.reason == "no_preference"
    else:
        assert found == Choice(scores.index(min(finite)), "truth" if winner == "truth" else scores.index(max(finite)))


def test_the_first_of_equal_scores_is_taken():
    assert choose(np.array([0.5, 0.1, 0.1, 0.5]), "best_of_n") == Choice(1, 0)
    assert choose(np.array([0.5, 0.5]), "truth") == Choice(0)


def test_seeds_depend_on_run_round_and_key_alone():
    assert seeds_of(0, 1, "clip-1", 5)[:2] == seeds_of(0, 1, "clip-1", 2)
    others = [seeds_of(*place, 5) for place in ((0, 1, "clip-1"), (0, 2, "clip-1"), (1, 1, "clip-1"), (0, 1, "clip-2"))]
    assert len({seed for seeds in others for seed in seeds}) == 20


def recipe_of(folder, shards, *more):
    """With a vocoder that takes little time."""
    quick = ("vocoder.iterations=1", "vocoder.inversion_steps=1")
    return load_recipe("demo", [*overrides(folder, shards), *quick, *more])


def make(recipe, folder, features=None):
    run = recipe.folder
    make_candidates(recipe, run, features or str(run / "features" / "shards"), run / "generative" / "export", 1, folder, ALONE)
    return ShardSet.open(folder)


def records(shards):
    """Key -> what round.json says, and the arrays by the names of their members."""
    found = {}
    for place in [(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]:
        members = shards.read(*place)
        arrays = {name: np.load(io.BytesIO(data)).astype(np.float32) for name, data in members.items() if name.endswith(".npy")}
        found[shards.entry(*place).key] = json.loads(members["round.json"]) | arrays
    return found


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("shard-*"))}


@pytest.fixture(scope="module")
def candidates(tiny, tmp_path_factory):
    """Candidates of the tiny run, winner the best of three."""
    recipe = recipe_of(tiny.folder, tiny.shards, "preference.winner=best_of_n", "preference.candidates=3")
    folder = tmp_path_factory.mktemp("candidates") / "candidates"
    return recipe, folder, make(recipe, folder)


def test_everything_about_the_candidates_is_kept(candidates):
    recipe, folder, shards = candidates
    found = records(shards)
    assert len(found) == 8 and shards.settings == json.loads((folder / "provenance.json").read_text())
    for key, record in found.items():
        assert record.keys() == {"seeds", "scores", "loser", "winner", "truth", "loser.npy", "winner.npy", "similarities.npy"}
        assert record["seeds"] == seeds_of(recipe.seed, 1, key, 3)
        assert record["similarities.npy"].shape == (4, 3), "three candidates and the true sound, three segments"
        expected = segment_score(torch.from_numpy(record["similarities.npy"]), recipe.preference.score)
        assert [*record["scores"], record["truth"]] == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_round_of_the_chain_has_the_true_sound_as_winner(tiny):
    shards = ShardSet.open(tiny.run / "preference" / "round-1" / "candidates")
    for record in records(shards).values():
        assert record["winner"] == "truth" and len(record["scores"]) == 2
    assert set(shards.entry(0, 0).members) == {"loser.npy", "similarities.npy", "round.json"}


def members_of(shards, key):
    (row,) = [row for row in range(shards.counts[0]) if shards.entry(0, row).key == key]
    return shards.read(0, row)


def test_seeds_bring_any_candidate_back(candidates, tiny):
    """One by one, from the stored conditions; and from the clip's video file as `foleyscale generate --seed` does."""
    recipe, _, shards = candidates
    model = SoundModel.from_run(tiny.run, CPU, stage="generative")
    features, clips = (ShardSet.open(url, split="train") for url in (tiny.run / "features" / "shards", tiny.shards))
    for row in range(2):
        members, key = shards.read(0, row), shards.entry(0, row).key
        record = json.loads(members["round.json"])
        stored = {name[:-4]: torch.from_numpy(np.load(io.BytesIO(data))).float()[None] for name, data in members_of(features, key).items()}
        pictures, seconds = model.read(io.BytesIO(members_of(clips, key)["mp4"]), model.views, 0.0, recipe.clip.seconds)
        seen = model.see(pictures)
        for name in ("loser", "winner"):
            expected = torch.from_numpy(np.load(io.BytesIO(members[f"{name}.npy"]))).float()[None]
            noise = model.noise(1, seconds, record["seeds"][record[name]])
            for conditions in (Conditions(clip=stored["clip"], sync=stored["sync"]), seen):
                torch.testing.assert_close(model.latents(conditions, noise), expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_a_complete_round_is_left_alone(candidates):
    recipe, folder, _ = candidates
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    make(recipe, folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_interrupted_round_goes_on_and_ends_the_same(candidates, tmp_path):
    recipe, folder, shards = candidates
    copy = shutil.copytree(folder, tmp_path / "candidates")
    for path in (f"{shards.shards.name(0)}.parquet", "dataset.json", "index.parquet"):
        (copy / path).unlink()
    make(recipe, copy)
    assert contents(copy) == contents(folder)


def test_an_interrupted_round_does_not_go_on_with_another_model(candidates, tmp_path):
    recipe, folder, _ = candidates
    copy = shutil.copytree(folder, tmp_path / "candidates")
    changed = dataclasses.replace(recipe, generative=dataclasses.replace(recipe.generative, guidance=2.0))
    with pytest.raises(ProvenanceError, match=rf"^{copy} was made with another generative.guidance: delete {tmp_path} to make"):
        make(changed, copy)
    (link := tmp_path / "round-1" / "candidates").parent.mkdir()
    link.symlink_to(copy)
    with pytest.raises(ProvenanceError, match=rf"^{copy} was made .*: delete {link.parent} and {copy} to make the round again"):
        make(changed, link)
    features = str(recipe.folder / "features" / "shards")
    with pytest.raises(ProvenanceError, match="was made with another model: "):
        make_candidates(recipe, recipe.folder, features, recipe.folder / "preference" / "round-1" / "export", 1, copy, ALONE)
    assert contents(copy) == contents(folder)


def test_a_complete_round_does_not_mind_other_batches(candidates, tmp_path):
    recipe, folder, _ = candidates
    copy = shutil.copytree(folder, tmp_path / "candidates")
    changed = dataclasses.replace(recipe, preference=dataclasses.replace(recipe.preference, batch_videos=3))
    make(changed, copy)
    assert contents(copy) == contents(folder)
    (copy / "dataset.json").unlink()
    with pytest.raises(ProvenanceError, match=rf"^{copy} was made with another preference.batch_videos: delete {tmp_path} to make"):
        make(changed, copy)


def test_batches_change_nothing_but_the_last_bits(candidates, tmp_path):
    recipe, _, shards = candidates
    alone = dataclasses.replace(recipe, preference=dataclasses.replace(recipe.preference, batch_videos=3))
    found, expected = records(make(alone, tmp_path / "candidates")), records(shards)
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert record["scores"] == pytest.approx(expected[key]["scores"], abs=1e-4)


class Spoiled(SoundModel):
    """Gives every second candidate a latent that half precision cannot hold, and the last video nothing but NaN."""

    def latents(self, conditions, noise, *rest, **options):
        latents = super().latents(conditions, noise, *rest, **options)
        latents[1::2, 0, 0] = 1e5
        latents[-2:] = torch.nan
        return latents


def test_a_bad_sample_is_left_out_and_stops_nothing(tiny, tmp_path):
    recipe = recipe_of(tiny.folder, tiny.shards)
    source = ShardSet.open(tiny.run / "features" / "shards", split="train")
    maker = _Maker.of_round(recipe, tiny.run, tiny.run / "generative" / "export", 1, CPU)
    maker.model = Spoiled(**{field.name: getattr(maker.model, field.name) for field in dataclasses.fields(SoundModel)})
    with ShardWriter(tmp_path, source.shards[0].number) as writer:
        maker.write(writer, one_pass(source.select([0]), maker.decoder(), recipe.preference.batch_videos))
    rows = read_sidecar(Folder(tmp_path), source.shards.name(0)).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 7 + ["failed"] and rows[-1]["reason"] == "not_finite"
    for record in records(build_index(tmp_path, {})).values():
        assert record["scores"][1] is None and record["scores"][0] is not None and np.isfinite(record["truth"])
        assert np.isfinite(record["similarities.npy"][[0, -1]]).all()


def test_a_generator_that_gives_nothing_but_nan_is_said(tiny, tmp_path, caplog):
    """Its conditions are spoiled here, in a copy of the features."""
    run = shutil.copytree(tiny.run, tmp_path / "run")
    recipe = recipe_of(tmp_path, tiny.shards)
    features = run / "features" / "shards"
    shards = ShardSet.open(features, split="train")
    first = shards.shards[0]
    with ShardWriter(features, first.number, split=first.split) as writer:
        for row in range(first.clips):
            members = shards.read(0, row)
            writer.add(shards.entry(0, row).key, members | {"sync.npy": npy(torch.full((96, 128), torch.nan))})
    build_index(str(features), shards.settings)
    with pytest.raises(RecipeError, match="no video has a pair of sounds, for the reasons in its sidecars: give more preference"):
        make(recipe, tmp_path / "candidates")
    assert "round 1: 8 of 8 videos have no pair of sounds (8 not_finite)" in caplog.text


def test_a_damaged_feature_costs_its_video(tiny, tmp_path):
    run = shutil.copytree(tiny.run, tmp_path / "run")
    features = run / "features" / "shards"
    entry = ShardSet.open(features, split="train").entry(0, 2)
    with open(features / f"{entry.shard}.tar", "r+b") as file:
        file.seek(entry.members["clip.npy"].offset + 200)
        file.write(b"damage")
    found = make(recipe_of(tmp_path, tiny.shards), tmp_path / "candidates")
    assert len(found) == 7 and entry.key not in records(found)
    rows = {row["key"]: row for row in read_sidecar(Folder(found.url), entry.shard).to_pylist()}
    assert (rows[entry.key]["status"], rows[entry.key]["reason"]) == ("failed", "bad_crc")


@pytest.mark.slow
def test_two_processes_leave_the_bytes_of_one(tiny, tmp_path):
    """Three shards; scored by an export that is given by its path, so that the shards of the reward are made together too."""
    reward = str(tiny.run / "contrastive" / "export")
    for name in ("one", "two"):
        shutil.copytree(tiny.run, tmp_path / name / "run", ignore=shutil.ignore_patterns("preference", "checkpoints"))
    alone = [sys.executable, "-W", "ignore", "-m", "tests.pipelines.candidates_share", str(tmp_path / "one"), tiny.shards, reward]
    subprocess.run(alone, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=280)
    assert run_on_two_ranks(__file__, "candidates_share.py", tmp_path / "two", "done.json", tiny.shards, reward) == 2
    for place in ("candidates", "run/preference/reward"):
        one, two = (contents(tmp_path / name / place) for name in ("one", "two"))
        assert one == two and len(one) == 6, "three tars, three sidecars"
