"""Random numbers of training as a pure function of (seed, position in the stream).

Noise, flow times and condition dropout therefore do not depend on how many ranks or workers read the stream, and a resumed run
draws what the interrupted one would have drawn, with no generator state to save.
"""

from __future__ import annotations

import numpy as np
import torch


class Draws:
    """Independent generators, one per clip of a batch."""

    def __init__(self, seed: int, positions: torch.Tensor, device: torch.device | str = "cpu"):
        self._generators = [_generator(seed, int(position)) for position in positions]
        self._device = device

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values (B, *shape)."""
        return self._stack(torch.randn, shape)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform values in [0, 1) (B, *shape)."""
        return self._stack(torch.rand, shape)

    def _stack(self, draw, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([draw(shape, generator=g) for g in self._generators]).to(self._device)


def _generator(seed: int, position: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
