"""The table of early generators and their preference rounds, and the runs that it is made from."""

import json

import pytest

from benchmarks import rounds


def line(number, reward, *, error=0.001, onsets=0.0, flow=0.0):
    """A line of rounds.jsonl."""
    signs = {"reward": (0.4 + reward, 0.01), "onset_f1": (0.5 + onsets, 0.02), "flow_loss": (0.9, 0.01)}
    if number:
        signs |= {"reward_since_start": (reward, error), "onset_f1_since_start": (onsets, 0.01), "flow_rise_since_start": (flow, None),
                  "accuracy": (0.75, None)}
    return {"round": number, "clips": 64, "signs": {name: {"value": value, "error": error} for name, (value, error) in signs.items()}}


def made_rounds(out, seed, best, *lines):
    folder = out / f"seed-{seed}" / "early" / "preference"
    folder.mkdir(parents=True)
    (folder / "best.json").write_text(json.dumps({"round": best}))
    (folder / "rounds.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_a_line_per_round_says_which_bars_it_misses(tmp_path):
    made_rounds(tmp_path, 0, 1, line(0, 0.0), line(1, 0.0031), line(2, 0.0029, onsets=-0.021, flow=0.051))
    made_rounds(tmp_path, 1, 0, line(0, 0.0), line(1, -0.004, error=0.0))
    text = rounds.table(tmp_path)
    assert (tmp_path / "rounds.md").read_text() == text
    assert "| seed-0 | 0 | 0.4000 |  |  | 0.500 | 0.9000 |  |  |" in text
    assert "| seed-0 | 1, kept | 0.4031 | +0.0031 ± 0.0010 | +3.1 | +0.000 ± 0.010 | +0.00% | 0.75 | none |" in text
    assert "| seed-0 | 2 | 0.4029 | +0.0029 ± 0.0010 | +2.9 | -0.021 ± 0.010 | +5.10% | 0.75 | reward, onset F1, flow loss |" in text
    assert "| seed-1 | 0, kept |" in text and "| seed-1 | 1 | 0.3960 | -0.0040 ± 0.0000 |  |" in text


def test_without_seeds_it_says_what_to_run(tmp_path):
    for command in (lambda: rounds.table(tmp_path), lambda: rounds.run(tmp_path, 4, 1, [])):
        with pytest.raises(ValueError, match="give `python -m benchmarks.learning run .*` first, then the same of benchmarks.rounds"):
            command()
