"""Scores by another encoder: what it sees is computed once, and any cut into segments will do."""

import dataclasses
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from data_prep.audio import MEL_SPECS, log_mel
from data_prep.index import ShardSet
from data_prep.media import ClipFormat
from data_prep.prepare import prepare_shards
from data_prep.settings import PrepareConfig
from models.encoders.sf_cavp import PRESETS, SFCAVP
from models.pretrained import save_weights
from pipelines.candidates import make_candidates
from pipelines.engine.world import World
from pipelines.features import training_videos
from pipelines.provenance import ProvenanceError
from pipelines.recipes import RecipeError, dump_recipe, load_recipe
from pipelines.rewards import extract_reward, load_scorer, scoring_export
from pipelines.run import Chain
from pipelines.stages.data import clips
from tests.fixtures.tiny_chain import STAGES, finish, overrides, start

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def copied(tiny, tmp_path_factory):
    """Makes recipes of a copy of the tiny run, scored by the encoder in a folder."""
    folder = tmp_path_factory.mktemp("reward")
    shutil.copytree(tiny.run, folder / "run")
    quick = ("vocoder.iterations=1", "vocoder.inversion_steps=1")
    return lambda reward="": load_recipe("demo", [*overrides(folder, tiny.shards), *quick, f"preference.reward={reward}"])


def scored(recipe, folder):
    features, start = str(recipe.folder / "features" / "shards"), recipe.folder / "generative" / "export"
    make_candidates(recipe, recipe.folder, features, start, 1, folder, ALONE)
    shards = ShardSet.open(folder)
    return [json.loads(shards.read(0, row, ["round.json"])["round.json"]) for row in range(len(shards))]


def test_the_own_encoder_by_its_path_scores_as_the_own_encoder(copied, tiny, tmp_path):
    own, named = scored(copied(), tmp_path / "own"), scored(copied(tiny.run / "contrastive" / "export"), tmp_path / "named")
    assert [record["loser"] for record in named] == [record["loser"] for record in own] and len(own) == 8
    for one, other in zip(own, named, strict=True):
        assert other["scores"] == pytest.approx(one["scores"], abs=1e-3) and other["truth"] == pytest.approx(one["truth"], abs=1e-3)
    reward = copied().folder / "preference" / "reward"
    before = {path.name: path.stat().st_mtime_ns for path in reward.iterdir()}
    scored(copied(tiny.run / "contrastive" / "export"), tmp_path / "again")
    assert {path.name: path.stat().st_mtime_ns for path in reward.iterdir()} == before, "made once for all rounds"


def other_encoder(folder, seed=1, **changes):
    """An untrained encoder that cuts clips into overlapping segments."""
    config = dataclasses.replace(PRESETS["tiny"], hop_frames=16, **changes)
    torch.manual_seed(seed)
    save_weights(SFCAVP(config), config, folder)
    return folder


def test_another_cut_gives_another_number_of_segments(copied, tmp_path):
    recipe = copied(other_encoder(tmp_path / "other"))
    shutil.rmtree(recipe.folder / "preference" / "reward", ignore_errors=True)
    scored(recipe, tmp_path / "made")
    seen, heard = ShardSet.open(recipe.folder / "preference" / "reward"), ShardSet.open(tmp_path / "made")
    assert seen.counts.tolist() == training_videos(recipe).counts.tolist() == [8]
    assert np.load(io.BytesIO(seen.read(0, 0)["reward.npy"])).shape == (5, 640)
    assert np.load(io.BytesIO(heard.read(0, 0)["similarities.npy"])).shape == (3, 5), "two candidates and the true sound"


def test_a_reward_that_was_replaced_is_refused(copied, tmp_path):
    recipe = copied(other_encoder(tmp_path / "other"))
    shutil.rmtree(recipe.folder / "preference" / "reward", ignore_errors=True)
    extract_reward(recipe, ALONE)
    other_encoder(tmp_path / "other", seed=2)
    with pytest.raises(ProvenanceError, match="was made with another preference.reward: delete that folder, or restore the encoder"):
        extract_reward(recipe, ALONE)


def test_the_encoder_that_scores_is_the_named_one_or_the_own(copied, tmp_path):
    recipe = copied()
    assert scoring_export(recipe) == recipe.folder / "contrastive" / "export"
    assert not any(parameter.requires_grad for parameter in load_scorer(recipe, CPU).parameters())
    assert load_scorer(copied(other_encoder(tmp_path / "other")), CPU).config.hop_frames == 16


