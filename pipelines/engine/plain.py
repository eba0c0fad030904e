"""A stage's module without an engine around it, for validation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn


class PlainCopy:
    """The module as it was built, with fp32 weights while they are in use and none otherwise.

    A validation reads weights in other places than the forward pass, where stage 3 has them in pieces; and in bf16 it would measure
    rounded weights that nobody exports.
    """

    def __init__(self, module: nn.Module):
        self._module = _without_weights(copy.deepcopy(module))

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, torch.Tensor], device: torch.device) -> Iterator[nn.Module]:
        """The module in evaluation mode on `device` with the state dict `weights`."""
        self._module.load_state_dict(weights, assign=True)
        try:
            yield self._module.to(device).eval()
        finally:
            _without_weights(self._module)


def _without_weights(module: nn.Module) -> nn.Module:
    return module._apply(lambda tensor: torch.empty_like(tensor, device="meta") if isinstance(tensor, nn.Parameter) else tensor)
