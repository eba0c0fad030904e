"""Source videos from the web: each is downloaded once for all its clips and all processes, and a dead one is asked for once."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.downloads import ytdlp
from data_prep.downloads.ytdlp import DownloadFailed
from data_prep.remote.urls import redacted
from data_prep.youtube import id_of_address

_HOUR, _DAY = 3600.0, 86400.0
_REMEMBERED = {
    "private": math.inf,
    "removed": math.inf,
    "restricted": math.inf,
    "unavailable": _DAY,
    "not_media": _DAY,
    "too_large": _HOUR,
    "blocked": _HOUR / 6,
    "network": _HOUR / 6,
    "too_slow": 0.0,  # the next clip brings the download further
}
"""Seconds for which a failure answers for the other clips of a video. Delete its .json to ask again before."""
_PASSING = ("too_slow", "blocked", "network")
"""Failures that leave what has come so far for the next attempt."""
_FIRST_WAIT = 0.5
_POLL = 0.1


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """How source videos are downloaded."""

    folder: str
    """Local or shared folder that keeps the videos. Sharing it shares downloads, failures and `pause` between all tasks."""
    short_side: int = 480
    """Pixels of the shorter side to ask for: the best format up to this, the smallest above it where there is none."""
    rate_limit: int | None = None
    """Bytes per second of each download; None for no limit."""
    pause: float = 1.0
    """Mean seconds between the beginnings of two downloads, over all processes that share the folder; varied by half either way."""
    cookies: str | None = None
    """File of cookies in Netscape format, for what only a signed-in account may see. Read only, never copied or logged."""
    timeout: float = 30.0
    """Seconds that a connection may be silent."""
    time_limit: float = 600.0
    """Seconds for one video, turns and retries included. One that takes longer goes on where it stopped when its next clip comes."""
    retries: int = 4
    """How often a passing failure (connection, 5xx, 429) is tried again at once, waiting longer each time."""
    max_megabytes: float | None = 4000.0
    """Largest file, MB; None for no limit."""

    def __post_init__(self):
        if not self.folder or "://" in self.folder:
            raise ValueError(f"DownloadConfig.folder is {self.folder!r}: name a local or shared folder, a URL cannot hold its locks")
        for name in ("short_side", "rate_limit", "timeout", "time_limit", "max_megabytes"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"DownloadConfig.{name} is {value}: it must be positive")
        for name in ("pause", "retries"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"DownloadConfig.{name} is {getattr(self, name)}: it must not be negative")

    def read_cookies(self) -> str | None:
        """The text of the cookies file, None without one; ValueError where there is none to read."""
        if self.cookies is None:
            return None
        try:
            text = Path(self.cookies).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ValueError(f"DownloadConfig.cookies: {self.cookies}: {error.strerror}; name a file that can be read") from None
        if not any(line.count("\t") == 6 for line in text.splitlines()):
            problem = "no line has the seven fields of a cookie, separated by tabs"
            raise ValueError(f"DownloadConfig.cookies: {self.cookies}: {problem}; export it in Netscape format")
        return text


class Downloader:
    """Fetches videos into a folder, where `<name>.json` tells of each what became of it; names are YouTube's ids or digests of the URL.

    What is under way lies in hidden folders. Any process may be killed at any time; the next one goes on.
    """

    def __init__(self, config: DownloadConfig):
        try:
            importlib.import_module("yt_dlp")
        except ImportError as error:
            raise ValueError(f"downloading needs yt-dlp ({error}): pip install 'foleyscale[download]'") from error
        config.read_cookies()
        self.config, self._folder = config, Path(config.folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / ".turn", "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            problem = f"{config.folder}: {error.strerror}; choose a folder that can be written and has file locks"
            raise ValueError(f"DownloadConfig.folder: {problem}") from error

    def fetch(self, url: str) -> Path:
        """The local file of the video at a URL, downloaded if need be; DownloadFailed says why it cannot be had.

        A download is given up at the first block of data after `time_limit`: a site that sends next to nothing without falling silent
        can hold it up for longer.
        """
        try:
            return self._fetch(url, file_name(url), time.monotonic() + self.config.time_limit)
        except DownloadFailed as failure:
            raise DownloadFailed(failure.reason, f"{redacted(url)}: {failure}") from failure

    def _fetch(self, url: str, name: str, deadline: float) -> Path:
        if path := self._settled(name):
            return path
        with self._alone(name, deadline) as work:
            if not (path := self._settled(name)):
                try:
                    path = self._publish(self._download(url, work, deadline), name, url, work)
                except DownloadFailed as failure:
                    self._remember(name, url, failure, work)
                    raise
            _clear(work)
        return path

    def _settled(self, name: str) -> Path | None:
        """The file if it is there, a failure that still counts as an exception, None where the site has to be asked."""
        try:
            record = json.loads((self._folder / f"{name}.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if "file" in record:
            path = self._folder / record["file"]
            # A machine that lost its power may have kept the name and not the bytes.
            return path if path.is_file() and path.stat().st_size == record["bytes"] else None
        stale = time.time() > record["asked"] + _REMEMBERED.get(record["reason"], 0.0)
        if stale or (self.config.cookies is not None and not record["cookies"]):
            return None
        raise DownloadFailed(record["reason"], record["message"])

    def _remember(self, name: str, url: str, failure: DownloadFailed, work: Path) -> None:
        told = {"reason": failure.reason, "message": str(failure), "asked": time.time(), "cookies": self.config.cookies is not None}
        self._record(name, url, told, work)
        if failure.reason not in _PASSING or len(list(work.iterdir())) == 1:  # nothing but the lock
            _clear(work)

    def _publish(self, file: Path, name: str, url: str, work: Path) -> Path:
        path = self._folder / f"{name}{file.suffix}"
        _flush(file)
        os.replace(file, path)
        self._record(name, url, {"file": path.name, "bytes": path.stat().st_size}, work)
        return path

    def _record(self, name: str, url: str, told: dict[str, Any], work: Path) -> None:
        written = work / "record.json"
        written.write_text(json.dumps({"url": redacted(url), **told}, indent=1))
        _flush(written)
        os.replace(written, self._folder / f"{name}.json")

    def _download(self, url: str, work: Path, deadline: float) -> Path:
        """Ask the site, and ask again after failures that pass."""
        attempt = 0
        while True:
            self._take_turn(deadline)
            try:
                return ytdlp.download(url, work, self.config, deadline)
            except DownloadFailed as failure:
                if failure.retry_after is None or attempt == self.config.retries:
                    raise
                wait = max(failure.retry_after, _FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.5))
                if time.monotonic() + wait > deadline:
                    raise
            time.sleep(wait)
            attempt += 1

    def _take_turn(self, deadline: float) -> None:
        """Wait until this process may begin a download: the file `.turn` holds the time of the last one that anybody has taken."""
        if not self.config.pause:
            return
        with open(self._folder / ".turn", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            now, last = time.time(), _number(file.read())
            # No turn is taken later than the time limit: a later one is of a clock that went wrong.
            turn = max(now, last + self.config.pause * random.uniform(0.5, 1.5)) if last <= now + self.config.time_limit else now
            if turn - now > deadline - time.monotonic():
                problem = f"no turn within DownloadConfig.time_limit of {self.config.time_limit:g} s: fewer workers or a shorter pause"
                raise DownloadFailed("too_slow", problem)
            file.truncate(0)
            file.write(f"{turn:.6f}".encode())
        time.sleep(turn - now)

    @contextlib.contextmanager
    def _alone(self, name: str, deadline: float) -> Iterator[Path]:
        """The folder of work on one video, for one process at a time; a killed process lets go of it."""
        work = self._folder / f".{name}"
        lock = _lock_of(work, deadline)
        if lock is None:
            problem = f"another process has not finished it within DownloadConfig.time_limit of {self.config.time_limit:g} s"
            raise DownloadFailed("too_slow", problem)
        with lock:
            yield work


def file_name(url: str) -> str:
    """The name, without suffix, under which a video is kept."""
    return id_of_address(url) or blake2b(url.encode(), digest_size=16).hexdigest()


def _lock_of(work: Path, deadline: float) -> BinaryIO | None:
    """The open, locked file `work/lock`; None where another process holds it until the deadline."""
    while True:
        work.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
            lock = stack.enter_context(open(work / "lock", "ab"))
            if not _locked(lock, deadline):
                return None
            # A process that has finished removes the folder: the lock that was waited for may no longer be the one that counts.
            if os.fstat(lock.fileno()).st_ino == (work / "lock").stat().st_ino:
                stack.pop_all()
                return lock


def _locked(file: BinaryIO, deadline: float) -> bool:
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL * random.uniform(0.5, 1.5))


def _clear(work: Path) -> None:
    """Remove a folder of work, the lock last: until then it is this process's own."""
    for path in sorted(work.iterdir(), key=lambda path: path.name == "lock"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the next process may be in it already
        work.rmdir()


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _number(text: bytes) -> float:
    return float(text) if re.fullmatch(rb"\d+\.\d+", text) else 0.0
