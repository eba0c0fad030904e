"""Averaged weights, sharded exactly as the optimiser's master weights are: no rank holds a second full copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.engine.zero import gather_weights, master_shards, swapped


class ShardedEMA:
    """Exponential moving average of the fp32 master weights that this rank owns.

    The decay is warmed up as min(decay, (1 + step) / (10 + step)), so that a short run is not dominated by its first weights.
    """

    def __init__(self, engine, decay: float):
        self._engine, self._decay = engine, decay
        self._average = [shard.detach().clone() for shard in master_shards(engine)] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        if not self._decay:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, list(master_shards(self._engine)), 1 - decay)

    def weights(self) -> dict[str, torch.Tensor]:
        """The full averaged state dict (the current weights where decay is 0); collective."""
        if not self._decay:
            return gather_weights(self._engine)
        with swapped(self._engine, self._average):
            return gather_weights(self._engine)

    def state(self) -> list[torch.Tensor]:
        """What this rank must save."""
        return self._average

    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Take back what `state` gave."""
        self._average = [shard.to(own.device) for shard, own in zip(state, master_shards(self._engine), strict=bool(state))]
