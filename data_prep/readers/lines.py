"""Lists as they come: text files of any length, one row a line."""

from __future__ import annotations

import csv
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import fsspec

from data_prep.readers.rejects import ReaderError
from data_prep.remote.urls import redacted


def read_json_list(url: str | os.PathLike[str], holds: str) -> Iterator[tuple[str, Any]]:
    """(where, item) of every item of a JSON list, where = "file.json[17]"; ReaderError, saying what the list `holds`, where it is none."""
    url, shown = os.fspath(url), redacted(os.fspath(url))
    try:
        with fsspec.open(url, "rb", compression="infer") as file:
            items = json.load(file)
    except (OSError, ValueError) as error:
        raise ReaderError(f"{shown}: cannot be read as JSON: {error}") from error
    if not isinstance(items, list):
        raise ReaderError(f"{shown}: holds no list; it is to be a list of {holds}")
    return ((f"{shown}[{number}]", item) for number, item in enumerate(items))


def read_lines(url: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """(where, line) of every line that is not blank, where = "file.csv:17"; UTF-8, plain or compressed as the name says (.gz).

    ReaderError where the file cannot be read to its end.
    """
    url = os.fspath(url)
    shown = redacted(url)
    try:
        # A byte that is not UTF-8 spoils its own row, not the reading: `split_cells` refuses the row.
        with fsspec.open(url, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=None, compression="infer") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield f"{shown}:{number}", line.rstrip("\n")
    except (OSError, EOFError, zlib.error) as error:
        raise ReaderError(f"{shown}: cannot be read: {type(error).__name__}: {error}") from error


def split_cells(line: str, skip_space: bool = False) -> list[str]:
    """The cells of one row of a CSV; `skip_space` drops spaces after commas, which would hide a quote. ReaderError where it is none.

    Each line is parsed alone: a quote that is never closed spoils one row instead of swallowing those after it.
    """
    try:
        line.encode()
        return next(csv.reader((line,), strict=True, skipinitialspace=skip_space))
    except UnicodeEncodeError as error:
        raise ReaderError("holds bytes that are not UTF-8") from error
    except csv.Error as error:
        raise ReaderError(f"is no CSV row: {error}") from error
