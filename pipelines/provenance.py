"""What a folder of shards was made from, kept beside them: work that goes on with other models or settings is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.engine.saving import write_atomically
from pipelines.engine.world import World

FILE = "provenance.json"


class ProvenanceError(RuntimeError):
    """Shards that were made from something else than is asked for; the message says what to do."""


def claim(folder: Path, settings: Callable[[], dict[str, Any]], world: World, remedy: str) -> None:
    """Write what `folder` is made from before anything is in it, or see that it is the same as before. Collective.

    The main process alone asks for the settings, since the hashes among them take long. ProvenanceError in all processes names what
    differs and ends with `remedy`.
    """
    # By its own name: variants of a sweep link to one folder, and deleting a link would change nothing.
    problem = _claimed(folder.resolve(), settings(), remedy) if world.is_main else ""
    if world.any(bool(problem)):
        raise ProvenanceError(problem or f"{folder} was made from something else, as the first process says")


def known_provenance(folder: Path) -> dict[str, Any]:
    """What `folder` was made from; empty where nobody has claimed it."""
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _claimed(folder: Path, settings: dict[str, Any], remedy: str) -> str:
    """What is wrong, or nothing."""
    settings = json.loads(json.dumps(settings))  # as it will be read: tuples are lists then
    known = known_provenance(folder)
    if not known and any(folder.glob("shard-*.parquet")):
        return f"{folder} holds shards and no {FILE}, so nobody knows what made them: {remedy}"
    if not known:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, json.dumps(settings, indent=1))
        return ""
    changed = [name for name, value in settings.items() if name not in known or known[name] != value]
    return f"{folder} was made with another {', '.join(changed)}: {remedy}" if changed else ""
