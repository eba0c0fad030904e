"""Copies of complete checkpoints behind an fsspec URL, made while training goes on.

`step-*/` holds the files and `step-*.json` beside it the marker: it comes last and goes first, so that what it names is there.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from data_prep.storage import Folder
from pipelines.engine.saving import in_background, write_atomically

_CHUNK = 1 << 24
_AT_ONCE = 8
"""Chunks in memory while a checkpoint comes back."""


class Mirror:
    """Checkpoints at `url`; ValueError or OSError where it cannot be read. `surplus`: complete steps -> those that may go."""

    def __init__(self, url: str, marker: str, surplus: Callable[[list[int]], list[int]]):
        self._url, self._root, self._marker, self._surplus = url, Folder(url), marker, surplus
        self._lock, self._next, self._current, self._running = threading.Lock(), None, None, None
        self.steps()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints there."""
        return sorted(int(name[5:-5]) for name in self._root.sizes() if name.startswith("step-") and name.endswith(".json"))

    def push(self, path: Path) -> None:
        """Copy a complete checkpoint in the background; one that still waits for its turn is left out in favour of it."""
        with self._lock:
            self._next = path
            if self._current is None:
                self._current, self._next = path, None
                self._running = in_background(self._run)

    def holds(self, path: Path) -> bool:
        """Whether a local checkpoint is still needed for a copy."""
        with self._lock:
            return path in (self._next, self._current)

    def wait(self) -> None:
        """Until all is copied, or could not be."""
        if self._running is not None:
            self._running.result()

    def fetch(self, step: int, folder: Path) -> None:
        """Copy one back into a new local folder, marker last."""
        name = f"step-{step:08d}"
        marker, remote = self._root.read(f"{name}.json"), Folder(f"{self._url}/{name}")
        folder.mkdir(parents=True)
        for file, about in json.loads(marker)["files"].items():
            starts = range(0, about["bytes"], _CHUNK)
            with open(folder / file, "xb") as local:
                os.posix_fallocate(local.fileno(), 0, about["bytes"])
                for first in range(0, len(starts), _AT_ONCE):
                    parts = [(file, start, start + _CHUNK) for start in starts[first:first + _AT_ONCE]]
                    local.writelines(remote.read_ranges(parts))
                local.flush()
                os.fsync(local.fileno())
        write_atomically(folder / self._marker, marker.decode())

    def remove(self, step: int) -> None:
        """Delete a copy."""
        name = f"step-{step:08d}"
        self._root.remove(f"{name}.json")
        folder = Folder(f"{self._url}/{name}")
        for file in folder.sizes():
            folder.remove(file)

    def _run(self) -> None:
        while self._current is not None:
            try:
                self._copy(self._current)
            except Exception as error:  # a store that is away for an hour must not end the training
                told = logging.getLogger(__name__)
                told.warning("%s is not copied to %s: %s; the next one will be tried", self._current.name, self._url, error)
            with self._lock:
                self._current, self._next = self._next, None

    def _copy(self, path: Path) -> None:
        marker, remote = (path / self._marker).read_bytes(), Folder(f"{self._url}/{path.name}")
        self._root.remove(f"{path.name}.json")
        for file in json.loads(marker)["files"]:
            if remote.is_local:
                os.makedirs(remote.root, exist_ok=True)
            remote.upload(str(path / file), file)
        self._root.write(f"{path.name}.json", marker)
        for step in self._surplus(self.steps()):
            self.remove(step)
