"""What a sweep has found so far: sweep.csv, and sweep.html with the figures of MultiSoundGen's ablations."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from pipelines.config.sweep import SweepConfig
from pipelines.engine.saving import write_atomically
from pipelines.metrics.statistics import Paired, paired
from pipelines.page import Html, page, table, tag
from pipelines.page_parts import error, note, number, section
from pipelines.plots import Point
from pipelines.rounds_page import EXPLAINED, TITLES, charts_of, in_order, kept_round, read_json, read_points
from pipelines.signs import SIGNS

FIGURES = {"reward": "figure 6", "objective": "figure 7", "tuning": "figure 8", "winner": "figure D1"}
"""Figures of the paper by the key that their variants change; figure 5 is the first variant by itself."""
SCALES = {"reward": ("score",), "scoring": ("score", "preference.reward"), "onset_f1": (), "flow_loss": ()}
"""Signs that can be compared clip by clip, and the settings of signs.json that set the scale of each."""
_ABOUT = ("A curve is the mean over those seeds of a variant that have all rounds; the legend says how many. Its bars are standard errors "
          "over seeds, with one seed over clips. All seeds share the start, the clips and the noise that is sampled from: bars over seeds "
          "are 0 in round 0, and do not tell what other clips would give. Whether two variants differ is told by the columns difference "
          "and difference_error of sweep.csv, paired clip by clip with the first variant of the same seed. The first variant is solid. "
          "Measured on held-out clips of this run: onset F1 stands for the paper's DeSync, retrieval for its IB-score, distance "
          "for its FD; IS, which needs a classifier of sounds, is left out. " + EXPLAINED)
_OWN_SCORE = "Each variant's rewards are by its own score: compare their courses, not their heights."


@dataclass(frozen=True)
class Row:
    """One sign of one run after one round, a line of sweep.csv."""

    variant: str
    seed: int
    round: int
    sign: str
    value: float
    error: float | None
    """Standard error over clips; None where there is one value for all."""
    difference: float | None = None
    """From the first variant with the same seed, a mean over clips; None for that variant, and where they cannot be compared."""
    difference_error: float | None = None
    """Standard error of that mean, over clips."""


def write_results(folder: Path, config: SweepConfig, runs: Mapping[tuple[str, int], Path]) -> None:
    """Write sweep.csv and sweep.html in `folder` from what the runs, by variant and seed, have left."""
    rows = read_rows(runs, next(iter(config.variants)))
    write_atomically(folder / "sweep.csv", _csv(rows))
    write_atomically(folder / "sweep.html", _page(folder, config, rows, runs))


def read_rows(runs: Mapping[tuple[str, int], Path], first: str) -> list[Row]:
    """Every sign of every round that was measured; `first` is the variant that the others are compared with."""
    rows = []
    for (variant, seed), run in runs.items():
        points = read_points(run / "preference")
        other = runs.get((first, seed)) if variant != first else None
        rounds = {point.round for each in points.values() for point in each}
        against = {number: differences(run, other, number) if other else {} for number in rounds}
        for sign in in_order(list(points)):
            for point in points[sign]:
                found = against[point.round].get(sign)
                pair = (found.difference, found.standard_error) if found else (None, None)
                rows.append(Row(variant, seed, point.round, sign, point.value, point.error, *pair))
    return rows


def differences(run: Path, first: Path, number: int) -> dict[str, Paired]:
    """Sign -> by how much round `number` of one run differs from that of another on the same clips; only what has one scale in both."""
    name = f"round-{number}" if number else "start"
    signs = [read_json(each / "preference" / name / SIGNS) for each in (run, first)]
    if None in signs:
        return {}
    _, *places = np.intersect1d(*(each["positions"] for each in signs), return_indices=True)  # a clip may break in one of the two
    found = {}
    for sign, scale in SCALES.items():
        same = all(len({str(each["settings"].get(key)) for each in signs}) == 1 for key in ("data", *scale))
        if same and all(sign in each["per_clip"] for each in signs):
            values = [np.array(each["per_clip"][sign], dtype=np.float64)[rows] for each, rows in zip(signs, places, strict=True)]
            if len(places[0]) > 1 and np.isfinite(values).all():  # null, a sound that was not finite, is NaN
                found[sign] = paired(*values)
    return found


def whole(rows: Sequence[Row], rounds: int) -> set[tuple[str, int]]:
    """Variants and seeds whose charted signs are there in all rounds: a mean over other seeds in each round would bend the curve."""
    measured: dict[tuple[str, int], dict[str, set[int]]] = {}
    for row in rows:
        if row.sign in TITLES:
            measured.setdefault((row.variant, row.seed), {}).setdefault(row.sign, set()).add(row.round)
    return {run for run, signs in measured.items() if all(there >= set(range(rounds + 1)) for there in signs.values())}


def over_seeds(rows: Sequence[Row]) -> dict[str, dict[str, list[Point]]]:
    """Variant -> sign -> its mean over the seeds that have it, round by round.

    The error is the standard error over seeds, or where there is one seed only, that of its run over clips.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.sign, row.round), []).append(row)
    found: dict[str, dict[str, list[Point]]] = {}
    for (variant, sign, round_number), group in sorted(groups.items(), key=lambda item: item[0][2]):
        values = np.array([row.value for row in group])
        spread = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else group[0].error
        found.setdefault(variant, {}).setdefault(sign, []).append(Point(round_number, float(values.mean()), spread))
    return found


