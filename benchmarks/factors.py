"""What makes a contrastive encoder hear when: the recipe's encoder against variants that differ in one thing, over seeds.

    python -m benchmarks.factors run OUT [--steps 200] [--set key=value ...]
    python -m benchmarks.factors table OUT

OUT is a folder of seeds from `python -m benchmarks.learning run OUT`, whose recipes and shards are used. `run` trains the contrastive stage
alone, for few steps, as OUT/factors/VARIANT/seed-S; it goes on where it stopped. `table` prints Markdown and keeps it as OUT/factors.md.
All variants see as many segments in a step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import machine
from benchmarks.learning import commands, foleyscale, launcher, over_seeds, seeds_with
from pipelines.engine.checkpoint import EXPORTED
from pipelines.recipes import dump_recipe, load_recipe

VARIANTS = {
    "recipe": (),
    "one-segment": ("contrastive.segments=1", "contrastive.train.batch_size=32"),
    "four-segments": ("contrastive.segments=4", "contrastive.train.batch_size=8"),
    "still-background": ("contrastive.model.subtract_temporal_mean=false",),
    "plain-features": ("contrastive.model.feature_norm=none",),
}
"""What each changes: no other segment of the same clip among the negatives, or three of them; the mean picture is left in; embeddings are
not standardised over the batch."""
MEASURES = {"R@1": "validation/r@1", "right segment": "validation/right_segment"}


def run(out: Path, steps: int, overrides: Sequence[str]) -> None:
    """Train every variant on every seed's shards. RuntimeError names the command that failed."""
    for seed in seeds_with(out, "recipe.yaml"):
        for name, changes in VARIANTS.items():
            folder = (out / "factors" / name).resolve()
            short = [f"contrastive.train.{key}" for key in (f"steps={steps}", f"checkpoint_every={steps}", f"validate_every={steps // 4}")]
            wanted = load_recipe(str(seed / "recipe.yaml"), [f"out={folder}", f"name={seed.name}", *short, *overrides, *changes])
            folder.mkdir(parents=True, exist_ok=True)
            recipe = folder / f"{seed.name}.yaml"
            recipe.write_text(dump_recipe(wanted))
            print(f"{name}, {seed.name}", flush=True)
            foleyscale(Path.cwd(), "train", "contrastive", str(recipe), launcher=launcher())


def table(out: Path) -> str:
    """What every finished training reached, and its difference from the recipe on the same seeds, as Markdown."""
    done = {name: sorted(out.glob(f"factors/{name}/seed-*/contrastive/export/{EXPORTED}")) for name in VARIANTS}
    found = {name: {path.parts[-4]: reached(path.parents[1] / "metrics.jsonl") for path in paths} for name, paths in done.items()}
    names = [cell for name in MEASURES for cell in (name, "against the recipe")]
    lines = [f"| variant | {' | '.join(names)} |", f"|{'---|' * (1 + len(names))}"]
    lines += [f"| {name} | {' | '.join(_cells(seeds, found['recipe']))} |" for name, seeds in found.items() if seeds]
    head = f"{machine('torch', 'deepspeed')}. {len(found['recipe'])} seeds; ± is the standard error over seeds, of paired differences."
    text = "\n".join([head, "", *lines]) + "\n"
    (out / "factors.md").write_text(text)
    return text


def _cells(seeds: dict[str, dict[str, float]], baseline: dict[str, dict[str, float]]) -> list[str]:
    """Of each measure the mean, and the mean difference from the baseline over the seeds that both have."""
    shared, cells = sorted(seeds.keys() & baseline.keys()), []
    for key in MEASURES.values():
        differences = [seeds[seed][key] - baseline[seed][key] for seed in shared]
        cells += [over_seeds([found[key] for found in seeds.values()]), over_seeds(differences) if any(differences) else "–"]
    return cells


def reached(metrics: Path) -> dict[str, float]:
    """The last validation of a training."""
    validations = [line for line in map(json.loads, metrics.read_text().splitlines()) if MEASURES["R@1"] in line]
    if not validations:
        raise ValueError(f"{metrics}: no validation in it; give `python -m benchmarks.factors run` again, it goes on")
    return validations[-1]


def main() -> None:
    """Run the command that was given; none prints how to."""
    parser, runs, _ = commands(__doc__)
    runs.add_argument("--steps", type=int, default=200, help="of the contrastive stage")
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.out))
    else:
        run(options.out, options.steps, options.set)


if __name__ == "__main__":
    main()
