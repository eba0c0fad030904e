"""Videos with prompts of their own, from a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

PROMPTS = ("prompt", "negative_prompt")


def read_list(path: Path) -> dict[Path, dict[str, str]]:
    """Each video of a table with the columns video and, if wanted, prompt and negative_prompt, with the prompts that it has.

    A relative video lies below the folder of the list. ValueError names the line that is wrong.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such list of videos")
    found: dict[Path, dict[str, str]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark in front
        rows = csv.DictReader(file, skipinitialspace=True, strict=True)
        try:
            _check_columns(path, rows.fieldnames or ())
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: {len(rows.fieldnames)} cells are wanted, as many as columns; quote what has a comma in it")
                video = path.parent / row["video"]
                if not video.is_file():
                    raise ValueError(f"{where}: {video}: no such video file")
                if video in found:
                    raise ValueError(f"{where}: {video} is in the list twice")
                found[video] = {name: row[name] for name in PROMPTS if row.get(name)}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error} after line {rows.line_num}") from error
    if not found:
        raise ValueError(f"{path}: no videos below its header")
    return found


def _check_columns(path: Path, columns) -> None:
    if unknown := [name for name in columns if name not in ("video", *PROMPTS)]:
        raise ValueError(f"{path}: no column {unknown[0]!r} is known; there are video, {' and '.join(PROMPTS)}")
    if "video" not in columns:
        raise ValueError(f"{path}: the first line names no column video")
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path}: a column is there twice")
