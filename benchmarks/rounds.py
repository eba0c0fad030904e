"""Whether preference rounds raise the reward of a generator that was trained for a short time, over seeds, and at what cost.

    python -m benchmarks.rounds run OUT [--name early] [--steps 200] [--rounds 2] [--set key=value ...]
    python -m benchmarks.rounds table OUT [--name early]

OUT is a folder of finished seeds from `python -m benchmarks.learning run OUT`. `run` makes OUT/seed-S/NAME for each: the seed's
autoencoder, encoder and features, a generator of its own that trains for fewer steps, the rounds from there, and an evaluation. It goes
on where it stopped. `table` prints Markdown and keeps it as OUT/NAME.md: what the kept round changed on the evaluation's clips, which
did not choose it, and every round on the watch clips; with --name run that of the seeds' own runs, where they had rounds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import machine
from benchmarks.learning import commands, foleyscale, launcher, over_seeds, seeds_with
from pipelines.recipes import dump_recipe, load_recipe
from pipelines.signs import BEST, ROUNDS

LINKED = ("autoencoder", "contrastive", "features")
SIGMAS, ONSET_SIGMAS, FLOW_RISE = 3.0, 2.0, 0.05
"""Bars: least rise of the reward and largest fall of onset F1, in standard errors of the paired difference; largest relative rise of the
flow loss."""
THEN = ", then the same of benchmarks.rounds"
CHANGED = ("reward", "onset F1", "flow loss")


def run(out: Path, name: str, steps: int, rounds: int, overrides: Sequence[str]) -> None:
    """Train the early generator and its rounds for every seed. RuntimeError names the command that failed."""
    for seed in seeds_with(out, "run/evaluation.json", THEN):
        folder = seed.resolve() / name
        own = [f"out={folder.parent}", f"name={name}", f"generative.train.steps={steps}", f"preference.rounds={rounds}"]
        wanted = load_recipe(str(seed / "run" / "recipe.yaml"), [*own, *overrides])
        folder.mkdir(exist_ok=True)
        for part in LINKED:
            if not (folder / part).exists():
                (folder / part).symlink_to(Path("..") / "run" / part)
        recipe = folder.with_name(f"{name}.yaml")
        recipe.write_text(dump_recipe(wanted))
        print(f"{seed.name}, {name}: {steps} steps, then {rounds} rounds", flush=True)
        foleyscale(Path.cwd(), "run", str(recipe), launcher=launcher())
        foleyscale(Path.cwd(), "evaluate", "--run", str(folder), fine=(0, 1))  # 1: a bar of the recipe was missed, as is to be expected


def table(out: Path, name: str) -> str:
    """What the kept round changed, and every round, as Markdown."""
    runs = {seed.name: seed / name for seed in seeds_with(out, f"{name}/evaluation.json", THEN)}
    text = "\n".join([f"{machine('torch', 'deepspeed')}. ± is the standard error of the paired difference over clips; of the mean, over "
                      "seeds.", "", *_kept_lines(runs), "", *_round_lines(runs)]) + "\n"  # fmt: skip
    (out / f"{name}.md").write_text(text)
    return text


def _kept_lines(runs: dict[str, Path]) -> list[str]:
    """The kept round against the start, on the clips of the evaluation."""
    lines = head("seed", "kept", *(f"{name}, change" for name in CHANGED), "flow loss, relative", "missed")
    changes = {name: [] for name in CHANGED}
    for seed, run in runs.items():
        figures = {figure["name"]: figure for figure in json.loads((run / "evaluation.json").read_text())["figures"]}
        kept, start = json.loads((run / "preference" / BEST).read_text())["round"], figures["flow loss, right video"]["value"]
        found = {name: figures.get(f"{name}, after minus before preference", {"value": 0.0, "standard_error": 0.0}) for name in CHANGED}
        pairs = {name: (figure["value"], figure["standard_error"]) for name, figure in found.items()}
        for name, (value, _) in pairs.items():
            changes[name].append(value)
        told = [f"{value:+.4f} ± {error:.4f}" for value, error in pairs.values()]
        rise = pairs["flow loss"][0] / start
        lines.append(line(seed, f"round {kept}" if kept else "the start", *told, f"{rise:+.1%}", ", ".join(missed(pairs, rise)) or "none"))
    return [*lines, line("mean", "", *(over_seeds(values) for values in changes.values()), "", "")]


def missed(changes: dict[str, tuple[float, float]], rise: float) -> list[str]:
    """Bars that a round misses, by its changes of reward and onset F1, each with its error, and the relative rise of the flow loss."""
    (reward, error), (onsets, onset_error) = changes["reward"], changes["onset F1"]
    met = {"reward": reward > 0 and reward >= SIGMAS * error, "onset F1": onsets >= -ONSET_SIGMAS * onset_error,
           "flow loss": rise <= FLOW_RISE}  # fmt: skip
    return [name for name, is_met in met.items() if not is_met]


def _round_lines(runs: dict[str, Path]) -> list[str]:
    """Every round on the clips that chose among them; round 0 is the start."""
    signs = ("reward", "reward_since_start", "onset_f1", "flow_loss", "accuracy")
    lines = head("seed", "round, on the watch clips", *signs)
    for seed, run in runs.items():
        for found in map(json.loads, (run / "preference" / ROUNDS).read_text().splitlines()):
            lines.append(line(seed, found["round"], *(_told(found["signs"].get(name)) for name in signs)))
    return lines


def _told(sign: dict | None) -> str:
    """A sign with its error; one that is missing or not finite is null in the file."""
    if sign is None or sign["value"] is None:
        return "–"
    return f"{sign['value']:.4f}" + ("" if sign["error"] is None else f" ± {sign['error']:.4f}")


def head(*names: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [line(*names), f"|{'---|' * len(names)}"]


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Run the command that was given; none prints how to."""
    parser, runs, tables = commands(__doc__)
    for each in (runs, tables):
        each.add_argument("--name", default="early", help="of the runs, so that several kinds of rounds stand beside each other")
    runs.add_argument("--steps", type=int, default=200, help="of the generator, before the rounds")
    runs.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.out, options.name))
    else:
        run(options.out, options.name, options.steps, options.rounds, options.set)


if __name__ == "__main__":
    main()
