"""Clips that cannot be read: listed in a file, counted, and too many of them stop the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from data_prep.index import ShardError
from data_prep.streaming.reading import CRASHED, TIMEOUT, BadClip, Name

_FEWEST_SEEN = 100


class Quarantine:
    """What one rank saw and could not read; `path`, a local file of JSON lines, may be shared by all ranks and starts of a run."""

    def __init__(self, path: str | os.PathLike[str] | None, max_share: float):
        self._path = None if path is None else Path(path)
        self._max_share = max_share
        self.seen, self.bad, self._last = 0, 0, ""

    def count(self, good: int, bad: Sequence[BadClip]) -> None:
        """Add a batch."""
        self.seen += good + len(bad)
        self.bad += len(bad)
        if not bad:
            return
        self._last = bad[-1].message
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a") as file:
                file.write("".join(json.dumps(asdict(clip)) + "\n" for clip in bad))

    def judge(self, totals: Mapping[str, float] | None = None) -> None:
        """ShardError where the share of bad clips is too high: in `totals`, "seen" and "bad" of all ranks, or in this rank's own counts."""
        seen, bad = (round(totals[name]) for name in ("seen", "bad")) if totals else (self.seen, self.bad)
        if seen < _FEWEST_SEEN or bad <= self._max_share * seen:
            return
        last = f"the last: {self._last}" if self._last else "none of them in this process"
        where = f"they are listed in {self._path}" if self._path else last
        raise ShardError(
            f"{bad} of {seen} clips could not be read, more than max_bad_share {self._max_share:g} allows; {where}. "
            "Check the data with `foleyscale prep verify`, or raise max_bad_share"
        )

    def restore(self, totals: Mapping[str, int], rank: int, world_size: int) -> None:
        """Take over this rank's part of the counts of all ranks; the parts add up to them whatever the number of ranks was before."""
        self.seen, self.bad = (
            totals[name] * (rank + 1) // world_size - totals[name] * rank // world_size for name in ("seen", "bad")
        )

    def deadly(self) -> dict[Name, tuple[str, str]]:
        """The listed clips that hung or killed a worker, with reason and message: not to be tried again by another start of the run."""
        if self._path is None or not self._path.exists():
            return {}
        found = {}
        for line in self._path.read_text().splitlines():
            try:
                clip = json.loads(line)
                if clip["reason"] in (TIMEOUT, CRASHED):
                    found[Name(clip["url"], clip["shard"], clip["key"])] = clip["reason"], clip["message"]
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short when a run was killed, or one of another program
        return found
