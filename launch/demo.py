"""The demo: from nothing to videos that sound, and a report that says how well."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data_prep.manifest import write_manifest
from data_prep.prepare import prepare_shards
from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from pipelines.config import Recipe
from pipelines.evaluate import evaluate, table
from pipelines.metrics.statistics import Bar
from pipelines.recipes import load_recipe
from pipelines.report import write_report

CLIPS, HELDOUT, ROWS_PER_SHARD = 1600, 192, 32


def run_demo(out: Path, overrides: Sequence[str], say: Callable[[str], None]) -> list[Bar]:
    """Render, prepare, train every stage, generate and measure, all below `out`; run again, it goes on where it stopped."""
    started = time.perf_counter()
    changes = [f"out={out}", "name=run", f"data={out / 'shards'}", *overrides]
    recipe = load_recipe("demo", changes)
    prepare(out, recipe, say)
    train(changes)
    bars = evaluate(recipe.folder, torch.device("cpu"), recipe)
    say(table(recipe.folder))
    say(f"videos that sound: {recipe.folder / 'examples'}")
    say(f"report: {write_report(recipe.folder)}")
    say(f"{time.perf_counter() - started:.0f} s in all")
    return bars


def prepare(out: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Draw the clips and write their shards, where that is not done yet."""
    shards, manifest, workers = out / "shards", out / "manifest.parquet", _processes()
    if (shards / "dataset.json").exists():
        return
    clip = recipe.clip
    settings = RenderConfig(size=clip.size, seconds=clip.seconds, sample_rate=clip.sample_rate)
    say(f"drawing {CLIPS + HELDOUT} clips of sounding events")
    write_manifest(read_rendered(out / "clips", CLIPS, seed=recipe.seed, heldout=HELDOUT, settings=settings, workers=workers), manifest)
    say("cutting them into shards")
    say(str(prepare_shards(manifest, shards, replace(recipe.preparation, rows_per_shard=ROWS_PER_SHARD), workers=workers)))


def train(changes: Sequence[str]) -> None:
    """Run the chain in as many processes as there are cores, at most two: on small models they use the cores better than threads do."""
    processes = _processes()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "launch.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launcher, "run", "demo", *changes], env=environment)
    if done.returncode:
        raise RuntimeError(f"the chain stopped with exit code {done.returncode} and the message above; the same command resumes it")


def _processes() -> int:
    return min(2, len(os.sched_getaffinity(0)))
