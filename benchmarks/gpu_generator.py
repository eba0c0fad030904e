"""MM-DiT small_16k on a GPU: clips per second and model FLOPs utilisation in training, seconds per 8 s clip in sampling.

Training runs through our DeepSpeed engine in bfloat16 with and without compiled blocks; sampling takes 25 Euler steps with guidance,
against two passes per step of the public layout. `--tiny` runs the same at a laptop's size, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import machine, show
from benchmarks.generator_step import made_inputs, made_model
from benchmarks.guided_sampling import one_pass, two_passes
from models import layers
from models.generators.mmdit import MMDiT
from models.objectives.flow_matching import integrate
from pipelines.config import TrainConfig, ZeroConfig
from pipelines.engine.world import World, join_world
from pipelines.engine.zero import start_engine
from pipelines.stages.generative import FlowModel


def seconds(run: Callable[[], object], world: World, repeats: int) -> float:
    """Mean seconds of a call, after two that compile and choose kernels."""
    for measured in (False, True):
        _wait(world)
        begin = time.perf_counter()
        for _ in range(repeats if measured else 2):
            run()
        _wait(world)
    return (time.perf_counter() - begin) / repeats


def flow_inputs(batch: int, world: World) -> dict[str, torch.Tensor]:
    """A training batch; the caption is missing, as in training from video alone."""
    given = {name: value.to(world.device, torch.bfloat16) for name, value in made_inputs(batch).items() if name != "text"}
    return given | {"noise": torch.randn_like(given["latent"])}


def training_flops() -> float:
    """Floating-point operations of a forward and backward pass of one clip, as torch counts them."""
    model, given = FlowModel(made_model()), made_inputs(1)
    del given["text"]
    with FlopCounterMode(display=False) as counter:
        model(**given, noise=torch.randn_like(given["latent"]))["loss"].backward()
    return counter.get_total_flops()


def training(batches: list[int], compiled: bool, world: World, options: argparse.Namespace) -> Iterator[list]:
    """Rows of batch, blocks, seconds per step, clips per second and utilisation."""
    flops = training_flops()

    def measured(batch: int) -> list:
        generator = made_model()
        if compiled:
            generator.compile_blocks()
        engine = start_engine(FlowModel(generator), TrainConfig(batch_size=batch, precision="bf16", zero=ZeroConfig(stage=1)), world)
        given = flow_inputs(batch, world)

        def step() -> None:
            engine.backward(engine(**given)["loss"])
            engine.step()

        try:
            taken = seconds(step, world, options.repeats)
        finally:
            engine.destroy()
        utilised = batch * flops / taken / options.peak_tflops / 1e12
        return [taken, batch / taken, f"{100 * utilised:.1f} %"]

    yield from rows(batches, compiled, measured)


def sampling(batches: list[int], compiled: bool, world: World, options: argparse.Namespace) -> Iterator[list]:
    """Rows of batch, blocks, seconds per clip both ways and their ratio."""
    model = made_model().to(world.device, torch.bfloat16).eval().requires_grad_(False)
    if compiled:
        model.compile_blocks()

    @torch.no_grad()
    def measured(batch: int) -> list:
        given = {name: value.to(world.device, torch.bfloat16) for name, value in made_inputs(batch).items()}
        ours, theirs = (_sampler(way, model, given, options.steps) for way in (one_pass, two_passes))
        taken, usual = (seconds(run, world, max(1, options.repeats // 4)) / batch for run in (ours, theirs))
        return [usual, taken, usual / taken]

    yield from rows(batches, compiled, measured)


def rows(batches: list[int], compiled: bool, measured: Callable[[int], list]) -> Iterator[list]:
    """A row as soon as it is measured; a batch that the GPU has no room for says so, and the others are measured all the same."""
    for batch in batches:
        try:
            cells = measured(batch)
        except torch.OutOfMemoryError:
            cells = ["out of memory", "", ""]
        # What the error held on to is let go of only here, after its handler.
        gc.collect()
        torch.cuda.empty_cache()
        yield [batch, "compiled" if compiled else "eager", *cells]


def show_each(title: str, header: list[str], found: Iterator[list]) -> None:
    """The table of `show`, each row printed as it comes."""
    show(title, header, [])
    for row in found:
        print(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in row)} |", flush=True)


def _sampler(way: Callable, model: MMDiT, given: dict[str, torch.Tensor], steps: int) -> Callable[[], torch.Tensor]:
    return lambda: integrate(way(model, given), given["latent"], steps)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print both tables, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="one small batch, eager, on any device")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512], help="of training")
    parser.add_argument("--clips", type=int, nargs="+", default=[1, 8, 64], help="sampled together")
    parser.add_argument("--steps", type=int, default=25, help="Euler steps")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak: 989 of an H100 or H200 SXM")
    options = parser.parse_args()
    if options.tiny:
        options.batches, options.clips, options.steps, options.repeats = [1], [1], 1, 1
    elif not torch.cuda.is_available():
        print("no GPU here; --tiny shows that the script runs")
        return
    world, blocks = join_world(), (False,) if options.tiny else (False, True)
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "no GPU"
    kernel = layers.attention_kernel(world.device.type, torch.bfloat16, 64, layers.flash_attn_func is not None)
    print(f"{machine('torch', 'deepspeed')}; {device}; attention by {kernel}")
    show_each("Training small_16k, bfloat16", ["batch", "blocks", "s per step", "clips/s", "MFU"],
              (row for compiled in blocks for row in training(options.batches, compiled, world, options)))
    show_each(f"Sampling 8 s, {options.steps} steps with guidance, bfloat16: s per clip",
              ["batch", "blocks", "two passes", "one pass", "ratio"],
              (row for compiled in blocks for row in sampling(options.clips, compiled, world, options)))


if __name__ == "__main__":
    main()
