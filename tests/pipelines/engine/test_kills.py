"""kill -9 of one rank or all, at any moment and also during a save: a run that is started again ends as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[3]


def losses(run):
    """The loss of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def keys(run):
    """Position in the stream -> key of the clip there, over all ranks and lives, which must not differ in it."""
    found = {}
    for path in run.glob("keys-*.jsonl"):
        for line in path.read_text().splitlines():
            for position, key in json.loads(line):
                assert found.setdefault(position, key) == key
    return found


def check_kills(folder, kills, seconds):
    """Kill that often, and hold all runs against those that were left alone; how many of the kills fell in a save."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    script = str(Path(__file__).with_name("lives.py"))
    command = [sys.executable, "-W", "ignore", script, str(folder), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((folder / "kills.json").read_text())
    assert told["kills"] == kills
    check_runs(folder)
    return told["in_save"]


def check_runs(folder):
    """That all runs in `folder` ended as the ones that nobody touched, bit for bit where these had as many processes and their stage."""
    for run in folder.glob("hunted-*"):
        size, stage, _ = run.name.split("-")[1:]
        alike = folder / f"whole-{size}-{stage}"
        whole, tolerance = (alike, 0) if alike.exists() else (folder / "whole-1-2", 1e-5)
        assert keys(run) == keys(whole), run.name
        found, wanted = losses(run), losses(whole)
        assert found.keys() == wanted.keys() == set(range(1, len(wanted) + 1))
        # With another number of processes the same sums are taken in another order.
        assert all(abs(found[step] - wanted[step]) <= tolerance for step in wanted), run.name
        one, other = (load_file(path / "export" / "weights.safetensors") for path in (run, whole))
        assert all(float((one[name] - other[name]).abs().max()) <= tolerance for name in other), run.name
        left = sorted(path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".unfinished"))
        assert left and all(name.startswith("step-") for name in left), left


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_kills_change_nothing(tmp_path):
    assert check_kills(tmp_path, 100, 1100) >= 20


@pytest.mark.slow
def test_three_kills(tmp_path):
    check_kills(tmp_path, 3, 250)
