"""Whether preference rounds raise the reward of a generator that was stopped early, over seeds, and at what cost.

    python -m benchmarks.rounds run OUT [--steps 500] [--rounds 3] [--set key=value ...]
    python -m benchmarks.rounds table OUT

OUT is a folder of finished seeds from `python -m benchmarks.learning run OUT`. `run` makes OUT/seed-S/early for each: the seed's
autoencoder, encoder and features, a generator of its own that trains for fewer steps, and the rounds from there. It goes on where it
stopped. `table` prints Markdown from the signs of the rounds and keeps it as OUT/rounds.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import machine
from benchmarks.learning import foleyscale, launcher
from pipelines.recipes import dump_recipe, load_recipe
from pipelines.signs import BEST, ROUNDS

OWN = "early"
LINKED = ("autoencoder", "contrastive", "features")
SIGMAS, FLOW_RISE = 3.0, 0.05
"""Bars: least rise of the held-out reward in standard errors of the paired difference; largest relative rise of the flow loss."""


def run(out: Path, steps: int, rounds: int, overrides: Sequence[str]) -> None:
    """Train the early generator and its rounds for every seed. RuntimeError names the command that failed."""
    for seed in _seeds(out, "run/evaluation.json"):
        folder = seed.resolve() / OWN
        own = [f"out={folder.parent}", f"name={OWN}", f"generative.train.steps={steps}", f"preference.rounds={rounds}"]
        wanted = load_recipe(str(seed / "run" / "recipe.yaml"), [*own, *overrides])
        folder.mkdir(exist_ok=True)
        for name in LINKED:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path("..") / "run" / name)
        recipe = folder.with_name(f"{OWN}.yaml")
        recipe.write_text(dump_recipe(wanted))
        print(f"{seed.name}: {steps} steps, then {rounds} rounds", flush=True)
        foleyscale(Path.cwd(), "run", str(recipe), launcher=launcher())


@dataclass(frozen=True)
class Round:
    """A line of rounds.jsonl: a preference round, or as round 0 the generator that they start from."""

    seed: str
    round: int
    clips: int
    signs: dict

    def missed(self) -> list[str]:
        """Bars that it misses."""
        (rise, error), (onsets, onset_error) = self._change("reward"), self._change("onset_f1")
        met = {"reward": rise >= SIGMAS * error, "onset F1": onsets >= -2 * onset_error, "flow loss": self._flow_rise <= FLOW_RISE}
        return [name for name, is_met in met.items() if not is_met]

    def cells(self, kept: bool) -> list[str]:
        """Its line in the table."""
        value = {name: sign["value"] for name, sign in self.signs.items()}
        head = [self.seed, f"{self.round}{', kept' * kept}", f"{value['reward']:.4f}"]
        if not self.round:
            return [*head, "", "", f"{value['onset_f1']:.3f}", f"{value['flow_loss']:.4f}", "", ""]
        (rise, error), onsets = self._change("reward"), self._change("onset_f1")
        return [*head, f"{rise:+.4f} ± {error:.4f}", f"{rise / error:+.1f}" if error else "", f"{onsets[0]:+.3f} ± {onsets[1]:.3f}",
                f"{self._flow_rise:+.2%}", f"{value['accuracy']:.2f}", ", ".join(self.missed()) or "none"]

    def _change(self, name: str) -> tuple[float, float]:
        sign = self.signs[f"{name}_since_start"]
        return sign["value"], sign["error"]

    @property
    def _flow_rise(self) -> float:
        return self.signs["flow_rise_since_start"]["value"]


def table(out: Path) -> str:
    """A line per seed and round, as Markdown."""
    columns = ("seed", "round", "reward", "its change", "in s.e.", "change of onset F1", "rise of flow loss", "implicit accuracy", "missed")
    lines = [f"{machine('torch', 'deepspeed')}. Changes are since the start, ± is the standard error of the paired difference over the "
             "watch clips. Round 0 is the start, with its onset F1 and flow loss.", "",
             f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]  # fmt: skip
    for seed in _seeds(out, f"{OWN}/preference/{BEST}"):
        folder = seed / OWN / "preference"
        best = json.loads((folder / BEST).read_text())
        rounds = [Round(seed.name, **json.loads(line)) for line in (folder / ROUNDS).read_text().splitlines()]
        lines += [f"| {' | '.join(each.cells(kept=each.round == best['round']))} |" for each in rounds]
    text = "\n".join(lines) + "\n"
    (out / "rounds.md").write_text(text)
    return text


def _seeds(out: Path, finished: str) -> list[Path]:
    """Folders of the seeds that have this file; ValueError where none has."""
    found = sorted(path for path in out.glob("seed-*") if (path / finished).exists())
    if not found:
        raise ValueError(f"{out}: no seed-*/{finished}; give `python -m benchmarks.learning run {out}` first, "
                         "then the same of benchmarks.rounds")
    return found


def main() -> None:
    """Run the command that was given; none prints how to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs, tables = (commands.add_parser(name) for name in ("run", "table"))
    for each in (runs, tables):
        each.add_argument("out", type=Path)
    runs.add_argument("--steps", type=int, default=500, help="of the generator, before the rounds")
    runs.add_argument("--rounds", type=int, default=3)
    runs.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe")
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.out))
    else:
        run(options.out, options.steps, options.rounds, options.set)


if __name__ == "__main__":
    main()
