"""The stages of a run in their folders: trained where they are not complete, skipped where they are."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import Recipe, TrainConfig
from pipelines.engine.checkpoint import EXPORTED, weights_hash
from pipelines.engine.log import PhaseStatus
from pipelines.engine.saving import write_atomically
from pipelines.engine.signals import Stopped
from pipelines.engine.trainer import Trainer
from pipelines.engine.watchdog import Watchdog
from pipelines.engine.world import World
from pipelines.recipes import RecipeError, dump_recipe
from pipelines.stages.stage import Stage


@dataclass
class StageFolders:
    """The folders of one run."""

    recipe: Recipe
    world: World
    say: Callable[[str], None] = print

    def fit(self, name: str, make: Callable[[], Stage]) -> None:
        """Train the stage that `make` gives, from its last checkpoint where there is one."""

        def work() -> None:
            folder = self.recipe.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            if self.world.is_main:
                write_atomically(folder / "recipe.yaml", dump_recipe(self.recipe))
            Trainer(make(), folder, self.world).fit()
            gc.collect()  # an engine's hooks form cycles, which would hold its device memory into the next stage

        self.once(name, work)

    def once(self, name: str, work: Callable[[], None]) -> None:
        """Do the work of a stage unless it is complete; RecipeError where it is, but on another export of an earlier stage."""
        if self.complete(name):
            check_parents(self.recipe.folder / name)
            self.tell(f"{name}: complete, skipped")
            return
        started = time.perf_counter()
        work()
        self.tell(f"{name}: done in {time.perf_counter() - started:.0f} s")

    @contextlib.contextmanager
    def watched(self, name: str, train: TrainConfig) -> Iterator[None]:
        """Watch and show in the folder `name` what happens inside and is no training; that of a stage inside watches itself."""
        folder = self.recipe.folder / name
        status = PhaseStatus(folder, name)
        watchdog = Watchdog(folder, self.world, train.hang_seconds, show=status.show)
        watchdog.beat(name)
        if self.world.is_main:
            with contextlib.suppress(OSError):  # the work matters more, and an error of it
                status.show(name)
        try:
            with watchdog.watching():
                yield
        except BaseException as error:
            if self.world.is_main:
                with contextlib.suppress(OSError):
                    status.ended("stopped" if isinstance(error, Stopped) else "failed", str(error) or type(error).__name__)
            raise
        if self.world.is_main:
            status.show("")

    def complete(self, name: str) -> bool:
        """Whether a stage is complete, as the first process sees it: a network file system may show others an older folder."""
        return self.world.any(self.world.is_main and (self.recipe.folder / name / "export" / EXPORTED).exists())

    def require(self, *stages: str) -> None:
        """RecipeError where one of the stages is not complete."""
        for stage in stages:
            if not self.complete(stage):
                raise RecipeError(f"{self.recipe.folder}: stage {stage} is not complete; run `foleyscale train {stage}` first")

    def tell(self, line: str) -> None:
        """Say it once, from the main process."""
        if self.world.is_main:
            self.say(line)


def check_parents(folder: Path) -> None:
    """RecipeError where a complete stage was trained on another export of an earlier one than is there now."""
    for parent, known in json.loads((folder / "export" / EXPORTED).read_text()).get("parents", {}).items():
        path = (folder / parent).resolve()
        if weights_hash(path) != known:
            raise RecipeError(f"{folder} was trained on another {path}: delete {folder} to train it again")
