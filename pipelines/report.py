"""One report.html per run that opens from disk: figures and bars, examples to watch, curves, preference rounds, recipe."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np

from pipelines.page import Html, page, table, tag
from pipelines.page_parts import error, note, number, pill, section
from pipelines.plots import Curve, curves_svg, spectrogram_png
from pipelines.rounds_page import SWEEP, read_json, rounds_content

__all__ = ["read_curves", "write_report"]

_SIGNS = {">=": "≥", "<=": "≤"}
_MACHINE = {"learning_rate", "gradient_norm", "seconds_per_step", "samples_per_second", "data_wait", "quarantined", "skipped"}
_DETAILS = ("time/", "speed/", "memory/", "gradient_norm/")
"""Beginnings of the names that are left to TensorBoard."""


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write `run_dir`/report.html from what the run left there, and return its path; what is missing is named and left out.

    Read are evaluation.json (bars, figures, examples, environment), metrics.jsonl and recipe.yaml at any depth, and of the preference
    rounds the signs, the round that was kept, and the candidate shards. ValueError, ShardError: one of them cannot be read.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise ValueError(f"no run folder {run}: give the folder that holds the stages' folders")
    evaluation = read_json(run / "evaluation.json") or {}
    name = run.resolve().name
    document = page(
        f"{name} · Foleyscale",
        tag("header", tag("h1", name), *_verdict(evaluation.get("bars", []))),
        section("Results", _results(evaluation)),
        section("Examples", _examples(run, evaluation.get("examples", []))),
        section("Training", _training(run)),
        section("Preference rounds", rounds_content(run)),
        section("Recipe", _recipes(run)),
        section("Environment", _environment(evaluation.get("environment", {}))),
    )
    path = run / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(document, encoding="utf-8")
    os.replace(partial, path)
    return path


def read_curves(path: str | os.PathLike) -> list[Curve]:
    """Curves of one metrics.jsonl in order of appearance, the loss first; `validation/x` joins the curve of `x`.

    A line that a killed run left half written is passed over, and of two lines on one step the later counts.
    """
    points: dict[str, dict[str, dict[int, float]]] = {}
    for row in _read_lines(path):
        for key, value in row.items():
            if key == "step" or "step" not in row or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            name = key.removeprefix("validation/")
            points.setdefault(name, {"train": {}, "validation": {}})["train" if name == key else "validation"][row["step"]] = value
    curves = [Curve(name=name, **{kind: sorted(found.items()) for kind, found in kinds.items()}) for name, kinds in points.items()]
    return sorted(curves, key=lambda curve: curve.name != "loss")


def _verdict(bars: list[dict]) -> list[Html]:
    missed = sum(not bar["passed"] for bar in bars)
    if not bars:
        return []
    return [pill(not missed, f"{missed} of {len(bars)} bars missed" if missed else f"all {len(bars)} bars passed")]


def _results(evaluation: dict) -> list[Html]:
    bars, figures = evaluation.get("bars", []), evaluation.get("figures", [])
    content = []
    if bars:
        rows = [[bar["name"], number(bar["value"]), f"{_SIGNS.get(bar['comparison'], bar['comparison'])} {number(bar['bound'])}",
                 pill(bar["passed"], "passed" if bar["passed"] else "missed"), bar.get("explanation", "")] for bar in bars]
        content.append(table(["bar", "value", "bound", "", "what it means"], rows, numeric=frozenset({1, 2})))
    if figures:
        rows = [[figure["name"], number(figure["value"]), error(figure.get("standard_error")), figure.get("note") or ""]
                for figure in figures]
        content.append(table(["figure", "value", "s.e.", "note"], rows, numeric=frozenset({1, 2})))
    return content or [note("The run has not been evaluated: evaluation.json is missing or empty.")]


def _examples(run: Path, examples: list[dict]) -> list[Html]:
    shown = [tag("article", tag("h3", example.get("title") or example.get("key", "")), _sides(run, example)) for example in examples]
    if not shown:
        return [note("No examples were generated.")]
    hint = note("A click on a spectrogram jumps there. Both of a pair share one colour scale; low frequencies are at the bottom.")
    return [hint, tag("div", *shown, class_="examples")]


def _sides(run: Path, example: dict) -> Html:
    mels = {side: _load_mel(run, example.get(f"{side}_mel")) for side in ("truth", "generated")}
    present = [mel for mel in mels.values() if mel is not None]
    low, high = (min(mel.min() for mel in present), max(mel.max() for mel in present)) if present else (0.0, 1.0)
    return tag("div", *(_side(run, side, example.get(f"{side}_video"), mel, low, high) for side, mel in mels.items()), class_="sides")


def _side(run: Path, name: str, video: str | None, mel: np.ndarray | None, low: float, high: float) -> Html:
    content = [tag("h4", name)]
    if _inside(run, video):
        content.append(tag("video", src=quote(video), controls=True, preload="metadata", playsinline=True))
    else:
        content.append(note(f"no video: {video} is not in the run folder" if video else "no video"))
    if mel is not None:
        data = base64.b64encode(spectrogram_png(mel, low, high)).decode()
        picture = tag("img", src=f"data:image/png;base64,{data}", alt=f"log-mel spectrogram of the {name} audio")
        content.append(tag("div", picture, tag("div", class_="head"), class_="mel"))
    return tag("div", *content, class_="side")


def _load_mel(run: Path, relative: str | None) -> np.ndarray | None:
    """Log-mel (F, T) of a file below the run, None where there is none."""
    if not _inside(run, relative):
        return None
    mel = np.squeeze(np.load(run / relative, allow_pickle=False)).astype(np.float64)
    if mel.ndim != 2 or not mel.size or not np.isfinite(mel).all():
        raise ValueError(f"{run / relative} holds no finite log-mel (F, T) but shape {mel.shape}: generate the examples again")
    return mel


def _inside(run: Path, relative: str | None) -> bool:
    """Whether a file lies below the run: the report is moved with its folder, and links nowhere else."""
    if not relative:
        return False
    path = (run / relative).resolve()
    return path.is_file() and path.is_relative_to(run.resolve())


def _training(run: Path) -> list[Html]:
    content = []
    for path in _found(run, "metrics.jsonl"):
        prefix, curves = f"chart-{len(content)}", [curve for curve in read_curves(path) if not curve.name.startswith(_DETAILS)]
        charts = {curve.name: Html(curves_svg(curve, f"{prefix}-{i}")) for i, curve in enumerate(curves)}
        framed = {name: tag("figure", tag("h4", name), svg) for name, svg in charts.items()}
        machine = [framed.pop(name) for name in charts if name in _MACHINE]
        folder = path.parent.relative_to(run).as_posix()
        content += [tag("h3", folder), note(_effort(curves)), tag("div", *framed.values(), class_="charts")]
        if machine:
            content.append(tag("details", tag("summary", "optimiser and throughput"), tag("div", *machine, class_="charts")))
    return content or [note("No stage has logged anything: there is no metrics.jsonl below the run folder.")]


def _effort(curves: list[Curve]) -> str:
    """How many steps a stage took, and about how long: not every step is logged."""
    steps = max((points[-1][0] for curve in curves for points in (curve.train, curve.validation) if points), default=0)
    timed = [value for curve in curves if curve.name == "seconds_per_step" for _, value in curve.train]
    return f"{steps:,} steps" + (f", about {float(np.mean(timed)) * steps:,.0f} s" if timed else "")


def _recipes(run: Path) -> list[Html]:
    """Every distinct recipe once: a stage's copy usually repeats the run's."""
    texts: dict[str, str] = {}
    for path in sorted(_found(run, "recipe.yaml"), key=lambda path: len(path.parts)):
        texts.setdefault(path.read_text(encoding="utf-8"), path.relative_to(run).as_posix())
    return [tag("details", tag("summary", name), tag("pre", text)) for text, name in texts.items()] or [note("No recipe.yaml was found.")]


def _environment(environment: dict) -> list[Html]:
    rows = [[name, value] for name, value in _flatten(environment)]
    return [table([], rows)] if rows else [note("The environment was not recorded.")]


def _flatten(value, name: str = ""):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name} · {key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    else:
        yield name, number(value) if isinstance(value, float) else str(value)


def _found(run: Path, name: str) -> list[Path]:
    """All below the run but those of a sweep, whose runs have reports of their own."""
    paths = (path for path in run.rglob(name) if path.relative_to(run).parts[0] != SWEEP)
    return sorted(paths, key=_natural)


def _natural(path: Path) -> list[str | int]:
    """Sorting key that puts round-10 after round-2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.as_posix())]


def _read_lines(path: str | os.PathLike) -> list[dict]:
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
