"""The demo: from nothing to videos that sound, and a report that says how well."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from data_prep.manifest import write_manifest
from data_prep.prepare import prepare_shards
from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from pipelines.config import Recipe
from pipelines.config.evaluation import BarsConfig
from pipelines.evaluate import evaluate, table
from pipelines.metrics.statistics import Bar
from pipelines.recipes import load_recipe
from pipelines.report import write_report

CLIPS, HELDOUT, ROWS_PER_SHARD = 1600, 256, 32
SMOKE_CLIPS, SMOKE_HELDOUT = 24, 8
SMOKE = (
    *(f"{stage}.train.{change}" for stage in ("autoencoder", "contrastive", "generative", "preference")
      for change in ("steps=4", "batch_size=4", "checkpoint_every=2", "log_every=1", "optimiser.warmup_steps=1")),
    "features.statistics_clips=8", "features.batch_size=8", "generative.sampling_steps=2", "preference.videos=8",
    "preference.candidates=2", f"evaluation.clips={SMOKE_HELDOUT}", "evaluation.examples=2",
    *(f"evaluation.bars.{bar.name}=null" for bar in fields(BarsConfig)),
)  # fmt: skip
"""Changes to the recipe that leave every part of the chain and little of its work."""


def run_demo(out: Path, overrides: Sequence[str], say: Callable[[str], None], *, smoke: bool = False) -> list[Bar]:
    """Render, prepare, train every stage, generate and measure, all below `out`; run again, it goes on where it stopped.

    `smoke`: a handful of clips and steps, to see that everything runs; its figures mean nothing, so it has no bars.
    """
    started = time.perf_counter()
    out = out / "smoke" if smoke else out  # a demo in the same folder must find nothing of this
    changes = [f"out={out}", "name=run", f"data={out / 'shards'}", *(SMOKE if smoke else ()), *overrides]
    recipe = load_recipe("demo", changes)
    if smoke:
        say("smoke: a handful of clips and steps shows that everything runs; the figures mean nothing and no bar is set")
    prepare(out, recipe, say, *((SMOKE_CLIPS, SMOKE_HELDOUT) if smoke else (CLIPS, HELDOUT)))
    train(changes)
    bars = evaluate(recipe.folder, torch.device("cpu"), recipe)
    say(table(recipe.folder))
    say(f"videos that sound: {recipe.folder / 'examples'}")
    say(f"report: {write_report(recipe.folder)}")
    say(f"{time.perf_counter() - started:.0f} s in all")
    return bars


def prepare(out: Path, recipe: Recipe, say: Callable[[str], None], clips: int, heldout: int) -> None:
    """Draw the clips and write their shards, where that is not done yet."""
    shards, manifest, workers = out / "shards", out / "manifest.parquet", _processes()
    if (shards / "dataset.json").exists():
        return
    clip = recipe.clip
    settings = RenderConfig(size=clip.size, seconds=clip.seconds, sample_rate=clip.sample_rate)
    say(f"drawing {clips + heldout} clips of sounding events")
    write_manifest(read_rendered(out / "clips", clips, seed=recipe.seed, heldout=heldout, settings=settings, workers=workers), manifest)
    say("cutting them into shards")
    say(str(prepare_shards(manifest, shards, replace(recipe.preparation, rows_per_shard=ROWS_PER_SHARD), workers=workers)))


def train(changes: Sequence[str]) -> None:
    """Run the chain in as many processes as there are cores, at most two: on small models they use the cores better than threads do."""
    processes = _processes()
    # By number: in a container or on a laptop this machine's name may have no address, and torchrun would wait ten minutes for one.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={processes}"]
    # The demo is for a CPU: two ranks would take two GPUs, and a laptop has one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *launcher, "-m", "launch.cli", "run", "demo", *changes], env=environment)
    if done.returncode:
        raise RuntimeError(f"the chain stopped with exit code {done.returncode} and the message above; the same command resumes it")


def _processes() -> int:
    return min(2, len(os.sched_getaffinity(0)))
