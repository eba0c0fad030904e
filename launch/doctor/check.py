"""What one look at a machine found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One line of the doctor's: what was looked at, how it stands, what to do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    """warn: training runs, but slower or less surely. fail: something that every run needs is missing."""
    found: str
    remedy: str = ""
    """What to do; empty where nothing needs doing."""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name:<13}  {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def size(count: int) -> str:
    """Bytes as a person reads them."""
    if count < GIB:
        return f"{count / (1 << 20):.0f} MiB"
    return f"{count / GIB:.{0 if count >= 10 * GIB else 1}f} GiB"
