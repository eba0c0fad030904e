"""An evaluation says which generator it measured, and on which clips."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.encoders.sf_cavp import PRESETS, SFCAVP
from pipelines.config import BarsConfig
from pipelines.evaluate import _flow, _measured, _preference, _shares, _sounded, _timing, table
from pipelines.heldout import Shares
from pipelines.recipes import load_recipe
from tests.fixtures.tiny_chain import overrides

MODEL = SimpleNamespace(vocoder=SimpleNamespace(name="griffin_lim"))


def test_the_round_and_the_clips_are_named(tmp_path):
    for stage in ("generative", "preference/round-1", "preference/round-2"):
        (tmp_path / stage / "export").mkdir(parents=True)
    shares = Shares(256, range(192), range(192, 256))
    assert _measured(tmp_path, shares, range(190), MODEL) == {
        "generator": "generative", "vocoder": "griffin_lim",
        "clips": "190 of the first 192 of 256 held-out clips; the last 64 chose the round"}
    best = {"round": 1, "reason": "round 1 of 2 is kept by held-out reward (0.4 ± 0.1)", "warnings": ["in round 2 onset F1 fell"]}
    (tmp_path / "preference" / "best.json").write_text(json.dumps(best))
    found = _measured(tmp_path, shares, range(192), MODEL)
    assert found["generator"] == "preference/round-1"
    assert found["preference rounds"] == "round 1 of 2 is kept by held-out reward (0.4 ± 0.1); in round 2 onset F1 fell"
    figure = {"name": "reward", "value": 0.5, "standard_error": None, "note": ""}
    (tmp_path / "evaluation.json").write_text(json.dumps({"figures": [figure], "environment": {"device": "CPU", **found}}))
    assert [line.partition(":")[0] for line in table(tmp_path).splitlines()][:4] == ["generator", "vocoder", "preference rounds", "clips"]


@pytest.mark.parametrize("changed", ["preference.rounds=0", "evaluation.clips=8"])
def test_what_chose_the_round_is_not_evaluated_whatever_the_recipe_says_by_now(tiny, tmp_path, changed):
    recipe = load_recipe("demo", [*overrides(tmp_path, tiny.shards), "evaluation.clips=8", changed])
    best = tmp_path / "preference" / "best.json"
    best.parent.mkdir()
    assert len(_shares(tmp_path, recipe).evaluation) > 4
    best.write_text(json.dumps({"round": 1, "watched": [4, 8]}))
    assert _shares(tmp_path, recipe) == Shares(8, range(4), range(4, 8))
    best.write_text(json.dumps({"round": 1, "watched": None}))
    assert _shares(tmp_path, recipe) == Shares.of(recipe), "nothing was measured: the last round is kept"


def test_a_shift_may_cost_more_than_one_segment():
    """With a hop of 0.16 s, sound that begins 0.3 s later has two segments less."""
    torch.manual_seed(0)
    video, reward = torch.randn(5, 24, 32), SFCAVP(PRESETS["tiny"])
    judged = {"video": video, "audio": video + 0.1 * torch.randn(5, 24, 32), "shifted": video[:, 2:]}
    figures, _ = _timing(load_recipe("demo"), SimpleNamespace(reward=reward), SimpleNamespace(judged=judged))
    assert figures[1].value == 1 and "of 22 segments, 5 clips" in figures[1].note


def test_sounds_that_are_not_finite_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr("pipelines.evaluate.sound_heldout", lambda *_: SimpleNamespace(onset_f1=np.array([0.5, np.nan, np.nan])))
    with pytest.raises(ValueError, match="2 of 3 sounds that it generates are not finite: train it on"):
        _sounded(None, None, range(3), None, tmp_path)


def test_without_rounds_all_clips_are_for_the_evaluation(tmp_path):
    (tmp_path / "generative" / "export").mkdir(parents=True)
    found = _measured(tmp_path, Shares(8, range(8), range(8, 8)), range(8), MODEL)
    assert found == {"generator": "generative", "vocoder": "griffin_lim", "clips": "8 of the first 8 of 8 held-out clips"}


@pytest.mark.parametrize(("right", "met"), [(0.9, True), (0.91, False)])
def test_the_flow_loss_must_be_a_tenth_below_that_of_shuffled_videos(right, met):
    recipe = SimpleNamespace(evaluation=SimpleNamespace(bars=BarsConfig(flow_gap=0.1 - 1e-9)))
    _, (gap, _) = _flow(recipe, np.full(4, right), np.ones(4))
    assert gap.value == pytest.approx(1 - right) and gap.passed == met


def test_what_the_rounds_changed():
    before, after = (SimpleNamespace(reward=np.array(reward), onset_f1=np.full(2, 0.5)) for reward in ([0.1, 0.2], [0.2, 0.4]))
    figures = _preference(before, after, np.array([0.5, 0.7]), np.array([0.4, 0.6]))
    changes = {figure.name.partition(",")[0]: figure.value for figure in figures}
    assert changes == pytest.approx({"reward": 0.15, "onset F1": 0, "flow loss": -0.1})
