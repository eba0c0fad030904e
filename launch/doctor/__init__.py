"""What a long run needs of the machine it will run on: a line per check, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.remote.urls import redacted
from launch.doctor import devices, media, system
from launch.doctor.check import Check


def examine(folder: Path, url: str | None = None) -> list[Check]:
    """Look at this machine for a run in `folder`, and at the data under `url` if given."""
    looks: dict[str, Callable[[], Check]] = {
        "python": system.python, "host": system.host,
        "torch": devices.build, "GPU": devices.gpu, "bf16": devices.bf16, "NCCL": devices.nccl, "InfiniBand": devices.infiniband,
        "DeepSpeed": devices.deepspeed, "attention": devices.attention,
        "codecs": media.codecs, "decoders": media.decoders,
        "processes": system.processes, "open files": system.open_files, "shared memory": system.shared_memory,
        "disk": lambda: system.disk(folder), "caches": system.caches, "host name": system.host_name, "clock": system.clock,
    }  # fmt: skip
    if url:
        looks["data"] = lambda: media.data(url)
    return [looked(name, look) for name, look in looks.items()]


def looked(name: str, look: Callable[[], Check]) -> Check:
    """What a look finds; one that fails is a finding too, since libraries meant for other machines raise whatever they like."""
    try:
        return look()
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Check(name, "fail", redacted(what), "install again what this names")


def report(checks: Iterable[Check], as_json: bool = False) -> str:
    """All checks as lines with a sum at the end, or as JSON."""
    checks = list(checks)
    if as_json:
        return json.dumps([dataclasses.asdict(check) for check in checks], indent=1)
    count = Counter(check.status for check in checks)
    return "\n".join([*map(str, checks), f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} to mend"])
