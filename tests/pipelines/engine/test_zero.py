"""ZeRO on two real processes is plain torch on the full batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.config import TrainConfig
from pipelines.engine.world import World
from pipelines.engine.zero import deepspeed_config

REPOSITORY = Path(__file__).resolve().parents[3]


def test_steps_equal_plain_torch(tmp_path):
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    script = [str(Path(__file__).with_name("zero_steps.py")), str(tmp_path)]
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    worst = json.loads((tmp_path / "worst.json").read_text())
    assert len(worst) == 16
    for case, (weights, averaged) in worst.items():
        assert weights < 1e-6, (case, weights)
        assert averaged < 1e-6, (case, averaged)


def test_nothing_is_left_to_deepspeeds_defaults():
    config = deepspeed_config(TrainConfig(batch_size=24, accumulation=2), World(0, 3, torch.device("cpu")))
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_clipping"] == 1.0
    assert {"zero_optimization", "bf16", "fp16", "gradient_accumulation_steps", "steps_per_print"} <= config.keys()


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size 10 must divide by processes x accumulation = 3 x 2"):
        deepspeed_config(TrainConfig(batch_size=10, accumulation=2), World(0, 3, torch.device("cpu")))
