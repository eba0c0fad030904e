"""Signs of over-optimisation: what the watch clips say of each preference round, and which round is worth keeping."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines.config.preference import WatchConfig
from pipelines.engine.saving import write_atomically
from pipelines.metrics.distribution import frechet_distance
from pipelines.metrics.statistics import Paired, paired

SIGNS, BEST, ROUNDS = "signs.json", "best.json", "rounds.jsonl"
MEASURES = {"reward": "held-out reward", "onset_f1": "onset F1", "flow_loss": "held-out flow loss"}
"""What a round can be kept by; of the flow loss less is better."""
_GAMED = 2.0
"""Standard errors by which generated sounds outdo the true ones before that is told."""


class Value(NamedTuple):
    """One sign."""

    value: float
    error: float | None = None
    """Standard error of a mean over clips."""


@dataclass(frozen=True, kw_only=True)
class Signs:
    """One round, measured."""

    round: int
    """0 is the generator that the rounds start from."""
    positions: np.ndarray
    """Which clips of the held-out split were measured (N,), rising."""
    clips: Mapping[str, np.ndarray]
    """Of each of these N watch clips: `reward` by the run's own encoder, `onset_f1` and `flow_loss`, each (N,);
    `reward_true` (N,), that of the true sound through autoencoder and vocoder; `scoring` and `scoring_true` (N,), the same by
    `preference.reward`, where another encoder scores; `latent_mean` and `latent_square` (N, C), means over time of the latents, and
    `latent_true` (N, C), the mean of the true sound's."""
    figures: Mapping[str, float]
    """Of the round as a whole: `retrieval`, R@1 of the sounds among the watch clips, and `retrieval_chance`; `inverted`, the share of
    training videos whose true sound scored below the loser; and from the end of its training losses, margins and accuracy."""

    @property
    def finite(self) -> bool:
        """Whether every sound could be measured."""
        return all(np.isfinite(values).all() for values in self.clips.values())

    def values(self) -> dict[str, Value]:
        """What this round says by itself."""
        found = {name: _mean(self.clips[name]) for name in self._compared()}
        found |= {f"{name}_above_true": _difference(self.clips[name], self.clips[f"{name}_true"])
                  for name in ("reward", "scoring") if name in self.clips}
        return found | {"distance": Value(distance(self))} | {name: Value(value) for name, value in self.figures.items()}

    def against(self, start: Signs, previous: Signs) -> dict[str, Value]:
        """What has changed, clip by clip, since the start and since the round before; and how far the latents have drifted. All three
        are to be of the same clips, as `shared` gives them."""
        found = {f"{name}_since_{when}": _difference(self.clips[name], other.clips[name])
                 for name in self._compared() for when, other in (("start", start), ("previous", previous))}
        rises = {f"flow_rise_since_{when}": Value(_rise(self, other)) for when, other in (("start", start), ("previous", previous))}
        return found | rises | {name: Value(value) for name, value in drift(self, start).items()}

    def _compared(self) -> list[str]:
        return [name for name in (*MEASURES, "scoring") if name in self.clips]

    def save(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Keep them as signs.json of `folder`, with what they depend on."""
        clips = {name: _plain(values) for name, values in self.clips.items()}
        found = {"round": self.round, "clips": len(self.positions), "signs": _described(self.values()), "settings": settings,
                 "figures": {name: _plain(value) for name, value in self.figures.items()}, "positions": self.positions.tolist(),
                 "per_clip": clips}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SIGNS, json.dumps(found))

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> Signs | None:
        """Those of `folder`; None where there are none, or they depend on something else than `settings`."""
        if not (folder / SIGNS).exists():
            return None
        known = json.loads((folder / SIGNS).read_text())
        if known["settings"] != json.loads(json.dumps(settings)):
            return None
        figures = {name: float(_array(value)) for name, value in known["figures"].items()}
        clips = {name: _array(values) for name, values in known["per_clip"].items()}
        return cls(round=known["round"], positions=np.array(known["positions"]), clips=clips, figures=figures)


def shared(signs: Sequence[Signs]) -> list[Signs]:
    """The rounds on the clips that were measured in all of them: a clip that was broken in one round may have been mended by the next.

    ValueError where these are too few for a standard error.
    """
    common = reduce(np.intersect1d, (each.positions for each in signs))
    if len(common) < 2:
        raise ValueError(f"the preference rounds were measured on clips of which {len(common)} are the same: delete {SIGNS} of each round "
                         "and run again")
    return [_on(each, common) for each in signs]


def _on(signs: Signs, positions: np.ndarray) -> Signs:
    rows = np.searchsorted(signs.positions, positions)
    return replace(signs, positions=positions, clips={name: values[rows] for name, values in signs.clips.items()})


def distance(signs: Signs) -> float:
    """How far the latents are from the true ones as distributions over clips: the Frechet distance of their means over time."""
    return frechet_distance(signs.clips["latent_mean"], signs.clips["latent_true"]) if signs.finite else math.nan


def drift(signs: Signs, start: Signs) -> dict[str, float]:
    """How far the latents have moved as a distribution: `drift`, the Frechet distance of their means over time, and `spread`, the ratio
    of a channel's standard deviation that is furthest from 1. An unchanged model has 0 and 1."""
    if not (signs.finite and start.finite):
        return {"drift": math.nan, "spread": math.nan}
    ratios = _deviation(signs) / _deviation(start)
    return {"drift": frechet_distance(signs.clips["latent_mean"], start.clips["latent_mean"]),
            "spread": float(ratios[np.abs(np.log(ratios)).argmax()])}


def _deviation(signs: Signs) -> np.ndarray:
    """Standard deviation (C,) of the latents over clips and time."""
    variance = signs.clips["latent_square"].mean(axis=0) - signs.clips["latent_mean"].mean(axis=0) ** 2
    return np.sqrt(variance.clip(min=1e-12))


@dataclass(frozen=True, kw_only=True)
class Best:
    """The round that is kept, and why."""

    round: int
    """0 is the generator that the rounds start from."""
    measure: str
    """`preference.watch.keep`, or last where nothing was measured."""
    value: float | None
    """Mean of the measure over the watch clips; of the reward where the last round is kept."""
    error: float | None
    """Its standard error."""
    reason: str
    """One line."""
    warnings: tuple[str, ...] = ()
    """What got worse, and from which round on; each one line."""
    watched: tuple[int, int] | None = None
    """Positions in the held-out split of the first watch clip and after the last, which no evaluation may report; None where nothing was
    measured."""

    def line(self) -> str:
        """All of it in one line."""
        return "; ".join((self.reason, *self.warnings))


def best_round(signs: Sequence[Signs], watch: WatchConfig) -> Best:
    """The round to keep of the start and those after it, in order.

    Rounds that raise the flow loss or lower onset F1 by more than `watch` allows are out. Of the others a later one is kept if it beats
    what was kept before by a standard error of the paired difference: in doubt the one nearer to the data stays.
    """
    watched = min(int(each.positions[0]) for each in signs), max(int(each.positions[-1]) for each in signs) + 1
    signs = shared(signs)
    measure, vetoes = "reward" if watch.keep == "last" else watch.keep, _vetoes(signs, watch)
    out = {number for found in vetoes.values() for number in found.rounds}
    kept = signs[-1] if watch.keep == "last" else _beaten_by_none(signs, out, measure)
    findings = vetoes | _worse(signs, kept, measure) | _gaming(signs)
    warnings = tuple(f"{found.where(signs[-1].round)} {text.format(found.worst)}" for text, found in findings.items() if found.rounds)
    value, error = _mean(kept.clips[measure])
    reason = _reason(kept.round, len(signs) - 1, len(out), watch.keep, f"{MEASURES[measure]} ({value:.4g} ± {error:.2g})")
    return Best(round=kept.round, measure=watch.keep, value=value, error=error, reason=reason, warnings=warnings, watched=watched)


def _beaten_by_none(signs: Sequence[Signs], out: Collection[int], measure: str) -> Signs:
    kept = signs[0]
    for each in signs[1:]:
        if each.round not in out and _gain(each, kept, measure).sigmas >= 1:
            kept = each
    return kept


@dataclass(frozen=True)
class _Finding:
    """Rounds that have something in common."""

    rounds: Mapping[int, float]
    """How bad it is, by round."""

    @property
    def worst(self) -> float:
        """The largest size of it."""
        return max(self.rounds.values(), key=abs)

    def where(self, last: int) -> str:
        """The rounds in words."""
        numbers = sorted(self.rounds)
        if len(numbers) > 1 and numbers == list(range(numbers[0], last + 1)):
            return f"from round {numbers[0]} on"
        return f"in round{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _vetoes(signs: Sequence[Signs], watch: WatchConfig) -> dict[str, _Finding]:
    """What speaks against rounds, by the words that tell it."""
    start, later = signs[0], [each for each in signs[1:] if each.finite]
    flow = {each.round: _rise(each, start) for each in later}
    onsets = {each.round: paired(each.clips["onset_f1"], start.clips["onset_f1"]).sigmas for each in later}
    return {
        "sounds are not finite": _Finding({each.round: math.inf for each in signs[1:] if not each.finite}),
        "the held-out flow loss is above the start's ({0:+.1%})":
            _Finding({number: rise for number, rise in flow.items() if rise > watch.max_flow_rise}),
        "onset F1 is below the start's ({0:+.1f} standard errors)":
            _Finding({number: sigmas for number, sigmas in onsets.items() if sigmas < -watch.max_onset_sigmas}),
    }


def _gaming(signs: Sequence[Signs]) -> dict[str, _Finding]:
    """Rounds in which the reward prefers what was generated to what was recorded."""
    above = {each.round: paired(each.clips["reward"], each.clips["reward_true"]).sigmas for each in signs[1:] if each.finite}
    text = "generated sounds are rewarded above the true ones ({0:+.1f} standard errors), so the reward no longer tells which are better"
    return {text: _Finding({number: sigmas for number, sigmas in above.items() if sigmas >= _GAMED})}


def _worse(signs: Sequence[Signs], kept: Signs, measure: str) -> dict[str, _Finding]:
    """Later rounds that have lost something of what the kept one has reached."""
    gains = {each.round: _gain(each, kept, measure).sigmas for each in signs if each.round > kept.round and each.finite}
    text = f"{MEASURES[measure]} is worse than that of {f'round {kept.round}' if kept.round else 'the start'} ({{0:+.1f}} standard errors)"
    return {text: _Finding({number: sigmas for number, sigmas in gains.items() if sigmas <= -1})}


def _reason(kept: int, rounds: int, out: int, keep: str, measured: str) -> str:
    if keep == "last":
        return f"round {kept} is kept as the last, with {measured}"
    if kept:
        return f"round {kept} of {rounds} is kept by {measured}"
    better = "no round that passes" if out else "no round"
    return f"the start is kept by {measured}, as {'no round passes' if out == rounds else f'{better} is better by a standard error'}"


def _gain(after: Signs, before: Signs, measure: str) -> Paired:
    """By how much a round is better than another."""
    sides = (after.clips[measure], before.clips[measure])
    return paired(*(reversed(sides) if measure == "flow_loss" else sides))


def _rise(after: Signs, before: Signs) -> float:
    """Relative rise of the flow loss."""
    return float(after.clips["flow_loss"].mean() / before.clips["flow_loss"].mean() - 1)


def _mean(values: np.ndarray) -> Value:
    return Value(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


def _difference(first: np.ndarray, second: np.ndarray) -> Value:
    return _mean(first - second)


def write_rounds(folder: Path, signs: Sequence[Signs]) -> None:
    """Write rounds.jsonl of `folder`: a line per round, {"round", "clips", "signs": {name: {"value", "error"}}}."""
    lines, signs = [], shared(signs)
    for previous, each in zip([signs[0], *signs], signs, strict=False):
        found = each.values() | (each.against(signs[0], previous) if each.round else {})
        lines.append(json.dumps({"round": each.round, "clips": len(each.positions), "signs": _described(found)}))
    write_atomically(folder / ROUNDS, "\n".join(lines) + "\n")


def told(signs: Signs, start: Signs) -> str:
    """One line about a round."""
    signs, start = shared((signs, start))
    found = signs.values()
    parts = [f"{words} {found[name].value:.4g} ± {found[name].error:.2g}" for name, words in MEASURES.items()]
    if signs.round:
        changes = [_gain(signs, start, name).sigmas if signs.finite else math.nan for name in MEASURES]
        parts = [f"{part} ({change:+.1f})" for part, change in zip(parts, changes, strict=True)]
        parts += [f"{name} {value:.3g}" for name, value in drift(signs, start).items()]
    return ", ".join(parts) + (" (standard errors better than the start)" if signs.round else "")


def _described(values: Mapping[str, Value]) -> dict[str, dict[str, float | None]]:
    return {name: {"value": _plain(each.value), "error": _plain(each.error)} for name, each in values.items()}


def _array(values: Any) -> np.ndarray:
    """As `_plain` has written it: null becomes NaN."""
    return np.array(values, dtype=np.float64)


def _plain(value: Any) -> Any:
    """Numbers as JSON has them: what is not finite is null."""
    return [_plain(each) for each in value] if isinstance(value, np.ndarray) else finite_or_none(value)


def finite_or_none(value: float | None) -> float | None:
    """A number that JSON knows, or None."""
    return None if value is None or not math.isfinite(value) else float(value)
