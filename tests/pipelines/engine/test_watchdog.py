"""Hangs are named with rank, step and stack, and rank 0 tells what failed on the others."""

import time

import pytest

from pipelines.engine.watchdog import HUNG
from tests.pipelines.engine.toy import finish_ranks, start_ranks

TRAIN = {"steps": 6, "batch_size": 8, "log_every": 1, "optimiser": {"lr": 0.01}}


@pytest.mark.slow
def test_a_hang_is_named(tmp_path):
    processes = start_ranks(2, tmp_path, {"toy": TRAIN | {"hang_seconds": 15, "trouble": {"hang": [1, 2]}}})
    codes, outputs = finish_ranks(processes)
    assert set(codes) <= {HUNG, 1} and codes[1] == HUNG, outputs
    stacks = (tmp_path / "toy" / "hang-rank-1.txt").read_text()
    assert stacks.startswith("rank 1 of 2: toy, step 3, inputs has taken more than 15 s")
    assert "_cause_trouble" in stacks and 'File "' in stacks
    assert "rank 1 of 2: toy, step 3, inputs has taken more than 15 s" in outputs[1]


@pytest.mark.slow
def test_rank_0_tells_what_failed_elsewhere(tmp_path):
    begin = time.monotonic()
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, {"toy": TRAIN | {"trouble": {"fail": [1, 2]}}}))
    assert codes[0] != 0 and codes[1] == 1
    assert "foleyscale: rank 1 of 2: toy, step 3, inputs: ValueError: clip-7 is not to my taste" in outputs[0]
    text = (tmp_path / "toy" / "errors" / "rank-1.txt").read_text()
    assert "Traceback (most recent call last)" in text and "_cause_trouble" in text
    assert time.monotonic() - begin < 90, "nobody waits for a collective's half hour"
