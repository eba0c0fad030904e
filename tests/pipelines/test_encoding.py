"""What a recipe's encoders make of clips: by public checkpoints beside our own, computed beforehand or while training."""

import dataclasses
import importlib.util
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.index import ShardSet
from data_prep.stream import one_pass
from models.generators.mmdit import PRESETS
from pipelines.encoding import (
    ClipEncoder,
    _hash,
    captions,
    file_hash,
    generator_sizes,
    latent_length,
    needed_stages,
    needs_contrastive,
)
from pipelines.engine.draws import Draws
from pipelines.engine.world import World
from pipelines.features import extract_features, require_shards
from pipelines.provenance import ProvenanceError
from pipelines.recipes import RecipeError, load_recipe
from pipelines.sounding import SoundModel
from pipelines.stages.generative import GenerativeStage
from pipelines.stages.inputs import LATENTS, LiveFeatures, StoredFeatures
from tests.fixtures.made_encoders import SmallCLIP, small_conditioner, small_open_clip
from tests.fixtures.tiny_chain import overrides

if importlib.util.find_spec("open_clip") is None:
    pytest.skip("needs the extra clip", allow_module_level=True)

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    """A run that takes pictures and captions from CLIP and the timing from its own encoder: its recipe, with the features extracted."""
    folder = tmp_path_factory.mktemp("mixed")
    weights, config = small_open_clip(folder / "clip")
    shutil.copytree(tiny.run, folder / "run", ignore=shutil.ignore_patterns("features", "generative", "preference"))
    more = ["conditioning.clip=clip", "conditioning.text=clip", f"conditioning.clip_weights={weights}",
            f"conditioning.clip_model.architecture={config.architecture}", "conditioning.clip_model.picture_size=32"]
    recipe = load_recipe("demo", [*overrides(folder, tiny.shards), *more])
    extract_features(recipe, recipe.folder / "features", ALONE)
    return recipe


def stages(recipe):
    url = str(recipe.folder / "features" / "shards")
    live = dataclasses.replace(recipe, conditioning=dataclasses.replace(recipe.conditioning, precompute=False))
    return GenerativeStage(recipe, url), GenerativeStage(live, url)


def test_features_of_all_encoders_lie_in_the_shards(mixed):
    features = ShardSet.open(mixed.folder / "features" / "shards")
    arrays = {name: np.load(io.BytesIO(data)) for name, data in features.read(0, 0).items()}
    assert {name: array.shape for name, array in arrays.items()} == {
        "latent_mean.npy": (120, 16), "latent_std.npy": (120, 16), "clip.npy": (30, 24), "sync.npy": (96, 128), "text.npy": (77, 32),
        "segments.npy": (3, 640)}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
    np.testing.assert_allclose(np.linalg.norm(arrays["clip.npy"].astype(np.float32), axis=1), 1, atol=2e-3)


def test_provenance_names_every_encoder(mixed):
    path = mixed.folder / "features" / "provenance.json"
    known = json.loads(path.read_text())
    assert {"data", "autoencoder", "contrastive", "clip_weights", "clip_model", "conditioning.text"} <= known.keys()
    assert len(known["clip_weights"]) == 64
    path.write_text(json.dumps(known | {"clip_weights": "0" * 64}))
    with pytest.raises(ProvenanceError, match="was made with another clip_weights: delete that folder"):
        extract_features(mixed, mixed.folder / "features", ALONE)
    path.write_text(json.dumps(known))


def test_public_weights_are_hashed_once(mixed):
    """Gigabytes, before every round; a file that was replaced is read again."""
    features, path = mixed.folder / "features", Path(mixed.conditioning.clip_weights)
    require_shards(mixed, features, ALONE)
    before = _hash.cache_info()
    require_shards(mixed, features, ALONE)
    after = _hash.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (0, 1)
    known, contents = file_hash(path), path.read_bytes()
    path.write_bytes(contents + b"!")
    assert file_hash(path) != known
    path.write_bytes(contents)
    assert file_hash(path) == known


def test_the_generator_is_sized_by_the_encoders(mixed):
    stored, live = stages(mixed)
    config = stored.model_config()
    assert config == live.model_config()
    assert (config.clip_len, config.clip_dim, config.text_len, config.text_dim) == (30, 24, 77, 32)
    assert (config.sync_len, config.sync_dim, config.sync_group, config.latent_len, config.latent_dim) == (96, 128, 32, 120, 16)


def test_conditions_made_on_the_way_are_those_computed_beforehand(mixed):
    stored, live = stages(mixed)
    assert isinstance(stored.features, StoredFeatures) and isinstance(live.features, LiveFeatures)
    made = []
    for stage in (stored, live):
        batch = next(one_pass(stage.features.shards("train"), stage.features.decoder(stage.names), 4))
        made.append(stage.inputs(batch | {"position": torch.arange(4)}, Draws(0, torch.arange(4)), CPU))
    assert made[0].keys() == made[1].keys() == {"latent", "noise", "t", "drop_video", "drop_text", "clip", "sync", "text"}
    for name, values in made[0].items():
        torch.testing.assert_close(values.float(), made[1][name].float(), rtol=1e-3, atol=2e-3 * values.float().abs().max().item())
    assert not any(values.requires_grad for values in made[1].values())


