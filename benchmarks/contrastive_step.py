"""Memory and time of one training step of SF-CAVP at published width: as it is, with activation checkpointing, with cached gradients.

    python -m benchmarks.contrastive_step [--clips 8] [--size 80] [--repeats 1]

Each step runs in a process of its own, forward and backward pass in float32 on one thread; seconds are those of the processor. Memory is
what the process holds at its peak beyond weights and gradients. Frames are smaller than the published 224 pixels, to take about a minute.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import replace
from statistics import median

import torch

from benchmarks.common import machine, peak_mb, show
from models.encoders.sf_cavp import PRESETS, SFCAVP

PARTS = PRESETS["r50"].video.parts
VARIANTS = {
    "as it is": ((), 0),
    "res2 and stem recomputed": (PARTS[:2], 0),
    "all parts recomputed": (PARTS, 0),
    "chunks of 2": ((), 2),
    "chunks of 2, all parts recomputed": (PARTS, 2),
}


def step(parts: tuple[str, ...], chunk: int, clips: int, size: int) -> tuple[float, float]:
    """Processor seconds and MB of one step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = PRESETS["r50"]
    towers = {name: replace(getattr(config, name), activation_checkpointing=parts) for name in ("video", "audio")}
    model = SFCAVP(replace(config, **towers)).train()
    frames, mel = torch.randint(0, 256, (clips, 32, 3, size, size), dtype=torch.uint8), -5 + 2 * torch.randn(clips, 128, 128)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    held, begin = peak_mb(), time.process_time()
    model(frames, mel, chunk=chunk)["loss"].backward()
    return time.process_time() - begin, peak_mb() - held - gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=8, help="clips of one segment")
    parser.add_argument("--size", type=int, default=80, help="side of the frames, pixels")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name, (parts, chunk) in VARIANTS.items():
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                results[name].append(alone.apply(step, (parts, chunk, options.clips, options.size)))
    figures = {name: [median(values) for values in zip(*found, strict=True)] for name, found in results.items()}
    seconds, memory = figures["as it is"]
    rows = [(name, s, s / seconds, m, m / memory) for name, (s, m) in figures.items()]
    print(machine("torch"))
    show(f"SF-CAVP r50, {options.clips} clips of one segment, {options.size} pixels", ("step", "seconds", "x", "peak MB", "x"), rows)


if __name__ == "__main__":
    main()
