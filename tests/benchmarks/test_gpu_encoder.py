from __future__ import annotations

import sys

import pytest

from benchmarks import gpu_encoder


@pytest.mark.slow
def test_runs_on_a_cpu_when_asked_to(monkeypatch, capsys):
    arguments = "--preset tiny --device cpu --size 16 --batches 2 --segments 1 --steps 1 --chunk 1"
    monkeypatch.setattr(sys, "argv", ["gpu_encoder", *arguments.split()])
    gpu_encoder.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 |")]
    assert [tuple(cell.strip() for cell in row.split("|")[2:4]) for row in rows] == [
        (layout, passes) for layout in ("contiguous", "channels last") for passes in ("plain", "recomputed", "chunks")
    ]
    assert all(float(row.split("|")[4]) > 0 for row in rows)
