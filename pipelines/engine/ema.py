"""Averaged weights, sharded as the optimiser's master weights are: no rank holds a second full copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from pipelines.config.ema import EMAConfig
from pipelines.engine.elastic import full_values, masters, shards
from pipelines.engine.profiles import gamma_of, power_decay
from pipelines.engine.snapshots import Snapshots
from pipelines.engine.zero import gather_weights


class ShardedEMA:
    """Averages of the fp32 master weights over the steps, on each rank of what it owns.

    config: which averages, or the decay of the only one. folder: where snapshots are stored, if the config wants some.
    """

    def __init__(self, engine, config: EMAConfig | float, folder: Path | None = None):
        self._engine = engine
        self._config = config if isinstance(config, EMAConfig) else EMAConfig.of_decay(config)
        self._decays = decays(self._config)
        self._shards = [shard for shard in shards(engine) if shard.owned]
        first = masters(engine)
        self.averages = {_name(which): [master.clone() for master in first] for which in self._decays}
        """Name -> tensors beside the shards that this rank owns: what a checkpoint holds and gives back."""
        self._snapshots = Snapshots(folder) if self._config.snapshot_every and folder else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps; collective where a snapshot is due."""
        for numbers in self._at_once() if self._decays else ():
            with self._shards[numbers[0]].in_memory():
                weights = [self._shards[number].master.detach() for number in numbers]
                for which, decay in self._decays.items():
                    torch._foreach_lerp_([self.averages[_name(which)][number] for number in numbers], weights, 1 - decay(step))
        if self._snapshots and step % self._config.snapshot_every == 0:
            self._store(step)

    def _at_once(self) -> list[list[int]]:
        """The shards that may be in memory together: all of them, or one by one where some come from a disk."""
        numbers = list(range(len(self._shards)))
        if any(shard.swap for shard in self._shards):
            return [[number] for number in numbers]
        return [numbers] if numbers else []

    def weights(self, step: int | None = None) -> dict[str, torch.Tensor]:
        """The full state dict with the average to export, or with the last weights where none is kept, on rank 0; collective.

        step: the last that came in, needed where the width to export is not kept but made of snapshots.
        """
        if not self._decays:
            return gather_weights(self._engine)
        which = next(iter(self._decays)) if self._config.export is None else self._config.export
        if which in self._decays:
            return gather_weights(self._engine, self.averages[_name(which)])
        self._store(step)
        weights = gather_weights(self._engine)
        return weights | self._snapshots.synthesise(which, step) if weights else {}

    def _store(self, step: int) -> None:
        for which in self._decays:
            full = full_values(self._engine, self.averages[_name(which)])
            if self._engine.global_rank == 0:
                self._snapshots.store(step, which, full)
        torch.distributed.barrier()


def decays(config: EMAConfig) -> dict[float, Callable[[int], float]]:
    """Half-life, decay or sigma_rel of each average -> how much of it stays at a step (from 1)."""
    if config.kind == "none":
        return {}
    if config.kind == "power":
        return {width: partial(power_decay, gamma_of(width)) for width in config.sigma_rels}
    return {half_life: partial(_warmed_up, 0.5 ** (1 / half_life)) for half_life in config.half_lives} or {
        config.decay: partial(_warmed_up, config.decay)}


def _warmed_up(decay: float, step: int) -> float:
    """A short run would else be dominated by its first weights."""
    return min(decay, (1 + step) / (10 + step))


def _name(which: float) -> str:
    return f"ema-{which}"
