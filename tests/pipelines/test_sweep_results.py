"""sweep.csv and sweep.html from signs that were made up."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest

from pipelines.config.preference import WatchConfig
from pipelines.config.sweep import SweepConfig
from pipelines.plots import Point
from pipelines.rounds_page import read_points
from pipelines.signs import Signs, best_round, write_rounds
from pipelines.sweep import load_sweep
from pipelines.sweep_results import Row, differences, figures, over_seeds, read_rows, whole, write_results


def leave_signs(run, rewards, seed=0, first=4, **settings):
    """What rounds with these mean rewards leave in a run's folder; watched from clip `first` on, with changed settings."""
    random, signs = np.random.default_rng(seed), []
    for number, reward in enumerate(rewards):
        means = {"reward": reward, "onset_f1": 0.7, "flow_loss": 0.3}
        clips = {name: value + 0.01 * random.normal(size=8) for name, value in means.items()}
        latent = random.normal(size=(8, 3))
        clips |= {"reward_true": np.full(8, 0.9), "latent_mean": latent, "latent_square": latent**2 + 1, "latent_true": latent + 10}
        signs.append(Signs(round=number, positions=np.arange(first, first + 8), clips=clips, figures={"retrieval": 0.25 * number}))
    (run / "preference").mkdir(parents=True)
    write_rounds(run / "preference", signs)
    for each in signs:
        folder = run / "preference" / (f"round-{each.round}" if each.round else "start")
        each.save(folder, {"data": "abc", "score": "mean"} | settings)
    (run / "preference" / "best.json").write_text(json.dumps(dataclasses.asdict(best_round(signs, WatchConfig()))))


@pytest.fixture
def sweep(tmp_path):
    """A sweep of two variants and two seeds of which one run has not begun, and its runs' folders."""
    config = SweepConfig(rounds=2, seeds=(0, 1), variants={"base": {}, "dpo": {"objective": "dpo"}})
    runs = {(variant, seed): tmp_path / "mine" / "sweep" / f"{variant}-{seed}" for seed in config.seeds for variant in config.variants}
    leave_signs(runs["base", 0], [0.3, 0.4, 0.5])
    leave_signs(runs["base", 1], [0.3, 0.6, 0.7], seed=1)
    leave_signs(runs["dpo", 0], [0.3, 0.2], seed=2)
    return tmp_path / "mine" / "sweep", config, runs


def test_the_table_has_every_sign_of_every_round_once(sweep):
    folder, config, runs = sweep
    write_results(folder, config, runs)
    lines = list(csv.DictReader((folder / "sweep.csv").open()))
    places = [(line["variant"], int(line["seed"]), int(line["round"]), line["sign"]) for line in lines]
    assert len(places) == len(set(places))
    for key, run in runs.items():
        known = {(*key, point.round, name) for name, points in read_points(run / "preference").items() for point in points}
        assert known == {place for place in places if place[:2] == key}
    assert {place[:3] for place in places if place[3] == "reward"} == {("base", 0, 0), ("base", 0, 1), ("base", 0, 2), ("base", 1, 0),
                                                                      ("base", 1, 1), ("base", 1, 2), ("dpo", 0, 0), ("dpo", 0, 1)}
    reward = next(line for line in lines if line["sign"] == "reward" and line["seed"] == "1" and line["round"] == "2")
    assert float(reward["value"]) == pytest.approx(0.7, abs=0.02) and 0 < float(reward["error"]) < 0.01
    assert next(line for line in lines if line["sign"] == "retrieval")["error"] == ""


def clips_of(run, number, sign):
    folder = run / "preference" / (f"round-{number}" if number else "start")
    return np.array(json.loads((folder / "signs.json").read_text())["per_clip"][sign], dtype=np.float64)


def test_differences_are_paired_clip_by_clip_with_the_first_variant(sweep):
    _, _, runs = sweep
    rows = read_rows(runs, "base")
    known = {(row.variant, row.seed, row.round, row.sign): row for row in rows if row.difference is not None}
    assert set(known) == {("dpo", 0, number, sign) for number in (0, 1) for sign in ("reward", "onset_f1", "flow_loss")}
    apart = clips_of(runs["dpo", 0], 1, "reward") - clips_of(runs["base", 0], 1, "reward")
    row = known["dpo", 0, 1, "reward"]
    assert row.difference == pytest.approx(apart.mean()) and row.difference_error == pytest.approx(apart.std(ddof=1) / 8**0.5)


def test_only_what_has_one_scale_and_the_same_clips_is_compared(sweep, tmp_path):
    _, _, runs = sweep
    leave_signs(tmp_path / "score", [0.3], score="min")
    leave_signs(tmp_path / "others", [0.3], data="def")
    leave_signs(tmp_path / "later", [0.3], first=10)
    leave_signs(tmp_path / "after", [0.3], first=11)
    leave_signs(tmp_path / "broken", [np.nan])
    assert set(differences(tmp_path / "score", runs["base", 0], 0)) == {"onset_f1", "flow_loss"}
    for name in ("others", "after", "none"):
        assert differences(tmp_path / name, runs["base", 0], 0) == {}
    apart = clips_of(tmp_path / "later", 0, "onset_f1")[:2] - clips_of(runs["base", 0], 0, "onset_f1")[6:]
    assert differences(tmp_path / "later", runs["base", 0], 0)["onset_f1"].difference == pytest.approx(apart.mean())
    assert set(differences(tmp_path / "broken", runs["base", 0], 0)) == {"onset_f1", "flow_loss"}


