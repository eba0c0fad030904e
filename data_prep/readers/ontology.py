"""The classes of AudioSet: what their ids are called, and which are kinds of which."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import fsspec

from data_prep.readers.lines import read_lines, split_cells
from data_prep.readers.rejects import ReaderError


@dataclass(frozen=True)
class Classes:
    """Names of classes by id, and the ids of the classes just above each."""

    names: dict[str, str]
    parents: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, labels: str | os.PathLike[str] | None, ontology: str | os.PathLike[str] | None) -> Classes:
        """From `class_labels_indices.csv` and `ontology.json`, of which one is enough; the first decides where names differ."""
        if labels is None and ontology is None:
            raise ReaderError("the names of the classes are needed: give class_labels_indices.csv (--labels) or ontology.json (--ontology)")
        names, parents = ({}, {}) if ontology is None else _read_ontology(os.fspath(ontology))
        return cls(names if labels is None else names | _read_labels(os.fspath(labels)), parents)

    def with_ancestors(self, ids: list[str]) -> list[str]:
        """The ids, then those of all classes above them, nearest first; each once, whichever ways lead to it."""
        found = dict.fromkeys(ids)
        queue = list(ids)
        for child in queue:
            above = [parent for parent in self.parents.get(child, ()) if parent not in found]
            found |= dict.fromkeys(above)
            queue += above
        return list(found)


def _read_labels(url: str) -> dict[str, str]:
    lines = read_lines(url)
    header = [cell.strip() for cell in next(lines, ("", ""))[1].split(",")]
    if not {"mid", "display_name"} <= set(header):
        raise ReaderError(f"{url}: the first line is no header with mid and display_name, as class_labels_indices.csv has")
    names = {}
    for where, line in lines:
        try:
            row = dict(zip(header, split_cells(line), strict=True))
        except ValueError as error:
            raise ReaderError(f"{where}: {error}") from error
        names[row["mid"].strip()] = row["display_name"].strip()
    return names


def _read_ontology(url: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    try:
        with fsspec.open(url, "rb", compression="infer") as file:
            classes = json.load(file)
        names = {item["id"]: item["name"] for item in classes}
        parents: dict[str, list[str]] = {}
        for item in classes:
            for child in item.get("child_ids", ()):
                parents.setdefault(child, []).append(item["id"])
    except (OSError, ValueError) as error:
        raise ReaderError(f"{url}: cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ReaderError(f"{url}: is no list of objects with id, name and child_ids, as ontology.json is") from error
    return names, {child: [parent for parent in above if parent in names] for child, above in parents.items()}
