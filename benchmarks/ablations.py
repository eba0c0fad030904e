"""What a sweep of the preference rounds has found, as a table and as curves.

    foleyscale sweep RUN preference [rounds=2 ...]
    python -m benchmarks.ablations RUN

Reads RUN/sweep/sweep.csv. Prints Markdown, each variant's last round against that of the first variant on the same clips with the same
noise, and keeps it as RUN/sweep/ablations.md; draws every round as RUN/sweep/ablations.svg.
"""

from __future__ import annotations

import argparse
import csv
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.common import machine
from benchmarks.learning import COLOURS, INK, draw
from benchmarks.rounds import head, line
from pipelines.sweep_results import Row, over_seeds

SIGNS = {"reward": "reward", "onset_f1": "onset F1", "flow_loss": "flow loss"}
DASHES = ("-", "--", ":")


def read(run: Path) -> list[Row]:
    """The sweep's lines about the signs that are shown; ValueError where there was none."""
    path = run / "sweep" / "sweep.csv"
    if not path.exists():
        raise ValueError(f"{path}: not there; give `foleyscale sweep {run} preference` first")
    with open(path, newline="") as file:
        return [_row(**each) for each in csv.DictReader(file) if each["sign"] in SIGNS]


def _row(variant: str, seed: str, round: str, sign: str, **numbers: str) -> Row:
    return Row(variant, int(seed), int(round), sign, **{name: float(text) if text else None for name, text in numbers.items()})


def table(rows: list[Row]) -> str:
    """The last round of every variant and seed, with its difference from the first variant."""
    lines = head("variant", "seed", "round", *(name for sign in SIGNS.values() for name in (sign, f"minus {rows[0].variant}")))
    for (variant, seed), found in groupby(rows, attrgetter("variant", "seed")):
        measured = {(row.sign, row.round): row for row in found}
        last = max(number for _, number in measured)
        lines.append(line(variant, seed, last, *(cell for sign in SIGNS for cell in _cells(measured.get((sign, last))))))
    return "\n".join(lines) + "\n"


def _cells(row: Row | None) -> tuple[str, str]:
    """Value and difference with their standard errors over clips; a dash where there is none, or no common scale."""
    if row is None:
        return "–", "–"
    difference = "–" if row.difference is None else f"{row.difference:+.4f} ± {row.difference_error:.4f}"
    return f"{row.value:.4f} ± {row.error:.4f}", difference


def _curves(axes: Axes, rows: list[Row], sign: str) -> None:
    """Mean over the seeds of each variant, round by round."""
    for number, (variant, signs) in enumerate(over_seeds(rows).items()):
        points = signs.get(sign, [])
        dashes, colour = DASHES[number // len(COLOURS) % len(DASHES)], COLOURS[number % len(COLOURS)]
        axes.plot([point.round for point in points], [point.value for point in points], dashes, color=colour, marker="o", markersize=3,
                  label=variant)  # fmt: skip
    axes.set(title=SIGNS[sign], xlabel="round", xticks=sorted({row.round for row in rows}))
    if sign == [*SIGNS][-1]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, handlelength=3, loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> None:
    """Print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    rows = read(run)
    text = f"{machine('torch', 'deepspeed')}. ± is the standard error over clips.\n\n{table(rows)}"
    (run / "sweep" / "ablations.md").write_text(text)
    draw(run / "sweep" / "ablations.svg", (9, 3.2), *(lambda axes, sign=sign: _curves(axes, rows, sign) for sign in SIGNS))
    print(text)


if __name__ == "__main__":
    main()
