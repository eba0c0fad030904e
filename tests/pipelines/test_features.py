"""Feature shards: keys and numbers of the clip shards, float16, and a bad clip costs itself."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.index import ShardSet, build_index
from pipelines.engine.world import World
from pipelines.features import _provenance, extract_features, require_shards, training_videos
from pipelines.provenance import ProvenanceError
from pipelines.recipes import load_recipe
from tests.fixtures.accelerated import accelerate_launch, skip_without_accelerate
from tests.fixtures.tiny_chain import REPOSITORY, overrides
from tests.services.ports import free_ports

ALONE = World(0, 1, torch.device("cpu"))
SHARE = "tests.pipelines.features_share"


def keys(shards):
    return {(number, shards.entry(number, row).key) for number, count in enumerate(shards.counts) for row in range(count)}


def test_features_lie_beside_their_clips(tiny):
    clips, features = ShardSet.open(tiny.shards), ShardSet.open(tiny.run / "features" / "shards")
    assert [info.name for info in features.shards] == [info.name for info in clips.shards]
    assert keys(features) == keys(clips)
    arrays = {name: np.load(io.BytesIO(data)) for name, data in features.read(0, 0).items()}
    assert {name: array.shape for name, array in arrays.items()} == {
        "latent_mean.npy": (120, 16), "latent_std.npy": (120, 16), "clip.npy": (24, 512), "sync.npy": (96, 128), "segments.npy": (3, 640)}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
    assert sum(map(len, features.read(0, 0).values())) < 0.51 * 4 * sum(array.size for array in arrays.values()), "half of float32's bytes"


def test_features_of_other_weights_are_refused(tiny, tmp_path):
    run = shutil.copytree(tiny.run, tmp_path / "run")
    path = run / "features" / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"autoencoder": "0" * 64}))
    recipe = load_recipe("demo", overrides(tmp_path, tiny.shards))
    with pytest.raises(ProvenanceError, match="was made with another autoencoder: delete that folder, or give the run another name"):
        extract_features(recipe, run / "features", ALONE)


def test_features_of_clips_that_end_within_a_segment_are_made_again(tiny, tmp_path):
    """From before their own tokens were spread over all of a clip; of whole segments, and of public encoders, they stay as they are."""
    demo = overrides(tiny.folder, tiny.shards)
    public = ["conditioning.clip=clip", "conditioning.sync=synchformer", "conditioning.clip_weights=LICENSE",
              "conditioning.synchformer_weights=LICENSE"]
    found = [_provenance(load_recipe("demo", [*demo, *changes])) for changes in ([], ["clip.seconds=2.56"], ["clip.seconds=3", *public])]
    assert all("timing of own tokens" not in known for known in found)
    recipe = load_recipe("demo", [*demo, "clip.seconds=3"])
    known = _provenance(recipe)
    (tmp_path / "provenance.json").write_text(json.dumps({name: value for name, value in known.items() if name != "timing of own tokens"}))
    with pytest.raises(ProvenanceError, match="was made with another timing of own tokens: delete that folder, or give the run another"):
        extract_features(recipe, tmp_path, ALONE)


def test_rounds_on_features_that_were_made_without_them_say_what_to_do(tiny, tmp_path):
    """With public conditioners and no rounds, nothing asks for the contrastive stage, so its embeddings are not there."""
    run = shutil.copytree(tiny.run, tmp_path / "run", ignore=shutil.ignore_patterns("preference", "checkpoints"))
    path = run / "features" / "provenance.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "contrastive"}))
    with pytest.raises(ProvenanceError) as error:
        extract_features(load_recipe("demo", overrides(tmp_path, tiny.shards)), run / "features", ALONE)
    assert str(error.value) == (
        f"{run}/features was made when preference.rounds was 0, without the segment embeddings that rounds score by: delete that folder "
        "and run again; latents and conditions come out as before, no stage is trained again")


def test_rounds_train_on_the_first_videos(tiny):
    for videos, counts in {0: [8, 7, 8], 1: [8], 8: [8], 9: [8, 7], 16: [8, 7, 8], 99: [8, 7, 8]}.items():
        recipe = load_recipe("demo", [*overrides(tiny.folder, tiny.shards), f"preference.videos={videos}"])
        assert training_videos(recipe).counts.tolist() == counts, videos


def test_rounds_store_no_more_than_they_read(tiny, tmp_path):
    """Where training makes its own features: one of three training shards, and the held-out one."""
    shutil.copytree(tiny.run, tmp_path / "run", ignore=shutil.ignore_patterns("features", "generative", "preference", "checkpoints"))
    changes = ("conditioning.precompute=false", "preference.videos=8", "preference.train.validation_clips=1")
    recipe = load_recipe("demo", [*overrides(tmp_path, tiny.shards), *changes])
    require_shards(recipe, recipe.folder / "features", ALONE)
    clips, features = ShardSet.open(tiny.shards), ShardSet.open(recipe.folder / "features" / "shards")
    splits = {split: ShardSet.open(tiny.shards, split=split).shards.column("name").to_pylist() for split in ("train", recipe.heldout_split)}
    assert features.shards.column("name").to_pylist() == sorted([splits["train"][0], splits[recipe.heldout_split][0]])
    assert len(features.shards) == 2 < len(clips.shards)
    names = ShardSet.open(features.url, split="train").shards.column("name").to_pylist()
    assert names == training_videos(recipe).shards.column("name").to_pylist()


def test_workers_leave_the_same_bytes(tiny, tmp_path):
    run = shutil.copytree(tiny.run, tmp_path / "run", ignore=shutil.ignore_patterns("features", "generative", "preference", "checkpoints"))
    extract_features(load_recipe("demo", [*overrides(tmp_path, tiny.shards), "features.workers=2"]), run / "features", ALONE)
    made, known = ([path.read_bytes() for path in sorted((each / "features" / "shards").glob("*.tar"))] for each in (run, tiny.run))
    assert made == known and len(made) == len(ShardSet.open(tiny.shards).shards)


def test_clips_that_come_later_are_added(tiny, tmp_path):
    clips, run = Path(shutil.copytree(tiny.shards, tmp_path / "clips")), shutil.copytree(tiny.run, tmp_path / "run")
    recipe, settings = load_recipe("demo", overrides(tmp_path, str(clips))), ShardSet.open(clips).settings
    *before, later = sorted(clips.glob("shard-*.parquet"))
    for path in (later, later.with_suffix(".tar")):
        path.rename(tmp_path / path.name)
    build_index(clips, settings)
    shutil.rmtree(run / "features")
    extract_features(recipe, run / "features", ALONE)
    made = {path.name: path.stat().st_mtime_ns for path in (run / "features" / "shards").glob("shard-*")}
    assert len(made) == 2 * len(before)
    for path in (later, later.with_suffix(".tar")):
        (tmp_path / path.name).rename(path)
    build_index(clips, settings)
    extract_features(recipe, run / "features", ALONE)
    assert keys(ShardSet.open(run / "features" / "shards")) == keys(ShardSet.open(clips))
    assert {name: (run / "features" / "shards" / name).stat().st_mtime_ns for name in made} == made
    build_index(clips, settings | {"seconds": 1})
    with pytest.raises(ProvenanceError, match="was made with another data: delete that folder"):
        extract_features(recipe, run / "features", ALONE)


def test_a_damaged_clip_fails_alone(tiny, tmp_path):
    shards = shutil.copytree(tiny.shards, tmp_path / "shards")
    source = ShardSet.open(shards)
    entry = source.entry(1, 2)
    with open(Path(shards) / f"{source.shards[1].name}.tar", "r+b") as file:
        file.seek(entry.members["mp4"].offset + 5)
        file.write(b"damage")
    run = shutil.copytree(tiny.run, tmp_path / "run")
    for name in ("features/shards", "features/conditioner"):
        shutil.rmtree(run / name)
    (run / "features" / "provenance.json").unlink()
    extract_features(load_recipe("demo", overrides(tmp_path, str(shards))), run / "features", ALONE)
    features = ShardSet.open(run / "features" / "shards")
    assert keys(source) - keys(features) == {(1, entry.key)}
    assert source.shards[1].number == 1


def together(folder, shards, processes=2):
    """Processes that extract the features of `folder`/run."""
    port = str(free_ports(1)[0])
    common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-W", "ignore", "-m", SHARE, str(folder), shards]
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
    return [subprocess.Popen(command, cwd=REPOSITORY, env=common | rank) for rank in ranks]


@pytest.mark.slow
def test_processes_that_are_killed_lose_nothing(tiny, tmp_path):
    """Two processes die after the first shard; two others go on, keep it, and the shards are those of the run."""
    run = without_features(tiny.run, tmp_path / "run")
    shards = run / "features" / "shards"
    processes = together(tmp_path, tiny.shards)
    deadline = time.monotonic() + 120
    while not list(shards.glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in processes:
        process.kill()
        process.wait()
    first = {path.name: path.stat().st_mtime_ns for path in shards.glob("shard-*.parquet")}
    assert first and not (shards / "dataset.json").exists()
    assert [process.wait(timeout=200) for process in together(tmp_path, tiny.shards)] == [0, 0]
    assert all((shards / name).stat().st_mtime_ns == changed for name, changed in first.items())
    assert_alike(run, tiny.run)


@pytest.mark.slow
def test_processes_that_accelerate_starts_leave_the_same_shards(tiny, tmp_path):
    skip_without_accelerate()
    run = without_features(tiny.run, tmp_path / "run")
    command = [*accelerate_launch(2), "-m", SHARE, str(tmp_path), tiny.shards]
    subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=200)
    assert_alike(run, tiny.run)


def without_features(run, to):
    """A copy of a run up to its features."""
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns("shards", "generative", "preference"))


def assert_alike(run, other):
    """The features of two runs, which threads and batches may round unlike."""
    found, expected = (ShardSet.open(folder / "features" / "shards") for folder in (run, other))
    assert keys(found) == keys(expected)
    for number, count in enumerate(expected.counts):
        for row in range(count):
            for name, data in expected.read(number, row).items():
                array, other = (np.load(io.BytesIO(each)).astype(np.float32) for each in (data, found.read(number, row)[name]))
                np.testing.assert_allclose(other, array, rtol=2e-3, atol=2e-3 * np.abs(array).max())
