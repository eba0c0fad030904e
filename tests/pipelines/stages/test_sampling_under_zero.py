"""A validation samples while ZeRO-3 holds the weights in parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_it_answers_as_plain_torch_does(tmp_path):
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    script = [str(Path(__file__).with_name("sampling_steps.py")), str(tmp_path)]
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    worst = json.loads((tmp_path / "worst.json").read_text())
    assert len(worst) == 6 and max(worst.values()) < 1e-5, worst
