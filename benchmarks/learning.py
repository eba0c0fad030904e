"""Whether a recipe learns synchrony, over seeds: the runs, a table of its bars and controls, and plots.

    python -m benchmarks.learning run OUT [--recipe rendered] [--seeds 0 1 2] [--set key=value ...]
    python -m benchmarks.learning table OUT

`run` makes OUT/seed-S for each seed: clips of that seed, shards, the chain, its evaluation. It goes on where it stopped, and a seed that
is finished is skipped. With --set data=SHARDS all seeds share those. `table` prints Markdown from the evaluation.json of the finished
seeds, keeps it as OUT/table.md, and draws bars.svg, controls.svg and curves.svg beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import machine
from pipelines.config import Recipe
from pipelines.recipes import dump_recipe, load_recipe
from pipelines.report import read_curves

REPOSITORY = Path(__file__).resolve().parents[1]
INK, COLOURS = "#7a7f87", ("#3b76c4", "#d97b29", "#3f9c68", "#a05fc0", "#c44e52")
"""Grey that can be read on white and on black, and a colour per seed."""
STAGES = ("autoencoder", "contrastive", "generative")
ENCODER = ("retrieval R@1", "right segment of a clip", "true sound over itself 0.3 s out of time")


def run(out: Path, recipe: str, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Take every seed through data, chain and evaluation. RuntimeError names the command that failed."""
    for seed in seeds:
        folder = (out / f"seed-{seed}").resolve()
        own = [] if any(each.startswith("data=") for each in overrides) else [f"data={folder / 'shards'}"]
        wanted = load_recipe(recipe, [*overrides, f"seed={seed}", f"out={folder}", "name=run", *own])
        if finished(folder / "run", wanted):
            print(f"seed {seed}: finished, see {folder / 'run' / 'report.html'}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump_recipe(wanted))
        if own:
            prepare(folder, wanted)
        print(f"seed {seed}: training", flush=True)
        # In the caller's folder, as data=SHARDS may be relative to it.
        foleyscale(Path.cwd(), "run", str(folder / "recipe.yaml"), launcher=launcher())
        foleyscale(Path.cwd(), "evaluate", "--run", str(folder / "run"), fine=(0, 1))  # 1: a bar was missed, which the table tells
        if not finished(folder / "run", wanted):  # an error that nothing caught ends with 1 as well
            raise RuntimeError(f"foleyscale evaluate --run {folder / 'run'} wrote no evaluation.json: see its error above")


def finished(folder: Path, recipe: Recipe) -> bool:
    """Whether a run was evaluated since it was last started, and with this very recipe."""
    record, evaluation = folder / "recipe.yaml", folder / "evaluation.json"
    return evaluation.exists() and record.read_text() == dump_recipe(recipe) and evaluation.stat().st_mtime >= record.stat().st_mtime


def prepare(folder: Path, recipe: Recipe) -> None:
    """Manifest and shards as the recipe's `prepare` section says; another seed draws other clips."""
    if (folder / "shards" / "dataset.json").exists():
        return
    if recipe.prepare is None:
        raise ValueError(f"recipe {recipe.name} has no section prepare: make shards and give --set data=SHARDS")
    reader, arguments = recipe.prepare.reader, recipe.prepare.arguments
    drawn = ["--seed", str(recipe.seed)] if reader == "rendered" else []
    foleyscale(folder, "prep", "manifest", reader, *arguments, "--out", "manifest.parquet", *drawn)
    foleyscale(folder, "prep", "shards", "manifest.parquet", "shards", "--recipe", "recipe.yaml")
    foleyscale(folder, "prep", "index", "shards")


def launcher() -> list[str]:
    """torchrun with a process per GPU, on a CPU with at most two: on small models they use the cores better than threads do."""
    import torch

    count = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    return ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", f"--nproc_per_node={count}"]


def foleyscale(folder: Path, *arguments: str, launcher: Sequence[str] = (), fine: Sequence[int] = (0,)) -> None:
    """Run a command of the command line in `folder`. RuntimeError where it ends otherwise than with one of the codes `fine`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "launch.cli", *arguments]
    code = subprocess.run(command, cwd=folder, env=environment).returncode
    if code not in fine:
        raise RuntimeError(f"foleyscale {' '.join(arguments)} in {folder} ended with exit code {code}: give the same command to go on")


def table(out: Path) -> str:
    """Bars, figures and training times over the finished seeds, as Markdown; the plots beside it."""
    found = {int(path.parts[-3].removeprefix("seed-")): json.loads(path.read_text()) for path in out.glob("seed-*/run/evaluation.json")}
    found = dict(sorted(found.items()))
    if not found:
        raise ValueError(f"no finished seed below {out}: run `python -m benchmarks.learning run {out}` first")
    draw(out / "bars.svg", (7, 3.2), lambda axes: _bars(axes, found))
    draw(out / "controls.svg", (7, 4.6), lambda axes: _controls(axes, found))
    draw(out / "curves.svg", (9, 2.6), *(lambda axes, stage=stage: _curves(axes, out, stage, found) for stage in STAGES))
    environment = next(iter(found.values()))["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "deepspeed"))
    lines = [f"Seeds {', '.join(map(str, found))}; {environment['device']}; {machine()}, {versions}. ± is the standard error over seeds, "
             "in brackets stands that over the clips of a seed, for retrieval over its galleries."]
    lines += ["", *_bar_lines(found), "", *_figure_lines(found), "", *_time_lines(out, found)]
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    return text


def over_seeds(values: Sequence[float]) -> str:
    """Mean and standard error; of a single seed its value."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return f"{np.mean(values):.4g}" + ("" if error is None else f" ± {error:.2g}")


def _bar_lines(found: dict[int, dict]) -> list[str]:
    lines = [f"| bar | bound | mean | {' | '.join(f'seed {seed}' for seed in found)} | met |", f"|{'---|' * (len(found) + 4)}"]
    for name, bars in _by_name(found, "bars").items():
        known = [bar for bar in bars if bar]
        bound = f"{'≥' if known[0]['comparison'] == '>=' else '≤'} {known[0]['bound']:g}"
        cells = " | ".join(f"{bar['value']:.4g}" if bar else "–" for bar in bars)
        met = f"{sum(bar['passed'] for bar in known)} of {len(known)}"
        lines.append(f"| {name} | {bound} | {over_seeds([bar['value'] for bar in known])} | {cells} | {met} |")
    return lines


def _figure_lines(found: dict[int, dict]) -> list[str]:
    lines = [f"| figure | mean | {' | '.join(f'seed {seed} (s.e.)' for seed in found)} |", f"|{'---|' * (len(found) + 2)}"]
    for name, figures in _by_name(found, "figures").items():
        mean = over_seeds([figure["value"] for figure in figures if figure])
        lines.append(f"| {name} | {mean} | {' | '.join(map(_cell, figures))} |")
    return lines


def _cell(figure: dict | None) -> str:
    if figure is None:
        return "–"
    error = figure["standard_error"]
    return f"{figure['value']:.4g}" + ("" if error is None else f" ({error:.2g})")


def _time_lines(out: Path, found: dict[int, dict]) -> list[str]:
    """Steps and seconds of training, without evaluation; from the logged steps, as a run may have been interrupted."""
    lines = [f"| stage | steps | {' | '.join(f'seed {seed}, s' for seed in found)} |", f"|{'---|' * (len(found) + 2)}"]
    for stage in STAGES:
        timed = [_points(out, seed, stage, "seconds_per_step") for seed in found]
        if any(timed):
            cells = [f"{points[-1][0] * np.mean([value for _, value in points]):.0f}" if points else "–" for points in timed]
            lines.append(f"| {stage} | {max(points[-1][0] for points in timed if points)} | {' | '.join(cells)} |")
    return lines


def _by_name(found: dict[int, dict], kind: str) -> dict[str, list[dict | None]]:
    """Name -> the bar or figure of that name, seed by seed; None where a seed has none."""
    runs = [{each["name"]: each for each in run[kind]} for run in found.values()]
    return {name: [run.get(name) for run in runs] for name in dict.fromkeys(name for run in runs for name in run)}


def _points(out: Path, seed: int, stage: str, name: str) -> list[tuple[int, float]]:
    path = out / f"seed-{seed}" / "run" / stage / "metrics.jsonl"
    return next((curve.train for curve in read_curves(path) if curve.name == name), []) if path.exists() else []


def draw(path: Path, size: tuple[float, float], *panels: Callable[[Axes], None]) -> None:
    """An SVG with a panel beside the other, on a transparent ground."""
    figure = Figure(figsize=size, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
        axes.tick_params(colors=INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        for text in (axes.title, axes.xaxis.label):
            text.set(color=INK, fontsize=9)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def _bars(axes: Axes, found: dict[int, dict]) -> None:
    """How many times over each bar is met, a point per seed; what a log axis has no place for is a triangle at its end."""
    bars = dict(reversed(_by_name(found, "bars").items()))
    times = np.array([[times_met(bar) if bar else np.nan for bar in each] for each in bars.values()])
    drawn = np.where((times > 0) & np.isfinite(times), times, np.nan)
    low, high = np.nanmin(drawn, initial=1) / 1.5, np.nanmax(drawn, initial=1) * 1.5
    ends = (("<", np.where(times == 0, low, np.nan)), (">", np.where(times == np.inf, high, np.nan)))
    for number, seed in enumerate(found):
        for marker, places in (("o", drawn), *ends):
            axes.plot(places[:, number], range(len(bars)), marker, color=_colour(number), clip_on=False,
                      label=f"seed {seed}" if marker == "o" else None)  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1)
    axes.set(xscale="log", xlim=(low, high), xlabel="times the bar; a triangle: beyond the axis",
             yticks=range(len(bars)), yticklabels=bars)  # fmt: skip
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def times_met(bar: dict) -> float:
    """The value over a lower bound, or an upper bound over the value: infinite where that divides by 0, 0 where it is less or NaN."""
    above, below = (bar["value"], bar["bound"]) if bar["comparison"] == ">=" else (bar["bound"], bar["value"])
    if below > 0:
        return above / below if above > 0 else 0.0
    return np.inf if bar["passed"] else 0.0


def _controls(axes: Axes, found: dict[int, dict]) -> None:
    """What is measured between 0 and 1, with the controls of each beneath it; a line is the standard error of a seed's figure."""
    known = _by_name(found, "figures")
    names = [name for pair in ENCODER for name in (pair, f"untrained encoder: {pair}") if name in known]
    names += [name for name in known if name.startswith(("linear probe", "onset F1:"))]
    for place, name in enumerate(names[::-1]):
        for number, figure in enumerate(known[name]):
            if figure:
                axes.errorbar(figure["value"], place + 0.15 * (number - (len(found) - 1) / 2), xerr=figure["standard_error"] or 0,
                              fmt="o", markersize=3, color=_colour(number))  # fmt: skip
    axes.set(xlim=(-0.05, 1.02), xlabel="a point per seed", yticks=range(len(names)), yticklabels=names[::-1])
    axes.grid(axis="x", color=INK, alpha=0.3, linewidth=0.5)


def _curves(axes: Axes, out: Path, stage: str, found: dict[int, dict]) -> None:
    """Training loss of a stage."""
    for number, seed in enumerate(found):
        if points := _points(out, seed, stage, "loss"):
            axes.plot(*np.array(points).T, color=_colour(number), linewidth=0.8, label=f"seed {seed}")
    axes.set(title=f"{stage}: training loss", xlabel="step", yscale="log")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def seeds_with(out: Path, file: str, then: str = "") -> list[Path]:
    """Folders of the seeds that have this file; ValueError where none has, which says what to run, and `then`."""
    found = sorted(path for path in out.glob("seed-*") if (path / file).exists())
    if not found:
        raise ValueError(f"{out}: no seed-*/{file}; give `python -m benchmarks.learning run {out}` first{then}")
    return found


def commands(description: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of `run OUT` and `table OUT`, and those of the two for what else they take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="command", required=True)
    runs, tables = (kinds.add_parser(name) for name in ("run", "table"))
    for each in (runs, tables):
        each.add_argument("out", type=Path)
    runs.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe")
    return parser, runs, tables


def main() -> None:
    """Run the command that was given; none prints how to."""
    parser, runs, _ = commands(__doc__)
    runs.add_argument("--recipe", default="rendered")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.out))
    else:
        run(options.out, options.recipe, options.seeds, options.set)


if __name__ == "__main__":
    main()
