"""Rows back to unit norm, whatever shares of them a rank holds."""


import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.engine.elastic import Piece
from pipelines.engine.unit_rows import _rows
from tests.fixtures.two_ranks import run_on_two_ranks


@given(st.integers(1, 7), st.integers(1, 6), st.data())
def test_rows_are_the_piece_row_by_row(width, rows, data):
    values = torch.arange(rows * width)
    start = data.draw(st.integers(0, len(values) - 1))
    size = data.draw(st.integers(1, len(values) - start))
    found = list(_rows(Piece("w", start, 0, size), values[start:start + size], width))
    assert torch.equal(torch.cat([block.flatten() for _, block in found]), values[start:start + size])
    for row, block in found:
        assert (block // width == row + torch.arange(len(block))[:, None]).all()


@pytest.mark.slow
def test_steps_equal_plain_torch(tmp_path):
    found = run_on_two_ranks(__file__, "unit_row_steps.py", tmp_path, "found.json")
    assert len(found) == 6
    for case, values in found.items():
        assert values["norm"] < 1e-6, case
        assert values["difference"] < (0.2 if "bf16" in case else 1e-6), case
        assert values["stale"] < (0.01 if "bf16" in case else 1e-6), case
