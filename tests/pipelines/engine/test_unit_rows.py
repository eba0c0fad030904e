"""Rows back to unit norm, whatever shares of them a rank holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine.elastic import Piece
from pipelines.engine.unit_rows import _blocks

REPOSITORY = Path(__file__).resolve().parents[3]


@given(st.integers(1, 7), st.integers(1, 6), st.data())
def test_blocks_are_the_piece_row_by_row(width, rows, data):
    values = torch.arange(rows * width)
    start = data.draw(st.integers(0, len(values) - 1))
    size = data.draw(st.integers(1, len(values) - start))
    found = list(_blocks(Piece("w", start, 0, size), values[start:start + size], width))
    assert torch.equal(torch.cat([block.flatten() for _, block in found]), values[start:start + size])
    for row, block in found:
        assert (block // width == row + torch.arange(len(block))[:, None]).all()


@pytest.mark.slow
def test_steps_equal_plain_torch(tmp_path):
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    script = [str(Path(__file__).with_name("unit_row_steps.py")), str(tmp_path)]
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 6
    for case, values in found.items():
        assert values["norm"] < 1e-6, case
        assert values["difference"] < (0.2 if "bf16" in case else 1e-6), case
        assert values["stale"] < (0.01 if "bf16" in case else 1e-6), case
