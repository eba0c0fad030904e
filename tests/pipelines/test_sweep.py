"""Sweeps: what a file may say, which runs it means, what they share, and (slow) two variants that really run."""

import csv
import shutil
import sys

import pytest

from pipelines.recipes import RecipeError, dump_recipe, load_recipe
from pipelines.sweep import _prepare, load_sweep, members, run_sweep
from tests.fixtures.tiny_chain import finish, start


@pytest.fixture
def run(tmp_path):
    """The folder of a run that is ready for rounds, as far as its files' names tell."""
    run = tmp_path / "runs" / "mine"
    for stage in ("autoencoder", "contrastive", "generative"):
        (run / stage / "export").mkdir(parents=True)
        (run / stage / "export" / "complete.json").write_text("{}")
        (run / stage / "export" / "weights.safetensors").write_text(stage)
    recipe = load_recipe("demo", [f"out={run.parent}", "name=mine", "preference.train.checkpoint_mirror=s3://bucket/mine/"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    return run


def write(folder, text):
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_the_sweep_that_ships():
    config = load_sweep("preference", ["rounds=2", "seeds=[3]", "preference.train.steps=4", "variants.other_reward.reward=some/export"])
    assert list(config.variants) == ["base", "dpo", "anchor", "full", "best", "mean", "distorted", "mixed", "other_reward"]
    assert (config.rounds, config.seeds, config.preference) == (2, (3,), {"train": {"steps": 4}})


@pytest.mark.parametrize(("text", "message"), [
    ("rouds: 3", "sweep.yaml: rouds: no such key; did you mean rounds?"),
    ("rounds: 0\nvariants: {base: {}}", "rounds is 0: give 1 or more"),
    ("seeds: [1, 1]\nvariants: {base: {}}", r"seeds is \[1, 1\]: give one or more, different ones"),
    ("variants: {'a/b': {}}", "'a/b' names a folder: use letters, digits, _ and -"),
    ("rounds: 3", "variants: name at least one, such as base: {}"),
    ("variants: {base: }", "variants.base: input should be a valid dictionary, not None"),
    ("- base", "a sweep is a mapping of keys to values"),
    ("variants: {", "not valid YAML"),
])
def test_a_mistake_in_a_sweep_is_one_line(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_sweep(write(tmp_path, text))


def test_an_unknown_sweep_names_those_that_ship():
    with pytest.raises(RecipeError, match=r"nothing: no such sweep file, and no shipped sweep of that name \(preference\)"):
        load_sweep("nothing")


def test_the_recipes_of_the_members(run):
    config = load_sweep("preference", ["rounds=2", "seeds=[0, 4]", "preference.train={steps: 8, optimiser: {lr: 1e-5}}"])
    found = members(run, config)
    assert [(m.variant, m.seed) for m in found] == [(variant, seed) for seed in (0, 4) for variant in config.variants]
    dpo = next(m.recipe for m in found if m.name == "dpo-4")
    assert (dpo.folder, dpo.seed, dpo.preference.rounds) == (run / "sweep" / "dpo-4", 4, 2)
    assert (dpo.preference.objective, dpo.preference.beta) == ("dpo", load_recipe("demo").preference.beta)
    assert (dpo.preference.train.steps, dpo.preference.train.optimiser.lr, dpo.preference.train.optimiser.warmup_steps) == (8, 1e-5, 8)
    mirrors = {m.recipe.preference.train.checkpoint_mirror for m in found}
    assert len(mirrors) == len(found) and "s3://bucket/mine/sweep/dpo-4" in mirrors


def test_all_variants_are_checked_before_any_runs(run, tmp_path):
    with pytest.raises(RecipeError, match="variant worse: preference.objective: input should be 'avp_rpo', 'dpo' or 'flow_win'"):
        run_sweep(run, load_sweep(write(tmp_path, "variants: {base: {}, worse: {objective: ppo}}")))
    with pytest.raises(RecipeError, match="variant worse: preference.objectif: no such key; did you mean objective?"):
        run_sweep(run, load_sweep(write(tmp_path, "variants: {base: {}, worse: {objectif: dpo}}")))
    with pytest.raises(RecipeError, match="--only dop: no such variant; choose from base, dpo, anchor, full"):
        run_sweep(run, load_sweep("preference"), only=["dop"])
    assert not (run / "sweep").exists()


def test_a_run_that_is_not_ready_is_named(run, tmp_path):
    (run / "generative" / "export" / "complete.json").unlink()
    with pytest.raises(RecipeError, match="stage generative is not complete; run it with `foleyscale train generative` first"):
        members(run, load_sweep("preference"))
    (run / "generative" / "export" / "complete.json").write_text("{}")
    shutil.rmtree(run / "contrastive")
    with pytest.raises(RecipeError, match="the rounds of variant base need a contrastive encoder.*preference.rounds=1"):
        members(run, load_sweep("preference"))
    with pytest.raises(RecipeError, match="no recipe.yaml, so no run was started there"):
        members(tmp_path, load_sweep("preference"))


def prepared(run, config):
    found = {m.name: m for m in members(run, config)}
    for member in found.values():
        _prepare(run, member)
    return found


def test_variants_use_the_models_of_the_run_and_share_what_they_can(run):
    found = prepared(run, load_sweep("preference", ["seeds=[0, 1]", "variants.other.reward=export"]))

    def target(name, folder):
        return (run / "sweep" / name / folder).resolve()

    for name in found:
        assert [target(name, stage) for stage in ("generative", "features")] == [run / "generative", run / "features"]
    candidates = {name: target(name, "preference/round-1/candidates") for name, m in found.items() if m.recipe.preference.needs_candidates}
    alike = {frozenset(name for name in candidates if candidates[name] == folder) for folder in candidates.values()}
    of_seed = [frozenset(f"{variant}-{seed}" for variant in ("base", "dpo", "anchor", "full", "mixed")) for seed in (0, 1)]
    assert alike == {*of_seed, *(frozenset([f"{variant}-{seed}"]) for variant in ("best", "mean", "other") for seed in (0, 1))}
    assert target("distorted-0", "preference/distorted") == target("mixed-0", "preference/distorted")
    assert target("distorted-0", "preference/distorted") != target("mixed-1", "preference/distorted")
    assert target("other-0", "preference/reward") == target("other-1", "preference/reward")
    assert not (run / "sweep" / "distorted-0" / "preference" / "round-1").exists()
    assert not (run / "sweep" / "base-0" / "preference" / "reward").exists()


def test_what_was_made_with_other_weights_is_not_taken_up(run):
    config = load_sweep("preference", ["seeds=[0]"])
    candidates = prepared(run, config)["base-0"].recipe.folder / "preference" / "round-1" / "candidates"
    before = candidates.resolve()
    assert prepared(run, config) and candidates.resolve() == before
    (run / "generative" / "export" / "weights.safetensors").write_text("trained again")
    assert prepared(run, config) and candidates.resolve() != before and before.exists()


def test_a_sweep_on_another_disk(run, tmp_path):
    elsewhere = tmp_path / "scratch" / "deep" / "er"
    elsewhere.mkdir(parents=True)
    (run / "sweep").symlink_to(elsewhere)
    member = prepared(run, load_sweep("preference", ["seeds=[0]"]))["base-0"]
    assert (member.recipe.folder / "generative").resolve() == run / "generative"


def test_another_variant_under_the_same_name_is_refused(run):
    begun = ["seeds=[0]"]
    prepared(run, load_sweep("preference", begun))
    with pytest.raises(RecipeError, match="variant dpo: .*dpo-0 was begun with other values of preference.beta: restore them, or give the"):
        members(run, load_sweep("preference", [*begun, "variants.dpo.beta=7"]))
    assert members(run, load_sweep("preference", ["seeds=[0]", "rounds=7"])), "more rounds may follow"


def test_a_moved_run_goes_on(run):
    config = load_sweep("preference", ["seeds=[0]"])
    prepared(run, config)
    moved = run.rename(run.parent.parent / "moved")
    found = prepared(moved, config)
    assert load_recipe(moved / "sweep" / "base-0" / "recipe.yaml").folder == moved / "sweep" / "base-0"
    assert (found["base-0"].recipe.folder / "generative").resolve() == moved / "generative"


@pytest.mark.slow
def test_two_variants_of_two_rounds(tiny, tmp_path):
    run = tmp_path / "run"
    for name in ("autoencoder", "contrastive", "generative", "features"):
        shutil.copytree(tiny.run / name, run / name)
    shutil.copy(tiny.run / "recipe.yaml", run / "recipe.yaml")
    text = ("rounds: 2\nseeds: [3]\npreference: {watch: {clips: 4}, train: {steps: 4, validation_clips: 4}}\n"
            "variants: {base: {}, dpo: {objective: dpo}}\n")
    command = [sys.executable, "-W", "ignore", "-m", "launch.cli", "sweep", str(run), str(write(tmp_path, text))]
    half = finish(start([*command, "--only", "base"]))
    assert "base-3: preference: " in half and "dpo-3" not in half
    written = times(run / "sweep" / "shared")
    assert len(read_csv(run, "reward")) == 3
    said = finish(start(command))
    assert times(run / "sweep" / "shared").items() >= written.items(), "the first round's candidates and the start's signs are made once"
    assert "base-3: preference/round-2: complete, skipped" in said and "dpo-3: preference/round-2: done in " in said
    assert read_csv(run, "reward") == read_csv(run, "flow_loss") == [(name, "3", str(n)) for name in ("base", "dpo") for n in range(3)]
    html = (run / "sweep" / "sweep.html").read_text()
    assert html.count("<svg") == 2 * 5 and "not complete" not in html
    exports = [run / "sweep" / f"{variant}-3" / "preference" / "round-1" / "export" / "weights.safetensors" for variant in ("base", "dpo")]
    assert exports[0].read_bytes() != exports[1].read_bytes()
    before = times(run / "sweep")
    finish(start(command))
    assert {path for path, time in times(run / "sweep").items() if before.get(path) != time} <= {
        path for path in before if path.name in REWRITTEN}


REWRITTEN = ("recipe.yaml", "data.json", "sweep.csv", "sweep.html", "rounds.jsonl", "best.json")
"""What every start writes anew, the same as before."""


def times(folder):
    """When each file below was written, links not followed."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def read_csv(run, sign):
    """Variant, seed and round of the lines of a sign."""
    with open(run / "sweep" / "sweep.csv") as file:
        return [(line["variant"], line["seed"], line["round"]) for line in csv.DictReader(file) if line["sign"] == sign]
