"""Training speed of SF-CAVP on a GPU: clips per second, share of the chip's peak, memory, by batch and memory layout.

    python -m benchmarks.gpu_encoder [--batches 8 32 64] [--segments 6] [--peak-tflops 989]
    python -m benchmarks.gpu_encoder --preset tiny --device cpu --size 32 --batches 2 --segments 1 --steps 1    # does it run at all?

Forward and backward pass and fused AdamW on clips that lie on the device; weights in bfloat16, statistics of batch norms in float32, as
DeepSpeed holds them. The share counts the operations of the model itself, recomputed ones not, against the dense bfloat16 peak (989
TFLOP/s: H100, H200).
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import machine, show
from models.encoders.sf_cavp import PRESETS, SFCAVP

Clips = tuple[torch.Tensor, torch.Tensor]


def encoder(options: argparse.Namespace, channels_last: bool, parts: tuple[str, ...]) -> SFCAVP:
    """The model in training mode on the device."""
    config, changes = PRESETS[options.preset], {"channels_last": channels_last, "activation_checkpointing": parts}
    towers = {name: replace(getattr(config, name), **changes) for name in ("video", "audio")}
    model = SFCAVP(replace(config, **towers, feature_norm="none")).to(options.device).train()
    if options.device.startswith("cuda"):  # torch 2.13's bfloat16 convolutions on a CPU crash on small feature maps
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def made_clips(options: argparse.Namespace, count: int) -> Clips:
    """Frames as bytes and log-mels."""
    frames = torch.randint(0, 256, (count, 32 * options.segments, 3, options.size, options.size), dtype=torch.uint8, device=options.device)
    return frames, -5 + 2 * torch.randn(count, 128, 128 * options.segments, device=options.device)


def operations_per_clip(options: argparse.Namespace) -> int:
    """Floating-point operations of forward and backward pass."""
    counter, count = FlopCounterMode(display=False), 2
    with counter:
        encoder(options, False, ())(*made_clips(options, count))["loss"].backward()
    return counter.get_total_flops() // count


def seconds_per_step(model: SFCAVP, clips: Clips, chunk: int, steps: int) -> float:
    """Mean of `steps` after two to warm up."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    begin = 0.0
    for number in range(-2, steps):
        if number == 0:
            wait(clips[0].device)
            begin = time.perf_counter()
        model(*clips, chunk=chunk)["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    wait(clips[0].device)
    return (time.perf_counter() - begin) / steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(options: argparse.Namespace, operations: int, batch: int, layout: str, passes: str) -> tuple:
    """One line of the table."""
    parts = PRESETS[options.preset].video.parts if passes == "recomputed" else ()
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        model = encoder(options, layout == "channels last", parts)
        seconds = seconds_per_step(model, made_clips(options, batch), options.chunk if passes == "chunks" else 0, options.steps)
    except torch.cuda.OutOfMemoryError:
        return batch, layout, passes, "out of memory", "", ""
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else ""
    return batch, layout, passes, batch / seconds, operations * batch / seconds / options.peak_tflops / 1e12, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="r50", choices=PRESETS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=224, help="side of the frames, pixels")
    parser.add_argument("--segments", type=int, default=6, help="segments of 1.28 s per clip")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64], help="clips per step")
    parser.add_argument("--chunk", type=int, default=8, help="clips per pass of cached gradients")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_encoder: no GPU here; see --help for a run on a CPU")
        return
    operations = operations_per_clip(options)
    cases = itertools.product(options.batches, ("contiguous", "channels last"), ("plain", "recomputed", "chunks"))
    rows = [row(options, operations, *case) for case in cases]
    print(torch.cuda.get_device_name() if options.device.startswith("cuda") else machine("torch"))
    show(f"SF-CAVP {options.preset}, {options.segments} segments of {options.size} pixels, {operations / 1e12:.3g} TFLOP per clip",
         ("clips", "layout", "pass", "clips/s", "share of peak", "GB"), rows)


if __name__ == "__main__":
    main()
