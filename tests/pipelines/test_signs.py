"""Which round is kept, on tables written out by hand, and what the signs say of a round."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config.preference import WatchConfig
from pipelines.signs import Signs, best_round, distance, drift, shared, told, write_rounds

NOISE = np.tile([0.01, -0.01], 8)
"""Differences between clips of which the mean of 16 has a standard error of 0.0026."""


def signs(number, reward=0.4, onset_f1=0.7, flow_loss=0.3, true=0.9, **more):
    """A round whose clips differ from those of round 0 by a mean and by noise of their own."""
    random, clips = np.random.default_rng(number), np.linspace(-0.1, 0.1, 16)
    rows = {name: value + clips + random.permutation(NOISE) * (number > 0)
            for name, value in {"reward": reward, "onset_f1": onset_f1, "flow_loss": flow_loss}.items()}
    latent = np.random.default_rng(7).normal(size=(16, 4))
    found = {**rows, "reward_true": np.full(16, true), "latent_mean": latent, "latent_square": latent**2 + 1,
             "latent_true": latent + 1} | more
    figures = {"retrieval": 0.25} | ({"accuracy": 0.9} if number else {})
    return Signs(round=number, positions=np.arange(240, 256), clips=found, figures=figures)


def kept(*rounds, **watch):
    return best_round([signs(0), *(signs(number, **values) for number, values in enumerate(rounds, start=1))], WatchConfig(**watch))


def test_the_largest_reward_is_kept():
    best = kept({"reward": 0.45}, {"reward": 0.5}, {"reward": 0.5 - 0.02})
    assert (best.round, best.measure, best.value) == (2, "reward", pytest.approx(0.5))
    assert best.reason == "round 2 of 3 is kept by held-out reward (0.5 ± 0.015)"
    assert len(best.warnings) == 1 and best.warnings[0].startswith("in round 3 held-out reward is worse than that of round 2 (-")


def test_a_rising_reward_with_falling_onsets_is_not():
    best = kept({"reward": 0.45}, {"reward": 0.5, "onset_f1": 0.6}, {"reward": 0.6, "onset_f1": 0.5})
    assert best.round == 1
    assert [warning.partition(" (")[0] for warning in best.warnings] == ["from round 2 on onset F1 is below the start's"]
    assert kept({"reward": 0.5, "onset_f1": 0.69}, max_onset_sigmas=100).round == 1


def test_a_rising_flow_loss_is_not():
    best = kept({"reward": 0.45, "flow_loss": 0.31}, {"reward": 0.5, "flow_loss": 0.33})
    assert best.round == 1
    assert best.line().endswith("; in round 2 the held-out flow loss is above the start's (+10.0%)")
    assert kept({"reward": 0.45, "flow_loss": 0.31}, {"reward": 0.5, "flow_loss": 0.33}, max_flow_rise=0.11).round == 2


def test_rounds_that_all_get_worse_leave_the_start():
    best = kept({"reward": 0.35}, {"reward": 0.3})
    assert best.round == 0
    assert best.reason == "the start is kept by held-out reward (0.4 ± 0.016), as no round is better by a standard error"
    assert best.warnings[0].startswith("from round 1 on held-out reward is worse than that of the start (-")
    assert kept({"reward": 0.5, "onset_f1": 0.5}).reason.endswith("as no round passes")
    assert kept({"reward": 0.4}, {"reward": 0.5, "onset_f1": 0.5}).reason.endswith("as no round that passes is better by a standard error")


def test_a_tie_keeps_the_earlier_round():
    assert kept({"reward": 0.45}, {"reward": 0.451}).round == 1
    assert best_round([signs(0), signs(0)], WatchConfig()).round == 0


def test_small_steps_add_up():
    assert kept({"reward": 0.402}, {"reward": 0.404}).round == 2, "neither beats the one before by a standard error; the second the start"


def test_other_measures():
    assert kept({"onset_f1": 0.8}, {"reward": 0.9}, keep="onset_f1").round == 1
    assert kept({"flow_loss": 0.28}, {"flow_loss": 0.31}, keep="flow_loss").round == 1
    last = kept({"reward": 0.5}, {"reward": 0.3, "onset_f1": 0.2}, keep="last")
    assert (last.round, last.measure) == (2, "last") and last.warnings[0].startswith("in round 2 onset F1 is below")


def test_sounds_that_are_not_finite():
    broken = signs(2, reward=np.nan)
    best = best_round([signs(0), signs(1, reward=0.5), broken], WatchConfig())
    assert (best.round, best.warnings) == (1, ("in round 2 sounds are not finite",))
    assert np.isnan(drift(broken, signs(0))["drift"]) and np.isnan(distance(broken)) and "nan" in told(broken, signs(0))


def test_a_reward_above_the_truth_is_told():
    best = kept({"reward": 0.5, "true": 0.45}, {"reward": 0.6, "true": 0.45})
    assert best.round == 2 and best.warnings[0].startswith("from round 1 on generated sounds are rewarded above the true ones (+")


@given(st.lists(st.tuples(*[st.floats(0.2, 0.8)] * 3), min_size=1, max_size=5), st.sampled_from(["reward", "onset_f1", "flow_loss"]))
def test_what_is_kept_never_breaks_the_bounds(rounds, keep):
    """Nor is it worse than the start."""
    table = [signs(0), *(signs(n, *values) for n, values in enumerate(rounds, start=1))]
    best = best_round(table, WatchConfig(keep=keep))
    chosen, start = table[best.round].clips, table[0].clips
    assert chosen["flow_loss"].mean() <= 1.05 * start["flow_loss"].mean() + 1e-12
    assert chosen["onset_f1"].mean() >= start["onset_f1"].mean() - 0.02
    assert (-1 if keep == "flow_loss" else 1) * (chosen[keep].mean() - start[keep].mean()) >= 0


def without(signs, *rows):
    """A round in which the clips of these rows could not be measured."""
    kept = np.delete(np.arange(16), rows)
    return dataclasses.replace(signs, positions=signs.positions[kept], clips={name: values[kept] for name, values in signs.clips.items()})


def test_rounds_are_paired_on_the_clips_that_both_have(tmp_path):
    start, first = without(signs(0), 3), without(signs(1, reward=0.5), 0, 5)
    common = [241, 242, 244, *range(246, 256)]
    for number, each in enumerate(shared([start, first])):
        assert each.positions.tolist() == common
        assert np.array_equal(each.clips["reward"], signs(number, reward=0.4 + number / 10).clips["reward"][np.array(common) - 240])
    best = best_round([start, first, signs(2)], WatchConfig())
    assert (best.round, best.watched) == (1, (240, 256))
    write_rounds(tmp_path, [start, first])
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["clips"] for line in lines] == [13, 13]
    assert lines[1]["signs"]["reward_since_start"]["value"] == pytest.approx(0.1, abs=0.003)
    assert "held-out reward 0.5" in told(first, start)
    with pytest.raises(ValueError, match="on clips of which 1 are the same: delete signs.json of each round"):
        best_round([without(signs(0), *range(8)), without(signs(1), *range(9, 16))], WatchConfig())


def test_drift():
    start = signs(0)
    assert drift(signs(3), start) == {"drift": pytest.approx(0, abs=1e-9), "spread": 1.0}
    moved = start.clips["latent_mean"] + [0, 0, 3, 0]
    assert drift(signs(1, latent_mean=moved, latent_square=moved**2 + 1), start) == {"drift": pytest.approx(9), "spread": pytest.approx(1)}
    variance = start.clips["latent_square"].mean(0) - start.clips["latent_mean"].mean(0) ** 2
    wider = start.clips["latent_square"] + variance * [0, 3, 0, 0.5]
    assert drift(signs(1, latent_square=wider), start)["spread"] == pytest.approx(2)


def test_distance_from_the_truth(tmp_path):
    true = signs(0).clips["latent_true"]
    assert distance(signs(1, latent_mean=true)) == pytest.approx(0, abs=1e-9)
    shift = np.array([0, 0.5, -2, 1])
    assert distance(signs(1, latent_mean=true + shift)) == pytest.approx(shift @ shift)
    assert distance(signs(1, latent_mean=true[::-1])) == pytest.approx(0, abs=1e-9), "of all clips, not clip by clip"
    wider = true.mean(0) + 2 * (true - true.mean(0))
    assert distance(signs(1, latent_mean=wider)) == pytest.approx(true.var(axis=0, ddof=1).sum())
    write_rounds(tmp_path, [signs(0), signs(1, latent_mean=true)])
    start, first = (json.loads(line)["signs"]["distance"] for line in (tmp_path / "rounds.jsonl").read_text().splitlines())
    assert start == {"value": pytest.approx(4), "error": None} and first["value"] == pytest.approx(0, abs=1e-9)


def test_signs_are_kept_and_read_again(tmp_path):
    scoring = {"scoring": np.full(16, 0.3), "scoring_true": np.full(16, 0.2)}
    table = [signs(0, **scoring), signs(1, reward=0.5, **scoring), signs(2, reward=np.nan, **scoring)]
    for each in table:
        each.save(tmp_path / str(each.round), {"generator": "abc", "clips": (0, 16)})
        again = Signs.load(tmp_path / str(each.round), {"generator": "abc", "clips": [0, 16]})
        assert again.figures == each.figures and again.clips.keys() == each.clips.keys()
        assert again.positions.tolist() == list(range(240, 256))
        assert all(np.array_equal(again.clips[name], values, equal_nan=True) for name, values in each.clips.items())
        assert Signs.load(tmp_path / str(each.round), {"generator": "other", "clips": [0, 16]}) is None
    assert Signs.load(tmp_path / "3", {}) is None
    write_rounds(tmp_path, table)
    start, first, second = (json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines())
    assert start["round"] == 0 and "reward_since_start" not in start["signs"]
    assert first["signs"]["reward_since_start"] == {"value": pytest.approx(0.1), "error": pytest.approx(0.01 / np.sqrt(15))}
    assert first["signs"]["flow_rise_since_start"]["value"] == pytest.approx(0, abs=1e-9)
    assert first["signs"]["accuracy"]["value"] == 0.9
    assert second["signs"]["reward"] == {"value": None, "error": None}
    assert second["signs"]["scoring_above_true"]["value"] == pytest.approx(0.1)