def figures(config: SweepConfig) -> dict[str, list[str]]:
    """Title of each figure -> its variants: the first by itself, then with those that change the same keys of the recipe."""
    base, *others = config.variants
    found: dict[str, list[str]] = {f"{base} (figure 5)": [base]}
    for name in others:
        keys = _changed(config, name)
        told = ", ".join(FIGURES[key] for key in keys if key in FIGURES)
        title = ", ".join(keys or ["the same"]) + (f" ({told})" if told else "")
        found.setdefault(title, [base]).append(name)
    return found


def _changed(config: SweepConfig, name: str) -> list[str]:
    """Keys of the recipe that a variant has otherwise than the first one."""
    base, own = next(iter(config.variants.values())), config.variants[name]
    return sorted(key for key in own.keys() | base.keys() if own.get(key) != base.get(key))


def _csv(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([each.name for each in fields(Row)])
    writer.writerows(map(astuple, rows))
    return file.getvalue()


def _page(folder: Path, config: SweepConfig, rows: Sequence[Row], runs: Mapping[tuple[str, int], Path]) -> str:
    drawn, name = whole(rows, config.rounds), folder.resolve().parent.name
    means = over_seeds([row for row in rows if (row.variant, row.seed) in drawn and row.round <= config.rounds])
    sections = []
    for place, (title, variants) in enumerate(figures(config).items()):
        curves = {_label(variant, drawn): means[variant] for variant in variants if variant in means}
        own_score = any("score" in _changed(config, variant) for variant in variants)
        told = [_OWN_SCORE] * own_score + _left_out(config, variants, drawn)
        sections.append(section(title, [charts_of(curves, f"figure-{place}"), *map(note, told)]))
    return page(f"{name} · sweep · Foleyscale", tag("header", tag("h1", f"{name} · sweep")), section("About", [note(_ABOUT)]), *sections,
                section("Rounds that were kept", [_kept(runs)]))


def _label(variant: str, drawn: Collection[tuple[str, int]]) -> str:
    count = sum(name == variant for name, _ in drawn)
    return f"{variant}, {count} seeds" if count > 1 else f"{variant}, 1 seed: bars over clips"


def _left_out(config: SweepConfig, variants: Sequence[str], drawn: Collection[tuple[str, int]]) -> list[str]:
    """A line about the runs that are in no curve."""
    missing = {variant: [str(seed) for seed in config.seeds if (variant, seed) not in drawn] for variant in variants}
    told = "; ".join(f"{variant} with seed {', '.join(seeds)}" for variant, seeds in missing.items() if seeds)
    return [f"Not drawn, as rounds are still to come or gave no finite sound: {told}."] if told else []


def _kept(runs: Mapping[tuple[str, int], Path]) -> Html:
    """Which round each run keeps, and what got worse in it."""
    rows = []
    for (variant, seed), run in runs.items():
        best = kept_round(run / "preference")
        if best is None:
            rows.append([variant, str(seed), "–", "–", "not complete"])
            continue
        value = f"{number(best['value'])} {error(best['error'])}".strip()
        rows.append([variant, str(seed), str(best["round"]), value, "; ".join([best["reason"], *best["warnings"]])])
    return table(["variant", "seed", "round", "value", "why"], rows, numeric=frozenset({1, 2, 3}))