def test_both_ways_begin_with_the_same_generator_and_loss(mixed):
    losses = []
    for stage in stages(mixed):
        torch.manual_seed(0)
        model = stage.build()
        batch = next(one_pass(stage.features.shards("train"), stage.features.decoder(stage.names), 4))
        torch.nn.init.normal_(model.generator.final_layer.conv.weight, generator=torch.Generator().manual_seed(1))
        losses.append((model(**stage.inputs(batch, Draws(0, torch.arange(4)), CPU))["loss"].item(), model.generator.latent_std,
                       model.generator.empty_string_feat))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-3) and losses[0][2].abs().sum() > 0
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-2, atol=1e-3)
    assert torch.equal(losses[0][2], losses[1][2])


def test_latents_alone_need_no_pictures(mixed):
    live = LiveFeatures(mixed)
    assert live.decoder(LATENTS).members == ("flac",) and set(live.decoder((*LATENTS, "clip")).members) == {"flac", "mp4"}


def test_a_caption_is_read_once_in_a_shard():
    conditioner = small_conditioner()
    encoder = ClipEncoder(None, None, conditioner, None, CPU)
    clip = next(module for module in conditioner.modules() if isinstance(module, SmallCLIP))
    clip.read.clear()
    first = encoder.text(["rain", "dog", "rain"])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(encoder.text(["dog", "bell"])[0], first[1])
    assert clip.read == ["rain", "dog", "bell"]
    encoder.forget_captions()
    encoder.text(["dog"])
    assert clip.read == ["rain", "dog", "bell", "dog"]


def test_labels_stand_for_a_missing_caption():
    batch = {"caption": ["a dog", "", None, ""], "labels": [["bark"], ["bark", "rain"], None, []]}
    assert captions(batch) == ["a dog", "bark, rain", "", ""]


def test_a_run_needs_its_contrastive_stage_only_for_what_reads_it(tmp_path):
    public = [f"conditioning.{key}" for key in ("clip=clip", "sync=synchformer", "clip_weights=a", "synchformer_weights=b")]
    own, without, judged = (load_recipe("demo", more) for more in ([], [*public, "preference.rounds=0"], public))
    assert [needs_contrastive(recipe) for recipe in (own, without, judged)] == [True, False, True]
    assert [needed_stages(recipe, "generative") for recipe in (own, without)] == [("autoencoder", "contrastive"), ("autoencoder",)]
    assert needed_stages(judged, "preference") == ("contrastive", "generative")


def test_mmaudios_encoders_give_mmaudios_generator():
    changes = ["clip.sample_rate=44100", "autoencoder.mel=mmaudio_44k", "autoencoder.model=44k", "generative.model=large_44k",
               "conditioning.clip=clip", "conditioning.sync=synchformer", "conditioning.text=clip", "conditioning.clip_weights=a",
               "conditioning.synchformer_weights=b"]
    changes.append("prepare.settings.format.sample_rate=44100")
    with pytest.raises(RecipeError, match="clip.sample_rate is 44100 and contrastive.model.mel takes 16000: .*=sf_cavp_44k.*, or public"):
        load_recipe("vggsound", changes)
    recipe = load_recipe("vggsound", [*changes, "preference.rounds=0"])
    with_rounds = load_recipe("vggsound", [*changes, "contrastive.model.mel=sf_cavp_44k"])
    assert with_rounds.preference.rounds > 0 and generator_sizes(with_rounds) == generator_sizes(recipe)
    sizes = generator_sizes(recipe)
    assert dataclasses.replace(recipe.generative.model, **sizes) == PRESETS["large_44k"]
    assert latent_length(8.0, "mmaudio_44k") == 345 and latent_length(3.84, "mmaudio_16k") == 120


def test_a_missing_checkpoint_is_named(mixed):
    away = dataclasses.replace(mixed.conditioning, clip_weights="away.bin")
    with pytest.raises(ValueError, match="conditioning.clip_weights is away.bin: no such file"):
        ClipEncoder.of_run(dataclasses.replace(mixed, conditioning=away), mixed.folder, CPU)


def test_a_run_with_captions_takes_prompts_and_one_without_says_so(mixed, tiny):
    with_text = SoundModel.around(None, mixed, mixed.folder, CPU)
    assert with_text.text(["rain"]).shape == (1, 77, 32) and with_text.reward is not None
    without = SoundModel.from_run(tiny.run, CPU)
    assert without.text([""]) is None
    with pytest.raises(ValueError, match="no text encoder for a prompt: name one"):
        without.text(["rain"])
