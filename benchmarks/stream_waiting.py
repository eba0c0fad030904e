"""How long a training step waits for its batch: real clips, decoded for a step of known length, by 0, 1 and 2 workers.

    python -m benchmarks.stream_waiting [--steps 12] [--batch 4]

The "model" is a GPU's stand-in: it sleeps, so that the processor belongs to the decoders as it does beside a GPU. Each number of workers
meets steps that are longer than, as long as and shorter than what one process takes to decode a batch.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import machine, show
from benchmarks.made_video import make_video
from benchmarks.stream_decoding import FPS, RATE, SECONDS, SIDE, write
from data_prep.decoding import ClipDecoder
from data_prep.index import ShardSet
from data_prep.stream import ClipStream

WORKERS, SHARES = (0, 1, 2), (2.0, 1.0, 0.6)
WARM = 4


def main() -> None:
    """Make a shard, time one batch, then print the share of time that steps wait."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = write(Path(folder), [make_video(Path(folder, f"{seed}.mp4"), seed, 10) for seed in range(2)], 12, 360)
        alone = waited(shards, 0, 0.0, arguments.batch, 3)
        waits = {(share, workers): waited(shards, workers, share * alone, arguments.batch, arguments.steps)
                 for share in SHARES for workers in WORKERS}  # fmt: skip
    rows = [[workers, 1000 * share * alone, 1000 * wait, wait / (wait + share * alone)] for (share, workers), wait in waits.items()]
    print(machine("torch", "av"))
    title = f"Batches of {arguments.batch} clips of {SECONDS:g} s; one takes {1000 * alone:.0f} ms to decode in one process"
    show(title, ["workers", "step, ms", "waiting for a batch, ms", "share of the time"], rows)


def waited(shards: ShardSet, workers: int, step: float, batch: int, steps: int) -> float:
    """Mean seconds that a step of `step` seconds waits for its batch, after the first few."""
    decode = ClipDecoder(seconds=SECONDS, fps=FPS, sample_rate=RATE, size=SIDE, random_crop=True)
    total = 0.0
    with contextlib.closing(ClipStream(shards, decode, batch_size=batch).batches(workers)) as batches:
        for number in range((WARM if workers else 0) + steps):
            begin = time.perf_counter()
            next(batches)
            total += time.perf_counter() - begin if number >= (WARM if workers else 0) else 0.0
            time.sleep(step)
    return total / steps


if __name__ == "__main__":
    main()