def test_an_encoder_of_another_rate_is_refused(copied, tmp_path):
    folder = other_encoder(tmp_path / "other", mel="mmaudio_44k")
    with pytest.raises(RecipeError, match="preference.reward: the encoder in .*other hears 44100 Hz and clip.sample_rate is 16000: .*44k"):
        load_scorer(copied(folder), CPU)


def test_an_encoder_of_a_run_with_other_pictures_is_refused(copied, tmp_path):
    folder = other_encoder(tmp_path / "contrastive" / "export")
    (tmp_path / "recipe.yaml").write_text("clip: {size: 32}")
    assert load_scorer(copied(folder), CPU).config.hop_frames == 16, f"clip.size is {copied().clip.size}"
    (tmp_path / "recipe.yaml").write_text("clip: {size: 112}")
    with pytest.raises(RecipeError, match=f"the encoder in {folder} was trained with clip.size=112 and clip.size is 32: "):
        load_scorer(copied(folder), CPU)


@pytest.fixture(scope="module")
def high_rate(tiny, tmp_path_factory):
    """The recipe of a run at 44.1 kHz, with shards of the same clips, shorter still."""
    folder = tmp_path_factory.mktemp("high")
    media = ClipFormat(short_side=32, max_seconds=3.84, sample_rate=44100)
    prepare_shards(str(tiny.folder / "manifest.parquet"), str(folder / "shards"), PrepareConfig(format=media, rows_per_shard=8), workers=1)
    changes = ["clip.sample_rate=44100", "autoencoder.mel=mmaudio_44k", "autoencoder.model.bands=128", "contrastive.model.mel=sf_cavp_44k",
               "vocoder.iterations=1", "vocoder.inversion_steps=1", *(f"{stage}.train.steps=2" for stage in STAGES)]
    return load_recipe("demo", [*overrides(folder, str(folder / "shards")), *changes])


def run_command(recipe, *command):
    path = recipe.folder.parent / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return finish(start([sys.executable, "-W", "ignore", "-m", "launch.cli", *command, str(path)]))


def test_an_encoder_of_44_kilohertz_is_trained_and_scores(high_rate):
    run_command(high_rate, "train", "contrastive")
    scorer = load_scorer(high_rate, CPU)
    assert scorer.config.mel == "sf_cavp_44k" and MEL_SPECS[scorer.config.mel].sample_rate == 44100
    batch = next(iter(clips(high_rate, "heldout", 4)))
    seen = scorer.encode_video(batch["frames"].float() / 255).segments
    heard = scorer.encode_audio(log_mel(batch["waveform"], scorer.config.mel)).segments
    scores = scorer.similarity(seen, heard)
    assert scores.shape == (4, 3) and scores.isfinite().all() and scores.std() > 0


@pytest.mark.slow
def test_a_round_at_44_kilohertz(high_rate):
    """The whole chain."""
    folder = high_rate.folder
    assert "round-1" in run_command(high_rate, "run")
    rounds = ShardSet.open(folder / "preference" / "round-1" / "candidates")
    similarities = np.load(io.BytesIO(rounds.read(0, 0)["similarities.npy"]))
    assert similarities.shape == (3, 3) and np.isfinite(similarities).all(), "two candidates and the true sound, three segments"
    assert (folder / "preference" / "round-1" / "export" / "complete.json").exists()


def test_a_wrong_reward_is_told_before_the_first_stage(tiny, tmp_path):
    """And nothing is written, so that another one can be named under the same name."""
    empty, half = tmp_path / "empty", other_encoder(tmp_path / "half")
    (half / "weights.safetensors").unlink()
    for folder, problem in ((empty, "config.json is missing"), (half, "weights.safetensors is missing")):
        recipe = load_recipe("demo", [*overrides(tmp_path, tiny.shards), f"preference.reward={folder}"])
        with pytest.raises(RecipeError, match=f"^preference.reward: no encoder in {folder} .empty takes this .*{problem}: name"):
            Chain(recipe, ALONE).run()
    assert not (tmp_path / "run").exists()
    damaged = other_encoder(tmp_path / "damaged")
    (damaged / "weights.safetensors").write_bytes(b"{}")
    with pytest.raises(RecipeError, match=f"^preference.reward: no encoder in {damaged} "):
        load_scorer(load_recipe("demo", [*overrides(tmp_path, tiny.shards), f"preference.reward={damaged}"]), CPU)
