"""The table of a recipe's bars over seeds, and the runs that it is made from."""

import json
import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import learning
from data_prep.index import ShardSet
from pipelines.recipes import dump_recipe, load_recipe
from tests.fixtures.tiny_chain import STEPS, overrides

ENVIRONMENT = {"device": "CPU, 2 cores", "torch": "2.13", "deepspeed": "0.19"}


def made_run(out: Path, seed: int, recall: float, ratio: float) -> None:
    """A finished seed with two bars, a figure and its control."""
    folder = out / f"seed-{seed}" / "run"
    (folder / "autoencoder").mkdir(parents=True)
    bars = [{"name": "retrieval", "value": recall, "comparison": ">=", "bound": 30, "passed": recall >= 30},
            {"name": "L1", "value": ratio, "comparison": "<=", "bound": 0.15, "passed": ratio <= 0.15}]
    figures = [{"name": "retrieval R@1", "value": recall / 64, "standard_error": None},
               {"name": "untrained encoder: retrieval R@1", "value": 0.02, "standard_error": 0.01},
               {"name": "onset F1: silence", "value": ratio, "standard_error": 0.02}]
    (folder / "evaluation.json").write_text(json.dumps({"bars": bars, "figures": figures, "environment": ENVIRONMENT}))
    lines = [{"step": step, "loss": 1 / step, "seconds_per_step": 0.5} for step in (10, 20)]
    (folder / "autoencoder" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_table_and_plots(tmp_path):
    made_run(tmp_path, 0, 40.0, 0.14)
    made_run(tmp_path, 10, 20.0, 0.16)
    made_run(tmp_path, 2, 60.0, 0.12)
    text = learning.table(tmp_path)
    assert (tmp_path / "table.md").read_text() == text and text.startswith("Seeds 0, 2, 10; CPU, 2 cores")
    assert "| retrieval | ≥ 30 | 40 ± 12 | 40 | 60 | 20 | 2 of 3 |" in text  # 20 / sqrt(3)
    assert "| L1 | ≤ 0.15 | 0.14 ± 0.012 | 0.14 | 0.12 | 0.16 | 2 of 3 |" in text
    assert "| onset F1: silence | 0.14 ± 0.012 | 0.14 (0.02) | 0.12 (0.02) | 0.16 (0.02) |" in text
    assert "| autoencoder | 20 | 10 | 10 | 10 |" in text
    for name in ("bars", "controls", "curves"):
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


def test_a_seed_that_lacks_something_has_a_dash_in_its_place(tmp_path):
    made_run(tmp_path, 0, 40.0, 0.14)
    made_run(tmp_path, 1, 20.0, 0.0)
    path = tmp_path / "seed-0" / "run" / "evaluation.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"bars": found["bars"][1:], "figures": found["figures"][:2]}))
    (tmp_path / "seed-0" / "run" / "autoencoder" / "metrics.jsonl").unlink()
    text = learning.table(tmp_path)
    assert "| retrieval | ≥ 30 | 20 | – | 20 | 0 of 1 |" in text
    assert "| onset F1: silence | 0 | – | 0 (0.02) |" in text
    assert "| autoencoder | 20 | – | 10 |" in text


@pytest.mark.parametrize(("value", "comparison", "bound", "times"), [
    (40.0, ">=", 30, 4 / 3), (-0.1, ">=", 0.1, 0.0), (float("nan"), ">=", 30, 0.0), (0.2, ">=", 0.0, float("inf")),
    (0.1, "<=", 0.15, 1.5), (0.0, "<=", 0.15, float("inf")), (-1.0, "<=", 0.15, float("inf")), (float("nan"), "<=", 0.15, 0.0)])
def test_how_many_times_a_bar_is_met(value, comparison, bound, times):
    passed = value >= bound if comparison == ">=" else value <= bound
    assert learning.times_met({"value": value, "comparison": comparison, "bound": bound, "passed": passed}) == pytest.approx(times)


def test_what_a_log_axis_has_no_place_for_is_a_triangle_at_its_end(tmp_path):
    made_run(tmp_path, 0, -1.0, 0.0)
    made_run(tmp_path, 1, 60.0, 0.3)
    axes = Figure().subplots()
    learning._bars(axes, {seed: json.loads((tmp_path / f"seed-{seed}/run/evaluation.json").read_text()) for seed in (0, 1)})
    lines = {(line.get_color(), line.get_marker()): line.get_xdata() for line in axes.lines}
    colours = learning.COLOURS[:2]
    low, high = axes.get_xlim()
    assert (low, high) == pytest.approx((0.5 / 1.5, 2 * 1.5))
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert [list(lines[colours[0], marker]) for marker in "o<>"] == [[nan, nan], [nan, low], [high, nan]]
    assert list(lines[colours[1], "o"]) == pytest.approx([0.5, 2.0])


def test_an_evaluation_that_died_is_no_missed_bar(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(learning, "foleyscale", lambda *arguments, **options: None)
    with pytest.raises(RuntimeError, match="wrote no evaluation.json: see its error above"):
        learning.run(tmp_path, "rendered", [0], [f"data={tmp_path / 'data'}"])


def test_nothing_finished_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no finished seed below .*: run `python -m benchmarks.learning run"):
        learning.table(tmp_path)


def test_finished_is_a_run_evaluated_after_its_last_start_with_this_recipe(tmp_path):
    recipe, other = load_recipe("rendered"), load_recipe("rendered", ["evaluation.clips=64"])
    assert not learning.finished(tmp_path, recipe)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "evaluation.json").write_text("{}")
    assert learning.finished(tmp_path, recipe) and not learning.finished(tmp_path, other)
    os.utime(tmp_path / "recipe.yaml", (time.time() + 60,) * 2)
    assert not learning.finished(tmp_path, recipe)


def test_a_recipe_without_preparation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no section prepare: make shards"):
        learning.prepare(tmp_path, load_recipe("demo"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_seed_is_taken_all_the_way_and_then_skipped(tmp_path, monkeypatch, capsys):
    short = [each for each in overrides(tmp_path, "x") if not each.startswith(("out=", "name=", "data=", "preference."))]
    drawn = "prepare.arguments=[clips, --clips, 24, --heldout, 8, --size, 32, --seconds, 5.12]"
    arguments = ["run", str(tmp_path), "--seeds", "3", "--set", *short, drawn, "evaluation.probe_clips=8"]
    monkeypatch.setattr(sys, "argv", ["learning", *arguments])
    learning.main()
    run = tmp_path / "seed-3" / "run"
    assert ShardSet.open(run.parent / "shards").entry(0, 0).key.startswith("rendered_3_")
    before = (run / "evaluation.json").stat().st_mtime_ns
    learning.main()
    assert "seed 3: finished" in capsys.readouterr().out and (run / "evaluation.json").stat().st_mtime_ns == before
    text = learning.table(tmp_path)
    assert f"| generative | {STEPS} |" in text and "onset F1: silence" in text and "0 of 1" in text
