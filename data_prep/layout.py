"""Which files make a folder of shards: sidecars and tars by name, the settings beside them, and where a subset's tars lie."""

from __future__ import annotations

import json
import os
import posixpath
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_prep.shards import SHARD_PATTERN
from data_prep.sidecar import ShardError
from data_prep.storage import Folder

INDEX_FILE, DATASET_FILE, SETTINGS_FILE = "index.parquet", "dataset.json", "settings.json"
TARS = "tars"
"""Field of dataset.json: the folder of the tars, where they do not lie beside their sidecars."""


@dataclass(frozen=True)
class ShardFolder:
    """What lies in a folder of shards, whether it is indexed and complete or not."""

    folder: Folder
    tars: Folder
    files: dict[str, int]
    """Name -> bytes in `folder`."""
    tar_files: dict[str, int]
    """Name -> bytes in `tars`."""
    settings: dict[str, Any]
    """How the shards were made; empty where nothing says so."""

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> ShardFolder:
        """List a folder, and that of its tars if it is another. ShardError where what is said of them cannot be read."""
        folder = Folder(url)
        files = folder.sizes()
        dataset = read_json(folder, DATASET_FILE) if DATASET_FILE in files else {}
        settings = read_json(folder, SETTINGS_FILE) if SETTINGS_FILE in files else dataset.get("settings", {})
        tars = tar_folder(folder, dataset)
        return cls(folder, tars, files, files if tars is folder else tars.sizes(), settings)

    @cached_property
    def names(self) -> list[str]:
        """The shards: those with a sidecar, in order."""
        return _shards(self.files, ".parquet")

    @cached_property
    def unfinished(self) -> list[str]:
        """The tars in this folder without a sidecar."""
        return sorted(set(_shards(self.files, ".tar")) - set(self.names))


def _shards(files: dict[str, int], extension: str) -> list[str]:
    stems = (name.removesuffix(extension) for name in files if name.endswith(extension))
    return sorted(stem for stem in stems if SHARD_PATTERN.fullmatch(stem))


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """The object in a JSON file; ShardError where it holds none."""
    try:
        found = json.loads(folder.read(name))
    except ValueError as error:
        raise ShardError(f"{folder.url}/{name}: not readable as JSON ({error}); restore it, or index the folder again") from None
    if not isinstance(found, dict):
        raise ShardError(f"{folder.url}/{name}: holds no JSON object; restore it, or index the folder again")
    return found


def used_filters(settings: dict[str, Any]) -> dict[str, Any]:
    """The bounds that decided which clips are kept: those of the latest subset, else those the shards were made with."""
    return settings.get("subset", {}).get("filters") or settings.get("filters", {})


def tar_folder(folder: Folder, dataset: dict[str, Any]) -> Folder:
    """Where the tars of a folder lie, by its dataset.json: an absolute place, or one relative to the folder."""
    place = dataset.get(TARS)
    if place is None:
        return folder
    if "://" in place or place.startswith("/"):
        return Folder(place)
    return Folder(_prefix(folder) + posixpath.normpath(posixpath.join(folder.root, place)))


def tar_place(folder: Folder, tars: Folder) -> str:
    """What dataset.json in `folder` says of `tars`: relative where both may be moved together, absolute where they have no common root."""
    same_store = _prefix(folder) == _prefix(tars)
    if same_store and _first_part(folder) == _first_part(tars):
        return posixpath.relpath(tars.root, folder.root)
    return tars.root if tars.is_local else tars.url


def _prefix(folder: Folder) -> str:
    """What stands before the path in the URL, as "s3://"; nothing for plain local paths."""
    return folder.url.removesuffix(folder.root) if "://" in folder.url else ""


def _first_part(folder: Folder) -> str:
    return folder.root.lstrip("/").partition("/")[0]
