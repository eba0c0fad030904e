"""The table of early generators and their preference rounds, and the runs that it is made from."""

import json

import pytest

from benchmarks import rounds


def made_rounds(out, seed, kept, reward, *lines):
    """A seed whose kept round changed the reward by (value, error)."""
    run = out / f"seed-{seed}" / "early"
    (run / "preference").mkdir(parents=True)
    (run / "preference" / "best.json").write_text(json.dumps({"round": kept}))
    (run / "preference" / "rounds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes = {"reward": reward, "onset F1": (-0.01, 0.01), "flow loss": (-0.02, 0.01)} if kept else {}
    figures = [{"name": "flow loss, right video", "value": 0.5, "standard_error": None}]
    figures += [{"name": f"{name}, after minus before preference", "value": value, "standard_error": error}
                for name, (value, error) in changes.items()]  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps({"figures": figures}))


def line(number, reward):
    return {"round": number, "signs": {"reward": {"value": reward, "error": 0.01}, "accuracy": {"value": 0.75, "error": None}}}


def test_the_kept_round_is_judged_on_clips_that_did_not_choose_it(tmp_path):
    made_rounds(tmp_path, 0, 2, (0.04, 0.01), line(0, 0.4), line(1, None), line(2, 0.44))
    made_rounds(tmp_path, 1, 0, None, line(0, 0.5))
    text = rounds.table(tmp_path, "early")
    assert (tmp_path / "early.md").read_text() == text
    assert "| seed-0 | round 2 | +0.0400 ± 0.0100 | -0.0100 ± 0.0100 | -0.0200 ± 0.0100 | -4.0% | none |" in text
    assert "| seed-1 | the start | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 | +0.0000 ± 0.0000 | +0.0% | reward |" in text
    assert "| mean |  | 0.02 ± 0.02 | -0.005 ± 0.005 | -0.01 ± 0.01 |  |  |" in text
    assert "| seed-0 | 1 | – | – | – | – | 0.7500 |" in text and "| seed-0 | 2 | 0.4400 ± 0.0100 | – | – | – | 0.7500 |" in text


@pytest.mark.parametrize(("reward", "onsets", "rise", "missed"), [
    ((0.03, 0.01), (-0.02, 0.01), 0.05, []), ((0.029, 0.01), (0.0, 0.01), 0.0, ["reward"]), ((0.0, 0.0), (0.0, 0.0), 0.0, ["reward"]),
    ((0.03, 0.01), (-0.021, 0.01), 0.051, ["onset F1", "flow loss"]), ((float("nan"), 0.01), (0.0, 0.01), 0.0, ["reward"])])
def test_bars(reward, onsets, rise, missed):
    assert rounds.missed({"reward": reward, "onset F1": onsets}, rise) == missed


def test_without_seeds_it_says_what_to_run(tmp_path):
    for command in (lambda: rounds.table(tmp_path, "early"), lambda: rounds.run(tmp_path, "early", 4, 1, [])):
        with pytest.raises(ValueError, match="give `python -m benchmarks.learning run .*` first, then the same of benchmarks.rounds"):
            command()
