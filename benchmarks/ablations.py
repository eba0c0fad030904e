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
from operator import itemgetter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from benchmarks.common import machine
from benchmarks.learning import COLOURS, INK, draw

SIGNS = {"reward": "reward", "onset_f1": "onset F1", "flow_loss": "flow loss"}
DASHES = ("-", "--", ":")
Rows = list[dict[str, str]]
"""Lines of sweep.csv: variant, seed, round, sign, value, error, difference, difference_error."""


def read(run: Path) -> Rows:
    """The sweep's lines about the signs that are shown; ValueError where there was none."""
    path = run / "sweep" / "sweep.csv"
    if not path.exists():
        raise ValueError(f"{path}: not there; give `foleyscale sweep {run} preference` first")
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row["sign"] in SIGNS]


def table(rows: Rows) -> str:
    """The last round of every variant and seed, with its difference from the first variant."""
    first = rows[0]["variant"]
    lines = [f"| variant | seed | round | {' | '.join(f'{name} | minus {first}' for name in SIGNS.values())} |",
             f"|{'---|' * (3 + 2 * len(SIGNS))}"]  # fmt: skip
    for (variant, seed), found in groupby(rows, itemgetter("variant", "seed")):
        measured = {(row["sign"], int(row["round"])): row for row in found}
        last = max(number for _, number in measured)
        cells = [_cells(measured.get((sign, last))) for sign in SIGNS]
        lines.append(f"| {variant} | {seed} | {last} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, str] | None) -> str:
    """Value and difference with their standard errors over clips; a dash where there is none, or no common scale."""
    if row is None:
        return "– | –"
    value = f"{float(row['value']):.4f} ± {float(row['error']):.4f}"
    return f"{value} | " + (f"{float(row['difference']):+.4f} ± {float(row['difference_error']):.4f}" if row["difference"] else "–")


def _curves(axes: Axes, rows: Rows, sign: str) -> None:
    """Mean over the seeds of each variant, round by round."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for number, variant in enumerate(variants):
        own = [(int(row["round"]), float(row["value"])) for row in rows if (row["variant"], row["sign"]) == (variant, sign)]
        rounds = sorted({place for place, _ in own})
        means = [np.mean([value for place, value in own if place == each]) for each in rounds]
        dashes, colour = DASHES[number // len(COLOURS) % len(DASHES)], COLOURS[number % len(COLOURS)]
        axes.plot(rounds, means, dashes, color=colour, marker="o", markersize=3, label=variant)
    axes.set(title=SIGNS[sign], xlabel="round", xticks=sorted({int(row["round"]) for row in rows}))
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
