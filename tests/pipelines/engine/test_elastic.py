"""Stops at which the world size and the ZeRO stage change, on real processes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[3]
WHOLE = [[1, 0, 9]]


def trained(folder, plans):
    """Name of a plan -> (losses by step, exported state dict)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    script = str(Path(__file__).with_name("elastic_steps.py"))
    done = subprocess.run([sys.executable, "-W", "ignore", script, str(folder), json.dumps(plans)], env=environment, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name in plans:
        lines = [json.loads(line) for line in (folder / name / "losses.jsonl").read_text().splitlines()]
        assert [step for step, _ in lines] == list(range(9))
        found[name] = torch.tensor([loss for _, loss in lines]), torch.load(folder / name / "averaged.pt", weights_only=True)
    return found


def check(found, wanted, tolerance):
    """That losses and averaged weights agree; frozen ones and buffers to the bit."""
    assert float((found[0] - wanted[0]).abs().max()) < tolerance
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        assert float((found[1][name] - value).abs().max()) < (0 if "frozen" in name or name == "offset" else tolerance) + 1e-9 or (
            name in ("statistics.running_mean", "statistics.running_var")), name
    assert int(found[1]["statistics.num_batches_tracked"]) == 9 and found[1]["gain"].shape == ()


def test_two_processes_then_one_then_three(tmp_path):
    found = trained(tmp_path, {"whole": WHOLE, "elastic": [[2, 1, 3], [1, 0, 5], [3, 3, 9]]})
    check(found["elastic"], found["whole"], 1e-5)


@pytest.mark.slow
def test_every_change_of_stage_and_size(tmp_path):
    plans = {f"{a} to {b}": [[2, a, 4], [1 if (a + b) % 2 else 3, b, 9]] for a, b in itertools.product(range(4), repeat=2)}
    found = trained(tmp_path, {"whole": WHOLE, **plans})
    for name in plans:
        check(found[name], found["whole"], 1e-5)


@pytest.mark.slow
def test_bf16_keeps_its_fp32_masters(tmp_path):
    """At the same world size and stage nothing may differ; the forward pass of another rounds in another order."""
    plans = {f"bf16 {stage}{name}": plan for stage in range(4) for name, plan in {
        "": [[2, stage, 9]], " stopped": [[2, stage, 4], [2, stage, 9]], " elastic": [[2, stage, 4], [1, (stage + 1) % 4, 9]]}.items()}
    found = trained(tmp_path, plans)
    for stage in range(4):
        check(found[f"bf16 {stage} stopped"], found[f"bf16 {stage}"], 1e-9)
        check(found[f"bf16 {stage} elastic"], found[f"bf16 {stage}"], 0.1)
