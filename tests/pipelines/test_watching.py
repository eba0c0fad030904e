"""Measuring a round: the same twice, by one encoder as by another of the same weights, and anew where something has changed."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from models.generators.mmdit import MMDiT, MMDiTConfig
from models.pretrained import load_weights, save_weights
from pipelines.engine.guards import TrainingError
from pipelines.heldout import HeldOut
from pipelines.recipes import load_recipe
from pipelines.signs import drift
from pipelines.watching import Watch


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with the models of the finished one and no rounds yet."""
    run = tmp_path_factory.mktemp("watched") / "run"
    run.mkdir()
    for name in ("autoencoder", "contrastive", "features", "generative", "recipe.yaml"):
        (run / name).symlink_to(tiny.run / name)
    return run


def watch(run, reward="", positions=range(5, 8)):
    recipe = load_recipe(run / "recipe.yaml")
    preference = dataclasses.replace(recipe.preference, reward=str(reward))
    return Watch(dataclasses.replace(recipe, preference=preference), run, positions, torch.device("cpu"))


def test_the_same_model_has_the_same_signs(run):
    export = run / "generative" / "export"
    first, again = watch(run), watch(run, run / "contrastive" / "export")
    signs = first.measure(0, export)
    known = first.known(0, export)
    assert known.figures == signs.figures and all(np.array_equal(known.clips[name], values) for name, values in signs.clips.items())
    assert len(first.held) == len(signs.clips["reward"]) == 3 and signs.finite
    assert known.positions.tolist() == signs.positions.tolist() == [5, 6, 7]
    assert again.known(0, export) is None, "another encoder scores"
    scored = again.measure(0, export)
    assert np.array_equal(scored.clips["reward"], signs.clips["reward"])
    assert drift(scored, signs) == {"drift": pytest.approx(0), "spread": 1.0}
    assert scored.clips["scoring"] == pytest.approx(scored.clips["reward"], abs=1e-5)
    assert scored.clips["scoring_true"] == pytest.approx(scored.clips["reward_true"], abs=1e-5)
    assert watch(run, run / "contrastive" / "export", range(6, 8)).known(0, export) is None, "other clips"


def test_a_skipped_step_takes_nothing_from_what_was_learned(run):
    """Of twenty steps, the last tenth are 19 and 20, of which the last was left out."""
    watched = watch(run)
    folder = watched.folder(7)
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": float("nan") if step == 20 else 1.0, "flow_win": float("nan") if step == 20 else float(step)}
             for step in range(1, 21)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 20, "validation/flow_loss": 1.0}]))
    assert watched._learned(7) == {"flow_win": 19.0}


def test_a_clip_has_the_same_signs_without_another(run):
    """Its noise is that of its place in the split, and so is what its flow loss is measured at: rounds remain paired clip by clip."""
    export, whole, left = run / "generative" / "export", watch(run, positions=range(4, 8)), watch(run, positions=range(4, 8))
    kept, held = torch.tensor([0, 2, 3]), whole.held
    features, judged = ({name: values[kept] for name, values in each.items()} for each in (held.features, held.judged))
    left.held = HeldOut([held.keys[row] for row in kept], held.positions[kept], held.places[kept], held.waveform[kept], held.mel[kept],
                        features, judged)
    every, some = (each.measure(0, export) for each in (whole, left))
    assert some.positions.tolist() == [4, 6, 7] and some.clips.keys() == every.clips.keys()
    for name, values in some.clips.items():
        assert values == pytest.approx(every.clips[name][kept.numpy()], rel=1e-5, abs=1e-6), name
    latents = every.clips["latent_mean"]
    assert not np.isclose(latents[1], latents[2], rtol=1e-3).any(), "a row's noise would be that of another clip"
    assert every.clips["latent_true"] == pytest.approx(held.features["latent_mean"].mean(1).numpy(), abs=1e-5)


def test_other_weights_of_the_vocoder_are_another_measurement(run, tmp_path):
    watched, found = watch(run), []
    for content in ("one", "two"):
        (tmp_path / "vocoder.pt").write_text(content)
        vocoder = dataclasses.replace(watched.recipe.vocoder, kind="bigvgan", weights=str(tmp_path / "vocoder.pt"))
        found.append(Watch(dataclasses.replace(watched.recipe, vocoder=vocoder), run, range(5, 8), watched.device)._fixed)
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"vocoder.weights"}


def test_a_clip_that_breaks_between_two_passes_is_told(run):
    export = run / "generative" / "export"
    broken = watch(run, run / "contrastive" / "export")
    broken.held.keys[1] = "gone"
    with pytest.raises(TrainingError, match="clip gone could be decoded and then no more"):
        broken.measure(0, export)


def test_nothing_starts_from_sounds_that_are_not_finite(run, tmp_path):
    broken = tmp_path / "run"
    broken.mkdir()
    for name in ("autoencoder", "contrastive", "features", "recipe.yaml"):
        (broken / name).symlink_to((run / name).resolve())
    generator = load_weights(MMDiT, MMDiTConfig, run / "generative" / "export")
    with torch.no_grad():
        for parameter in generator.top_parameters():
            parameter.fill_(torch.nan)
    save_weights(generator, generator.config, broken / "generative" / "export")
    with pytest.raises(TrainingError, match="generative/export: its sounds are not finite, so no preference round can start from it"):
        watch(broken, positions=range(6, 8)).measure(0, broken / "generative" / "export")
    assert not (broken / "preference").exists()
