"""Whether every row of a manifest is in exactly one sidecar: by digest always, by name where something does not add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data_prep.digests import KeyLedger, hex_digest, key_digest, keys_total
from data_prep.index import some
from data_prep.layout import ShardFolder
from data_prep.manifest import Manifest
from data_prep.parallel import in_order
from data_prep.sidecar import read_sidecar

_TOLD = 10
"""Keys told by name; the others are counted."""
_BYTES = 8
"""Of a digest, enough to look for keys: among 10^8 keys two that agree by chance are not to be expected."""


class RowAccounts:
    """Takes the keys of all sidecars. Holds a few megabytes while they add up, else 8 bytes a key to name those that do not."""

    def __init__(self, shards: ShardFolder, manifest: Manifest | None):
        self._shards, self._manifest = shards, manifest
        self._ledger, self._names = KeyLedger(), []

    def __enter__(self) -> RowAccounts:
        self._ledger.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ledger.__exit__(*error)

    def add(self, name: str, keys: list[str]) -> None:
        """Note the keys in the sidecar of a shard; none where it cannot be read."""
        if keys:
            self._names.append(name)
        for key in keys:
            self._ledger.add(key)

    def manifest_problems(self) -> Iterator[str]:
        """A manifest that is not the one in the settings: told before the long reading."""
        known = self._shards.settings.get("manifest")
        if self._manifest and known and known != self._manifest.hash():
            yield f"{self._manifest.url}: not the manifest that these shards were made from: its hash is not the one in the settings"

    def problems(self) -> Iterator[str]:
        """Keys that come twice, rows of the manifest in no sidecar, and rows of the sidecars that it does not have."""
        if repeated := self._ledger.repeated():
            yield from self._repeated(repeated)
        if self._manifest is None:
            yield from self._against_settings(self._shards.settings)
        elif not self._is_manifest(self._manifest):
            yield from self._against(self._manifest)

    def _repeated(self, digests: set[bytes]) -> Iterator[str]:
        places: dict[str, list[str]] = {}
        for name, keys in self._keys():
            for key in keys:
                if key_digest(key) in digests:
                    places.setdefault(key, []).append(name)
        for key, names in sorted(places.items())[:_TOLD]:
            yield f"key {key} is there {len(names)} times: in {some(names)}; a row of the manifest belongs into one shard"
        if len(places) > _TOLD:
            yield f"{len(places) - _TOLD} more keys are there more than once"

    def _against_settings(self, settings: dict[str, Any]) -> Iterator[str]:
        remedy = "give the manifest to have the wrong ones named"
        if (rows := settings.get("rows", len(self._ledger))) != len(self._ledger):
            yield f"the sidecars that can be read hold {len(self._ledger)} rows, the manifest has {rows}; {remedy}"
        elif settings.get("keys", self._ledger.digest) != self._ledger.digest:
            yield f"the keys in the sidecars are not those of the manifest; {remedy}"

    def _is_manifest(self, manifest: Manifest) -> bool:
        if len(manifest) != len(self._ledger):
            return False
        return hex_digest(sum(map(keys_total, _key_lists(manifest)))) == self._ledger.digest

    def _against(self, manifest: Manifest) -> Iterator[str]:
        if missing := _strangers(_key_lists(manifest), _sorted_digests(keys for _, keys in self._keys())):
            yield f"{manifest.url}: {missing} in no sidecar"
        if foreign := _strangers((keys for _, keys in self._keys()), _sorted_digests(_key_lists(manifest))):
            yield f"{self._shards.folder.url}: {foreign} in the sidecars, but not in the manifest"

    def _keys(self) -> Iterator[tuple[str, list[str]]]:
        """The keys of each shard, once more."""
        return in_order(lambda name: (name, read_sidecar(self._shards.folder, name)["key"].to_pylist()), self._names)


def _key_lists(manifest: Manifest) -> Iterator[list[str]]:
    return (table["key"].to_pylist() for table in manifest.tables(["key"]))


def _digests(keys: list[str]) -> np.ndarray:
    """(keys,) heads of the keys' digests, as numbers."""
    return np.frombuffer(b"".join(key_digest(key)[:_BYTES] for key in keys), "<u8")


def _sorted_digests(lists: Iterable[list[str]]) -> np.ndarray:
    digests = np.concatenate([np.zeros(0, np.uint64), *map(_digests, lists)])
    digests.sort()
    return digests


def _strangers(lists: Iterable[list[str]], known: np.ndarray) -> str | None:
    """How many keys are not among the sorted digests, and the first of them, in words."""
    names, count = [], 0
    for keys in lists:
        digests = _digests(keys)
        places = np.minimum(np.searchsorted(known, digests), len(known) - 1)
        strange = np.flatnonzero(known[places] != digests) if len(known) else np.arange(len(keys))
        names += [keys[place] for place in strange[: _TOLD - len(names)]]
        count += len(strange)
    if not count:
        return None
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return f"{count} keys ({', '.join(names)}{more})" if count > 1 else f"key {names[0]}"
