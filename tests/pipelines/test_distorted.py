"""True sounds put out of time: rows from coarse to subtle, shards that depend on no process, and pairs made of them."""

import dataclasses
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.audio import log_mel
from data_prep.decoding import TensorDecoder
from data_prep.index import ShardSet, build_index
from data_prep.shards import ShardWriter
from data_prep.stream import one_pass
from models.codecs.autoencoder import PRESETS, MelVAE
from models.pretrained import save_weights
from pipelines.distorted import Distorter, distortion_row, write_distorted
from pipelines.engine.draws import Draws
from pipelines.engine.world import World
from pipelines.features import npy
from pipelines.provenance import ProvenanceError
from pipelines.recipes import load_recipe
from pipelines.stages.preference import PreferenceStage
from tests.fixtures.tiny_chain import tiny_shards

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
LENGTH, CHANNELS = 120, 16


def made_vae():
    torch.manual_seed(0)
    return MelVAE(PRESETS["tiny"]).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def distorted(tmp_path_factory):
    """Clip shards, a run with nothing but an autoencoder, and its distorted sounds."""
    folder = tmp_path_factory.mktemp("distorted")
    shards = tiny_shards(folder, clips=12, heldout=2)
    recipe = load_recipe("demo", [f"out={folder}", "name=run", f"data={shards}", "preference.losers=distorted", "features.batch_size=3"])
    save_weights(made_vae(), PRESETS["tiny"], folder / "run" / "autoencoder" / "export")
    return SimpleNamespace(recipe=recipe, run=folder / "run", clips=shards, url=write_distorted(recipe, folder / "run", ALONE))


def swells(count):
    """A chord that swells and fades around some moment, (B, samples) of 3.84 s: what is further out of time is further from it."""
    times = torch.arange(61440) / 16000
    chord = sum(torch.sin(2 * torch.pi * pitch * times) for pitch in (300, 900, 2700))
    centres = 1.2 + 1.4 * torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    return 0.2 * chord * torch.exp(-8 * (times - centres).square())


def test_every_training_clip_has_every_distortion(distorted):
    shards, clips = ShardSet.open(distorted.url), ShardSet.open(distorted.clips, split="train")
    (found,) = one_pass(shards, TensorDecoder(("distorted",)), 64)
    assert shards.shards.column("name").to_pylist() == clips.shards.column("name").to_pylist()
    assert found["key"] == [clips.entry(shard, row).key for shard in range(len(clips.shards)) for row in range(clips.counts[shard])]
    assert found["distorted"].shape == (len(clips), 3 * 4, LENGTH, CHANNELS) and found["distorted"].isfinite().all()


def test_levels_fall_towards_the_true_sound(distorted):
    """Sounds out of time by 0.64 s down to 0.08 s, over 48 clips: each level of each kind is nearer to the truth than the last."""
    distort, keys, waveform = Distorter(distorted.recipe, made_vae(), CPU), [f"clip-{number}" for number in range(48)], swells(48)
    rows = distort(waveform, keys).unflatten(1, (3, 4))
    # The distances are those of time alone: a clip's noise is the same in all rows.
    mean, std = (x.transpose(1, 2) for x in made_vae().encode(log_mel(waveform, "mmaudio_16k")))
    noise = [np.random.default_rng([distorted.recipe.seed, *key.encode()]).standard_normal((LENGTH, CHANNELS), np.float32) for key in keys]
    truth = mean + std * torch.from_numpy(np.stack(noise))
    distances = (rows - truth[:, None, None]).square().mean(dim=(0, 3, 4))
    assert (distances.diff(dim=1) < 0).all(), distances
    assert (distances[:, -1] > 0).all()


def test_silence_cannot_be_put_out_of_time(distorted):
    """So all rows of a clip are one sample of the posterior, and two clips are two."""
    rows = Distorter(distorted.recipe, made_vae(), CPU)(torch.zeros(2, 61440), ["clip-a", "clip-b"])
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows), rtol=0, atol=1e-5)
    assert 0.5 < ((rows[0, 0] - rows[1, 0]) / 2**0.5).std() / made_vae().encode(torch.full((1, 80, 240), -4.0))[1].mean() < 2


