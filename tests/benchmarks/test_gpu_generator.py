"""The GPU benchmark of the generator runs without a GPU too, at a size that says nothing about speed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_generator import rows, show_each

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_prints_both_tables():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_generator", "--tiny"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| 1 | eager |" in done.stdout and done.stdout.count("## ") == 2


def test_a_batch_without_room_loses_no_other_row(capsys):
    def measured(batch):
        if batch == 2:
            raise torch.OutOfMemoryError("no room")
        # The rows before are on the screen already.
        assert capsys.readouterr().out.endswith({1: "|---|---|---|---|---|\n", 4: "| 2 | eager | out of memory |  |  |\n"}[batch])
        return [0.25, 4.0, "1 %"]

    show_each("Title", ["batch", "blocks", "s", "clips/s", "MFU"], rows([1, 2, 4], False, measured))
    assert capsys.readouterr().out == "| 4 | eager | 0.25 | 4 | 1 % |\n"
