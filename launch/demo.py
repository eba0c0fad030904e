"""The demo: from nothing to videos that sound, and a report that says how well."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data_prep.manifest import write_manifest
from data_prep.media import ClipFormat
from data_prep.prepare import PrepareConfig, prepare_shards
from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from pipelines.config import Recipe, load_recipe
from pipelines.evaluate import evaluate, table
from pipelines.metrics.statistics import Bar
from pipelines.report import write_report
from pipelines.run import run_chain

CLIPS, HELDOUT = 1600, 192


def run_demo(out: Path, overrides: Sequence[str], say: Callable[[str], None]) -> list[Bar]:
    """Render, prepare, train every stage, generate and measure, all below `out`; run again, it goes on where it stopped."""
    started = time.perf_counter()
    recipe = load_recipe("demo", [f"out={out}", "name=run", f"data={out / 'shards'}", *overrides])
    prepare(out, recipe, say)
    folder = run_chain(recipe, say=say)
    bars = evaluate(folder, torch.device("cpu"), recipe)
    say(table(folder))
    say(f"{time.perf_counter() - started:.0f} s in all")
    say(f"videos that sound: {folder / 'examples'}")
    say(f"report: {write_report(folder)}")
    return bars


def prepare(out: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Draw the clips and write their shards, where that is not done yet."""
    shards = out / "shards"
    if (shards / "dataset.json").exists():
        return
    clip = recipe.clip
    settings = RenderConfig(size=clip.size, seconds=clip.seconds, sample_rate=clip.sample_rate)
    say(f"rendering {CLIPS + HELDOUT} clips of sounding events")
    rows = read_rendered(str(out / "clips"), CLIPS, seed=recipe.seed, heldout=HELDOUT, settings=settings, workers=2)
    write_manifest(rows, str(out / "manifest.parquet"))
    format_ = ClipFormat(fps=clip.fps, short_side=clip.size, sample_rate=clip.sample_rate, max_seconds=clip.seconds)
    say("cutting them into shards")
    summary = prepare_shards(str(out / "manifest.parquet"), str(shards), PrepareConfig(format=format_, rows_per_shard=64), workers=2)
    say(str(summary))
