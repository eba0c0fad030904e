"""Recipes: what is read back, what is refused, and in which words."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from data_prep.media import ClipFormat
from data_prep.settings import PrepareConfig
from models.generators.mmdit import PRESETS
from pipelines.config import merge
from pipelines.recipes import RecipeError, dump_recipe, load_preparation, load_recipe, parse_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_resolved_recipe_reads_back_equal(name):
    recipe = load_recipe(name)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_vggsound_has_the_papers_values():
    recipe = load_recipe("vggsound")
    assert recipe.generative.model == PRESETS["small_16k"]
    train, preference = recipe.generative.train, recipe.preference
    assert (train.steps, train.batch_size, train.optimiser.lr, train.optimiser.betas) == (300_000, 512, 1e-4, (0.9, 0.95))
    assert (train.optimiser.schedule, train.optimiser.milestones) == ("steps", (240_000, 270_000))
    train = preference.train
    assert (preference.rounds, preference.candidates, train.steps, train.accumulation) == (5, 5, 1000, 2)
    assert (train.optimiser.lr, train.optimiser.weight_decay, train.optimiser.warmup_steps) == (5e-6, 1e-4, 100)


def test_preset_with_changes():
    recipe = load_recipe("demo", ["generative.model={preset: tiny, hidden: 96}"])
    assert recipe.generative.model.hidden == 96 and recipe.generative.model.depth == PRESETS["tiny"].depth


def test_scientific_notation_is_a_number():
    assert load_recipe("demo", ["generative.train.optimiser.lr=1e-4"]).generative.train.optimiser.lr == 1e-4


def test_merge_leaves_its_arguments():
    base = {"a": {"b": 1, "c": 2}}
    assert merge(base, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert base == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(("override", "message"), [
    ("generative.model.dept=3", r"generative.model.dept: no such key; did you mean depth\?$"),
    ("gen=1", "gen: no such key; known keys: name, out, data"),
    ("generative.train.steps=abc", "generative.train.steps: input should be a valid integer.*'abc'$"),
    ("generative.train.zero.stage=7", "generative.train.zero.stage: input should be 0, 1, 2 or 3, not 7$"),
    ("generative.model=foo", "generative.model: no preset 'foo'; choose from small_16k"),
    ("autoencoder.mel=xx", "autoencoder: mel 'xx' is not known"),
    ("contrastive.segments=9", r"clip.seconds 3.84 is shorter than the 11.52 s of 9 contrastive.segments$"),
    ("preference={losers: mixed, distortion: {coarse_seconds: 1.2}}", "is 1.2: give at most 0.96, 1 / 4 of clip.seconds; warp"),
    ("preference={losers: distorted, distortion: {kinds: [swap], coarse_seconds: 2}}", "coarse_seconds is 2: give at most 1.92, 1 / 2 of"),
    ("preference={losers: distorted, distortion: {subtle_seconds: 0.02}}", "subtle_seconds 0.02 is shorter than a latent, 0.032 s"),
    ("clip.fps=30", "clip.fps is 30 and contrastive.model.fps 25: .*; make shards at 25 fps .*, or set contrastive.model.fps=30 with"),
    ("contrastive.model={preset: tiny, mel: mmaudio_16k}", "segment_frames last 1.28 s at 25 fps and segment_mels 2.048 s in mmaudio_16k"),
    ("contrastive.model.mel=xx", "contrastive.model.mel 'xx' is not known; choose from mmaudio_16k"),
    ("contrastive.model.mel=sf_cavp_44k", "clip.sample_rate is 16000 and contrastive.model.mel takes 44100: choose sf_cavp at 16000 Hz"),
    ("generative.train.accumulation=3", "batch_size .* must divide by accumulation 3$"),
    ("steps", "override 'steps': write it as key=value"),
])
def test_a_wrong_key_is_one_clear_line(override, message):
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe("demo", [override])
    assert "\n" not in str(error.value)


def test_pictures_of_any_rate_serve_where_the_contrastive_stage_is_not_needed():
    public = [f"conditioning.{key}" for key in ("clip=clip", "sync=synchformer", "clip_weights=a", "synchformer_weights=b")]
    assert load_recipe("demo", [*public, "preference.rounds=0", "clip.fps=30"]).clip.fps == 30
    with pytest.raises(RecipeError, match="clip.fps is 30"):
        load_recipe("demo", [*public, "clip.fps=30"])
    model = "contrastive.model={preset: tiny, fps: 30, segment_frames: 36, hop_frames: 36, segment_mels: 120}"
    assert load_recipe("demo", ["clip.fps=30", model]).contrastive.model.seconds(3) == 3.6


def test_mmaudio_is_trained_on_at_44_kilohertz_with_rounds():
    """The overrides of docs/generation.md."""
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    (line,) = re.findall(r"^foleyscale run mmaudio_finetune (name=mmaudio_44k .*?[^\\])$", text, flags=re.DOTALL | re.MULTILINE)
    recipe = load_recipe("mmaudio_finetune", shlex.split(line.replace("\\\n", " ")))
    assert recipe.generative.model == PRESETS["large_44k_v2"] and recipe.preference.rounds == 5
    assert (recipe.preparation.format.sample_rate, recipe.contrastive.model.mel, recipe.vocoder.preset) == (44100, "sf_cavp_44k", "44k")


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe file, and no shipped recipe of that name"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(RecipeError, match="broken.yaml: not valid YAML"):
        load_recipe(broken)
    broken.write_text("- a")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(broken)


def test_preparation_follows_the_clip_format_unless_the_recipe_says_more():
    assert load_preparation("demo").format == ClipFormat(short_side=32, max_seconds=3.84)
    assert load_preparation(None) == PrepareConfig()
    changed = load_preparation("demo", ["filters.min_motion=0.001", "shard_mb=10"])
    assert (changed.filters.min_motion, changed.shard_mb, changed.format.short_side) == (0.001, 10, 32)
    given = parse_recipe({"prepare": {"reader": "folder", "arguments": ["videos"], "settings": {"format": {"short_side": 128}}}})
    assert given.preparation.format.short_side == 128
    assert parse_recipe(yaml.safe_load(dump_recipe(given))) == given


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("filters.min_motio=1", r"^filters.min_motio: no such key; did you mean min_motion\?$"),
        ("format.short_side=13", "^format: ClipFormat.short_side is 13"),
        ("shard_mb=big", "^shard_mb: input should be a valid integer.*'big'"),
        ("shard_mb", "^override 'shard_mb': write it as key=value$"),
    ],
)
def test_mistakes_in_a_preparation_are_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_preparation(None, [override])


def test_shards_must_be_made_at_the_rates_that_are_read():
    with pytest.raises(RecipeError, match="prepare.settings.format.fps 12 must equal clip.fps, 25"):
        parse_recipe({"prepare": {"settings": {"format": {"fps": 12}}}})
