"""Stage 4, its rounds: generate and score, train, measure, again and again; at the end the best round is named.

Each part leaves a file that says it is complete, and is skipped where that file is: the sidecar of each shard of candidates, then their
index, the checkpoints, export/complete.json, signs.json, and for all rounds together rounds.jsonl and best.json.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipelines.candidates import make_candidates
from pipelines.config import Recipe
from pipelines.distorted import write_distorted
from pipelines.engine.checkpoint import weights_hash
from pipelines.engine.saving import write_atomically
from pipelines.engine.signals import leave_if_asked
from pipelines.engine.watchdog import beat
from pipelines.engine.world import World
from pipelines.features import require_shards
from pipelines.folders import StageFolders
from pipelines.heldout import Shares
from pipelines.provenance import claim
from pipelines.signs import BEST, Best, Signs, best_round, finite_or_none, told, write_rounds
from pipelines.stages.preference import PreferenceStage
from pipelines.watching import Watch


@dataclass
class Rounds:
    """The preference rounds of one run."""

    folders: StageFolders
    features: str
    """Folder of the feature shards."""
    signs: list[Signs] = field(default_factory=list)
    """Of the start and the rounds so far; in the main process alone, empty where nothing can be watched."""

    @property
    def _recipe(self) -> Recipe:
        return self.folders.recipe

    @property
    def _world(self) -> World:
        return self.folders.world

    @property
    def _folder(self) -> Path:
        return self._recipe.folder / "preference"

    def run(self) -> None:
        """Take the model through the recipe's rounds; each starts from what the last one has left. Collective."""
        recipe, world, config = self._recipe, self._world, self._recipe.preference
        self._folder.mkdir(parents=True, exist_ok=True)
        require_shards(recipe, Path(self.features).parent, world)
        distorted = write_distorted(recipe, recipe.folder, world) if config.needs_distorted else ""
        watched = Shares.of(recipe).watch
        watch = Watch(recipe, recipe.folder, watched, world.device) if watched else None
        start = recipe.folder / "generative" / "export"
        self._measure(watch, 0, start)
        for number in range(1, config.rounds + 1):
            start = self._round(number, start, distorted)
            self._measure(watch, number, start)
        self._name_best()

    def _round(self, number: int, start: Path, distorted: str) -> Path:
        """Generate, score and train; the folder of the new model. ProvenanceError where the round was begun from another start."""
        recipe, name = self._recipe, f"preference/round-{number}"
        candidates = recipe.folder / name / "candidates"
        if not self.folders.complete(name):
            # Checkpoints alone do not tell what the round started from, and a round without candidates has nothing else.
            claim(recipe.folder / name, lambda: {"model": weights_hash(start)}, self._world, "delete that folder to make the round again")
            if recipe.preference.needs_candidates:
                make_candidates(recipe, recipe.folder, self.features, start, number, candidates, self._world)
                leave_if_asked(self._world, f"the candidates of round {number} are complete")
        self.folders.fit(name, partial(PreferenceStage, recipe, self.features, str(candidates), start, number, distorted))
        leave_if_asked(self._world, f"round {number} is complete")
        return recipe.folder / name / "export"

    def _measure(self, watch: Watch | None, number: int, export: Path) -> None:
        """The signs of a round, measured where they are not there yet. The other processes wait: it takes them less than to share it."""
        if watch is None:
            return
        beat(f"preference, signs of {f'round {number}' if number else 'the start'}")
        if self._world.is_main:
            known = watch.known(number, export)
            self.signs.append(known or watch.measure(number, export))
            if known is None:
                write_rounds(self._folder, self.signs)
                self.folders.tell(f"preference, {f'round {number}' if number else 'start'}: {told(self.signs[-1], self.signs[0])}")
        self._world.barrier()
        leave_if_asked(self._world, f"the signs of round {number} are complete" if number else "the signs of the start are complete")

    def _name_best(self) -> None:
        """Write which round is kept: what `foleyscale generate` and `foleyscale evaluate` take from now on."""
        if self._world.is_main:
            best = best_round(self.signs, self._recipe.preference.watch) if self.signs else self._last()
            if self.signs:
                write_rounds(self._folder, self.signs)
            found = dataclasses.asdict(best) | {"value": finite_or_none(best.value), "error": finite_or_none(best.error)}
            write_atomically(self._folder / BEST, json.dumps(found, indent=1))
            self.folders.tell(f"preference: {best.line()}")
        self._world.barrier()

    def _last(self) -> Best:
        number = self._recipe.preference.rounds
        return Best(round=number, measure="last", value=None, error=None,
                    reason=f"round {number} is kept as the last: too few held-out clips to measure by")
