"""A task's memory and time before its first clip, for a manifest of ten million rows: `python -m benchmarks.manifest_memory [ROWS]`."""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import machine, peak_mb, show
from data_prep.manifest import SCHEMA, Manifest
from data_prep.plan import Survey, plan_shards, rows_of, walks

_PIECE = 100_000
_ROWS_PER_SHARD = 300
_TASKS = 256


def write(path: Path, rows: int) -> None:
    """A manifest like Panda-70M's: keys, sources, captions and JSON of the usual lengths."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for first in range(0, rows, _PIECE):
            numbers = range(first, min(first + _PIECE, rows))
            writer.write_table(pa.table({
                "key": [f"panda70m_{number:011d}_{number % 600 * 1000}" for number in numbers],
                "dataset": ["panda70m"] * len(numbers),
                "split": ["train" if number % 100 else "test" for number in numbers],
                "source": [f"s3://bucket/panda/{number // 19:011d}.mp4" for number in numbers],
                "start": [number % 600 * 1.0 for number in numbers],
                "end": [number % 600 + 8.5 for number in numbers],
                "labels": [[]] * len(numbers),
                "caption": [f"A person number {number} is standing next to a picture of a dog in a wheel chair." for number in numbers],
                "extra": [f'{{"matching_score": 0.4, "video_id": "{number // 19:011d}"}}' for number in numbers],
            }, SCHEMA), row_group_size=1 << 14)  # fmt: skip


def main() -> None:
    """Write, survey, plan, and collect the rows of the first walk of one task."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest.parquet")
        with ProcessPoolExecutor(1) as pool:  # its memory is not the task's
            pool.submit(write, path, rows).result()
        begin = time.perf_counter()
        with Manifest(path) as manifest:
            survey = Survey.of(manifest)
            surveyed = time.perf_counter()
            plans = plan_shards(survey.counts(), _ROWS_PER_SHARD)
            group = next(walks(plans[::_TASKS], 1 << 16))
            numbers = np.concatenate([rows_of(plan, survey, 0) for plan in group])
            found = manifest.take(numbers)
            taken = time.perf_counter()
        assert len(found) == len(numbers)
        size = path.stat().st_size / 1e6
    print(machine("pyarrow"))
    show(
        f"A task of {_TASKS} on {rows:,} rows ({size:.0f} MB)",
        ("survey, s", "rows of its first walk", "that walk, s", "peak memory, MB"),
        [(surveyed - begin, len(found), taken - surveyed, peak_mb())],
    )


if __name__ == "__main__":
    main()