def test_a_curve_takes_only_the_seeds_that_have_all_rounds(sweep):
    folder, config, runs = sweep
    rows = read_rows(runs, "base")
    assert whole(rows, 2) == {("base", 0), ("base", 1)} and whole(rows, 1) == {*whole(rows, 2), ("dpo", 0)}
    gap = [row for row in rows if (row.seed, row.round, row.sign) != (1, 1, "flow_loss")]
    assert whole(gap, 2) == {("base", 0)}
    write_results(folder, dataclasses.replace(config, rounds=1), runs)
    html = (folder / "sweep.html").read_text()
    assert html.count("base, 2 seeds<") == 2 * 5 and html.count("dpo, 1 seed: bars over clips<") == 5
    assert "rounds are still to come or gave no finite sound: dpo with seed 1." in html
    assert not re.search(r"<text[^>]*>2</text>", html), "rounds of a longer sweep are not drawn"


def test_rewards_by_scores_of_their_own_are_told(sweep):
    folder, _, runs = sweep
    config = SweepConfig(rounds=1, variants={"base": {}, "dpo": {"score": "min", "objective": "dpo"}})
    write_results(folder, config, runs)
    assert (folder / "sweep.html").read_text().count("by its own score: compare their courses") == 1


def test_a_name_that_legends_would_leave_out_is_refused():
    with pytest.raises(ValueError, match="'_x' names a folder: .* with a letter or digit first"):
        SweepConfig(variants={"base": {}, "_x": {}})


def test_means_over_seeds():
    rows = [Row("base", seed, number, "reward", value, 0.5) for seed, number, value in
            [(0, 0, 0.3), (0, 1, 0.4), (1, 0, 0.3), (1, 1, 0.6), (0, 2, 0.5)]]
    assert over_seeds(rows) == {"base": {"reward": [Point(0, pytest.approx(0.3), pytest.approx(0.0, abs=1e-9)),
                                                    Point(1, pytest.approx(0.5), pytest.approx(0.1)), Point(2, 0.5, 0.5)]}}


def test_the_papers_figures():
    config = load_sweep("preference", ["variants.other_reward.reward=export"])
    assert figures(config) == {
        "base (figure 5)": ["base"], "objective (figure 7)": ["base", "dpo", "anchor"], "tuning (figure 8)": ["base", "full"],
        "winner (figure D1)": ["base", "best"], "score": ["base", "mean"], "losers": ["base", "distorted", "mixed"],
        "reward (figure 6)": ["base", "other_reward"]}
    config = SweepConfig(variants={"paper": {"tuning": "top"}, "both": {"tuning": "full", "objective": "dpo"}, "again": {"tuning": "top"}})
    assert figures(config) == {"paper (figure 5)": ["paper"], "objective, tuning (figure 7, figure 8)": ["paper", "both"],
                               "the same": ["paper", "again"]}


def test_a_panel_per_sign_and_figure(sweep):
    folder, config, runs = sweep
    write_results(folder, config, runs)
    html = (folder / "sweep.html").read_text()
    assert [re.sub(r"<.*?>", "", title) for title in re.findall(r"<h2>.*?</h2>", html)] == [
        "About", "base (figure 5)", "objective (figure 7)", "Rounds that were kept"]
    panels = re.findall(r"<h4>(.*?)</h4>", html)
    assert len(panels) == 2 * 5 == html.count("<svg") and panels[:5] == panels[5:]
    assert [panel.partition(" ")[0] for panel in panels[:5]] == ["reward,", "onset", "held-out", "retrieval", "distance"]
    assert "distance for its FD" in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert "round 2 of 2 is kept" in html and "the start is kept" in html and html.count("not complete") == 1
    assert html.count("Not drawn") == 1 and "no finite sound: dpo with seed 0, 1." in html and "://" not in html


def test_a_sweep_that_has_only_begun(sweep, tmp_path):
    folder, config, runs = sweep
    runs = {key: run for key, run in runs.items() if key[0] == "base"} | {("dpo", 0): tmp_path / "none"}
    write_results(folder, config, runs)
    assert "dpo with seed 0, 1." in (folder / "sweep.html").read_text()
    assert read_rows({("dpo", 0): tmp_path / "none"}, "base") == []


def test_a_sound_that_was_not_finite_leaves_a_gap(tmp_path):
    path = tmp_path / "preference" / "rounds.jsonl"
    path.parent.mkdir()
    path.write_text('{"round": 0, "clips": 8, "signs": {"reward": {"value": 0.5, "error": null}}}\n'
                    '{"round": 1, "clips": 8, "signs": {"reward": {"value": null, "error": null}}}\n')
    assert read_points(path.parent) == {"reward": [Point(0, 0.5)]}
