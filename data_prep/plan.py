"""Which rows of a manifest make which shard: a function of the manifest and a seed, whichever task asks, in little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.digests import ContentHash, hex_digest, keys_total
from data_prep.manifest import Manifest
from data_prep.order import mix, permute

_BLOCK = 1 << 14
_DEAL = 0x4445414C
"""Keeps the order of dealing apart from the orders of training."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard: the rows at places `first` to `last` of its split's order."""

    number: int
    split: str
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


@dataclass
class Survey:
    """What one walk over a manifest tells: hashes, and the split of every row in a byte."""

    hash: str
    """SHA-256 of the contents."""
    keys: str
    """`digests.keys_digest` of the keys."""
    mean_seconds: float | None
    """Mean length of the clips whose end is given."""
    splits: list[str]
    """Names of the splits, sorted."""
    _codes: np.ndarray = field(repr=False)
    """(rows,) uint8: which of `splits` each row is in."""
    _known_ends: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, manifest: Manifest) -> Survey:
        """Walk over the manifest once."""
        contents, keys, names, codes = ContentHash(), 0, {}, []
        seconds = known = 0.0
        for table in manifest.tables():
            contents.update(table)
            keys += keys_total(table["key"].to_pylist())
            codes.append(_split_codes(table["split"], names))
            lengths = pc.drop_null(pc.subtract(table["end"], table["start"]))
            seconds, known = seconds + (pc.sum(lengths).as_py() or 0.0), known + len(lengths)
        order = sorted(names)
        place = np.array([order.index(name) for name in names], np.uint8)
        codes = place[np.concatenate(codes)] if codes else np.zeros(0, np.uint8)
        return cls(contents.hexdigest(), hex_digest(keys), seconds / known if known else None, order, codes)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._codes)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows of each split."""
        return {split: int(self._ends(code)[-1]) for code, split in enumerate(self.splits)}

    def _ends(self, code: int) -> np.ndarray:
        """Rows of a split up to the end of each block of rows."""
        if code not in self._known_ends:
            starts = range(0, len(self._codes), _BLOCK)
            self._known_ends[code] = np.cumsum([np.count_nonzero(self._codes[start : start + _BLOCK] == code) for start in starts])
        return self._known_ends[code]

    def numbers(self, split: str, ordinals: np.ndarray) -> np.ndarray:
        """Row numbers of the given rows of a split, counted within it from 0."""
        code = self.splits.index(split)
        ends, found = self._ends(code), np.empty(len(ordinals), np.int64)
        block = np.searchsorted(ends, ordinals, side="right")
        for index in np.unique(block).tolist():
            inside = np.flatnonzero(self._codes[index * _BLOCK : (index + 1) * _BLOCK] == code)
            here = block == index
            found[here] = index * _BLOCK + inside[ordinals[here] - (ends[index - 1] if index else 0)]
        return found


def _split_codes(splits: pa.ChunkedArray, names: dict[str, int]) -> np.ndarray:
    """The splits of some rows as numbers, in the order in which they first came."""
    found = splits.combine_chunks().dictionary_encode()
    own = np.array([names.setdefault(name, len(names)) for name in found.dictionary.to_pylist()])
    if len(names) > 256:
        raise ValueError(f"more than 256 splits, the last {next(reversed(names))!r}: the column split names parts such as train and test")
    return own[found.indices.to_numpy()].astype(np.uint8)


def plan_shards(counts: dict[str, int], rows_per_shard: int) -> list[ShardPlan]:
    """Deal the rows of each split to shards of equal length, at most `rows_per_shard`."""
    plans: list[ShardPlan] = []
    for split, rows in sorted(counts.items()):
        shards = math.ceil(rows / rows_per_shard)
        bounds = [rows * number // shards for number in range(shards + 1)]
        plans += [ShardPlan(len(plans) + i, split, bounds[i], bounds[i + 1]) for i in range(shards)]
    return plans


def rows_of(plan: ShardPlan, survey: Survey, seed: int) -> np.ndarray:
    """Row numbers of a shard, in its order: the split's rows are permuted by a keyed bijection, evaluated for these alone.

    No random generator is asked, whose stream might be another in the next release.
    """
    size, key = survey.counts[plan.split], mix(seed, _DEAL, *plan.split.encode())
    ordinals = np.array([permute(place, size, key) for place in range(plan.first, plan.last)], np.int64)
    return survey.numbers(plan.split, ordinals)


def walks(plans: list[ShardPlan], rows: int) -> Iterator[list[ShardPlan]]:
    """Group shards so that one walk over the manifest collects at most about so many rows for them."""
    group: list[ShardPlan] = []
    for plan in plans:
        if group and sum(map(len, group)) + len(plan) > rows:
            yield group
            group = []
        group.append(plan)
    if group:
        yield group
