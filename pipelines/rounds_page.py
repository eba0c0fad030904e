"""Preference rounds on a page: their signs over the rounds, which round was kept and why, and the candidates' scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.index import ShardSet
from pipelines.page import Html, table, tag
from pipelines.page_parts import error, note, number, pill
from pipelines.plots import Point, variants_svg
from pipelines.signs import BEST, ROUNDS

__all__ = ["EXPLAINED", "SWEEP", "charts_of", "in_order", "kept_round", "read_json", "read_points", "rounds_content"]

TITLES = {
    "reward": "reward, own encoder ↑",
    "scoring": "reward, scoring encoder ↑",
    "onset_f1": "onset F1 ↑",
    "flow_loss": "held-out flow loss ↓",
    "retrieval": "retrieval R@1 ↑",
    "distance": "distance of the latents from the truth ↓",
}
"""What is charted, in this order, and which way is better."""
EXPLAINED = ("Retrieval is of the generated sounds by this run's own encoder; the distance is the Fréchet distance of the latents' means "
             "over time from those of the true sounds.")
SWEEP = "sweep"
"""Folder of a run's sweep, with its page."""
_SHOWN_CLIPS = 40


def read_points(preference: Path) -> dict[str, list[Point]]:
    """Signs by name, each over the rounds that have it, of a run's folder `preference`; empty where nothing was measured."""
    points: dict[str, list[Point]] = {}
    path = preference / ROUNDS
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        for name, sign in row["signs"].items():
            if sign["value"] is not None:  # a sound that was not finite
                points.setdefault(name, []).append(Point(row["round"], sign["value"], sign["error"]))
    return points


def in_order(names: Sequence[str]) -> list[str]:
    """Those of the charted signs first, in their order."""
    return [name for name in TITLES if name in names] + [name for name in names if name not in TITLES]


def kept_round(preference: Path) -> dict | None:
    """What best.json says, None where no round was chosen yet."""
    return read_json(preference / BEST)


def read_json(path: Path) -> dict | None:
    """None where there is no such file; ValueError where it is not JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        raise ValueError(f"{path} is not JSON ({problem}): delete it and run again what writes it") from problem


def charts_of(variants: Mapping[str, Mapping[str, Sequence[Point]]], prefix: str) -> Html:
    """A panel per charted sign that any of the variants has; `prefix` keeps ids apart."""
    panels = []
    for name, title in TITLES.items():
        # A variant without this sign keeps its place, and so all others their colours.
        curves = {variant: signs.get(name, ()) for variant, signs in variants.items()}
        if any(curves.values()):
            panels.append(tag("figure", tag("h4", title), Html(variants_svg(curves, f"{prefix}-{name}"))))
    return tag("div", *panels, class_="charts")


def rounds_content(run: Path) -> list[Html]:
    """The section of a run's report."""
    points, best = read_points(run / "preference"), kept_round(run / "preference")
    content = _verdict(best) if best else []
    if points:
        hint = note("Held-out clips that the evaluation does not look at. In brackets: change since the start, in standard errors of the "
                    f"paired difference. {EXPLAINED}")
        content += [_signs(points, best), hint, charts_of({"": points}, "signs"), _details(points)]
    content += _candidates(run)
    if (run / (compared := f"{SWEEP}/sweep.html")).exists():
        content.append(tag("p", "Variants are compared in ", tag("a", compared, href=compared), "."))
    return content or [note("No preference round was run: there are no candidates below preference/.")]


def _verdict(best: dict) -> list[Html]:
    """Which round was kept and why, and what got worse."""
    warnings = [tag("p", pill(False, "got worse"), Html(" "), warning) for warning in best["warnings"]]
    return [tag("p", pill(best["round"] > 0, f"round {best['round']} is kept" if best["round"] else "the start is kept"), Html(" "),
                best["reason"]), *warnings]


def _signs(points: Mapping[str, Sequence[Point]], best: dict | None) -> Html:
    """A row per round: each charted sign, and by how many standard errors it has changed since the start."""
    names = [name for name in TITLES if name in points]
    rounds = sorted({point.round for name in names for point in points[name]})
    rows = [[_round_name(round_number, best), *(_cell(points, name, round_number) for name in names)] for round_number in rounds]
    return table(["round", *(TITLES[name] for name in names)], rows, numeric=frozenset(range(1, len(names) + 1)))


def _round_name(round_number: int, best: dict | None) -> str:
    name = str(round_number) if round_number else "start"
    return pill(True, f"{name}, kept") if best and best["round"] == round_number else name


def _cell(points: Mapping[str, Sequence[Point]], name: str, round_number: int) -> str:
    here = next((point for point in points[name] if point.round == round_number), None)
    if here is None:
        return "–"
    since = next((point for point in points.get(f"{name}_since_start", ()) if point.round == round_number), None)
    change = f" ({since.value / since.error:+.1f} s.e.)" if since and since.error else ""
    return f"{number(here.value)} {error(here.error)}{change}".strip()


def _details(points: Mapping[str, Sequence[Point]]) -> Html:
    """Every other sign: losses, margins, accuracy, changes."""
    names = [name for name in points if name not in TITLES]
    rounds = sorted({point.round for name in names for point in points[name]})
    rows = []
    for name in names:
        found = {point.round: f"{number(point.value)} {error(point.error)}".strip() for point in points[name]}
        rows.append([name, *(found.get(round_number, "–") for round_number in rounds)])
    head = ["sign", *(f"round {round_number}" if round_number else "start" for round_number in rounds)]
    return tag("details", tag("summary", "all signs: changes, drift, losses, margins, implicit accuracy"),
               table(head, rows, numeric=frozenset(range(1, len(head)))))


def _candidates(run: Path) -> list[Html]:
    content, folders = [], run.glob("preference/round-*/candidates/dataset.json")
    for path in sorted(folders, key=lambda path: int(path.parent.parent.name.rpartition("-")[2])):
        shards = ShardSet.open(str(path.parent))
        places = [(shard, row) for shard, count in enumerate(shards.counts) for row in range(int(count))]
        cells = [_scores(shards, *place) for place in places[:_SHOWN_CLIPS]]
        head = ["clip", *(f"candidate {i + 1}" for i in range(max(map(len, cells), default=2) - 2)), "true sound"]
        summary = f"scores of {len(cells)} of {len(places):,} clips; the loser and the winner of each pair are marked"
        scores = table(head, cells, numeric=frozenset(range(1, len(head))))
        content += [tag("h3", path.parent.parent.relative_to(run).as_posix()), tag("details", tag("summary", summary), scores)]
    return content


def _scores(shards: ShardSet, shard: int, row: int) -> list[str]:
    """A clip's key, its candidates' scores and that of its true sound."""
    record = json.loads(shards.read(shard, row, ["round.json"])["round.json"])
    cells = ["–" if score is None else f"{score:.4f}" for score in [*record["scores"], record["truth"]]]
    winner = record["winner"] if isinstance(record["winner"], int) else -1  # the true sound, in the last column
    for place, passed in ((record["loser"], False), (winner, True)):
        cells[place] = pill(passed, cells[place])
    return [shards.entry(shard, row).key, *cells]
