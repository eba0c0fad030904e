"""Rows that a reader sets aside: counted, the first of them kept to show, and too many of them an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Line = TypeVar("_Line")
_Parsed = TypeVar("_Parsed")
_LONGEST = 300
"""Characters of a row's report: a malformed row may be of any length."""


class ReaderError(ValueError):
    """What is wrong with a row or with a whole list; the message says what is expected, and names the file where it ends the reading."""


class Rejects:
    """The account of one reading: a malformed row is set aside, too large a share of them ends it.

    max_share   of all rows that may be set aside; a list shorter than `least` rows may hold as many bad ones as one of `least`.
    least       rows to be seen before the share can end a reading that still goes on.
    keep        reports to keep, in `lines`.
    """

    def __init__(self, max_share: float = 0.01, least: int = 100, keep: int = 20):
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share is {max_share}: choose a share of the rows from 0 to 1")
        if least < 1 or keep < 1:
            raise ValueError(f"least and keep are {least} and {keep}: choose numbers of rows of 1 or more")
        self.max_share, self.least, self.keep = max_share, least, keep
        self.accepted = self.rejected = 0
        self.lines: list[str] = []

    def sift(self, lines: Iterable[tuple[str, _Line]], parse: Callable[[_Line], _Parsed]) -> Iterator[_Parsed]:
        """What `parse` makes of the lines, given as (where, line); one for which it raises ReaderError is set aside."""
        for where, line in lines:
            try:
                parsed = parse(line)
            except ReaderError as error:
                self.reject(where, str(error))
            else:
                self.accept()
                yield parsed

    def accept(self, count: int = 1) -> None:
        """Count good rows."""
        self.accepted += count

    def reject(self, where: str, message: str) -> None:
        """Count the malformed row at `where` ("file.csv:123"); ReaderError where they have become too many."""
        self.rejected += 1
        if len(self.lines) < self.keep:
            self.lines.append(f"{where}: {message}"[:_LONGEST])
        if self.accepted + self.rejected >= self.least:
            self._check()

    def finish(self) -> None:
        """Check a last time, at the end of the list: however few rows it has, they must not all be malformed."""
        self._check()
        if self.rejected and not self.accepted:
            raise ReaderError(f"{self}; no row is well-formed: is the list of this format?")

    def _check(self) -> None:
        if self.rejected > self.max_share * max(self.accepted + self.rejected, self.least):
            raise ReaderError(f"{self}; more than {100 * self.max_share:g} % are malformed: correct the list or allow a larger share")

    def __str__(self) -> str:
        first = f", the first: {'; '.join(self.lines[:3])}" if self.lines else ""
        return f"{self.rejected:,} of {self.accepted + self.rejected:,} rows set aside{first}"