def test_a_clip_is_distorted_alike_in_any_batch(distorted):
    distort, waveform = Distorter(distorted.recipe, made_vae(), CPU), swells(3)
    together = distort(waveform, ["clip-a", "clip-b", "clip-c"])
    torch.testing.assert_close(distort(waveform[1:2], ["clip-b"]), together[1:2], rtol=1e-4, atol=1e-4)


def test_progress_chooses_the_level(distorted):
    config, middle = distorted.recipe.preference.distortion, torch.full((5,), 0.5)
    progress = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999])
    assert distortion_row(config, progress, torch.zeros(5), middle).tolist() == [0, 1, 2, 3, 3]
    assert distortion_row(config, progress, torch.full((5,), 0.99), middle).tolist() == [8, 9, 10, 11, 11]
    assert distortion_row(config, progress, torch.zeros(5), torch.zeros(5)).tolist() == [0, 0, 1, 2, 2]
    assert distortion_row(config, progress, torch.zeros(5), torch.full((5,), 0.99)).tolist() == [1, 2, 3, 3, 3]


def test_a_missing_shard_is_made_again_and_no_other(distorted):
    folder = distorted.run / "preference" / "distorted"
    before = {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in folder.glob("shard-*")}
    lost = min(before)[:12]
    for ending in ("tar", "parquet"):
        (folder / f"{lost}.{ending}").unlink()
    write_distorted(distorted.recipe, distorted.run, ALONE)
    after = {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in folder.glob("shard-*")}
    assert {name: digest for name, (digest, _) in after.items()} == {name: digest for name, (digest, _) in before.items()}
    assert {name[:12] for name in before if before[name] != after[name]} == {lost}


def test_other_distortions_are_refused(distorted):
    known = distorted.recipe.preference
    preference = dataclasses.replace(known, distortion=dataclasses.replace(known.distortion, levels=3))
    with pytest.raises(ProvenanceError, match="was made with another preference.distortion.levels: delete that folder"):
        write_distorted(dataclasses.replace(distorted.recipe, preference=preference), distorted.run, ALONE)


@pytest.mark.parametrize("losers", ["distorted", "mixed"])
def test_pairs_of_a_round(distorted, losers, tmp_path):
    """Clips without candidates have no part in a mixed round; the whole set has, where nothing was generated."""
    keys = write_layers(distorted, tmp_path)
    preference = dataclasses.replace(distorted.recipe.preference, losers=losers)
    preference.train.batch_size = 8
    stage = PreferenceStage(dataclasses.replace(distorted.recipe, preference=preference), str(tmp_path / "features"),
                            str(tmp_path / "candidates"), tmp_path, 1, distorted.url)
    stream = stage.stream(ALONE, tmp_path / "quarantine.jsonl")
    batches, seen = stream.batches(0), set()
    for _ in range(4):
        batch = next(batches)
        seen.update(batch["key"])
        found = stage.inputs(batch, Draws(0, batch["position"]), CPU)
        assert found["winner"].shape == found["loser"].shape == (8, LENGTH, CHANNELS)
        assert found.keys() == {"winner", "loser", "noise", "t", "clip", "sync"}
    assert seen <= keys["candidates"] if losers == "mixed" else seen == keys["features"]


def write_layers(distorted, folder):
    """Made features of all training clips and candidates of all but the first of each shard; the keys of both."""
    clips, keys = ShardSet.open(distorted.clips, split="train"), {"features": set(), "candidates": set()}
    latent = torch.from_numpy(np.ones((LENGTH, CHANNELS), np.float32))
    members = {"features": {"latent_mean": latent, "latent_std": latent, "clip": latent, "sync": latent}, "candidates": {"loser": latent}}
    for shard, info in enumerate(clips.shards):
        for name, values in members.items():
            with ShardWriter(folder / name, info.number, split=info.split) as writer:
                for row in range(info.clips):
                    key = clips.entry(shard, row).key
                    if name == "candidates" and row == 0:
                        writer.skip(key, "dropped", "no_preference")
                        continue
                    writer.add(key, {f"{member}.npy": npy(value) for member, value in values.items()})
                    keys[name].add(key)
    for name in members:
        build_index(str(folder / name), {})
    return keys
