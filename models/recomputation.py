"""Activation checkpointing: activations that are computed again in the backward pass rather than kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_chunks", "is_recomputing", "recomputed"]

_RECOMPUTING: ContextVar[bool] = ContextVar("recomputing", default=False)


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`, which keeps only its inputs for the backward pass and is run again there. It may be nested."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    # ZeRO-3 shows a parameter as empty or whole by turns, so the metadata of the two runs may differ; their values do not.
    return checkpoint(function, *inputs, use_reentrant=False, determinism_check="none", context_fn=_contexts)


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """Rows of `function(x)`, computed `size` rows of `x` at a time and once more in the backward pass; 0 = all at once, kept.

    Cached gradients (Gao et al. 2021, arXiv:2101.06983) in one graph: a loss over all rows is exact, with the activations of one
    chunk in memory. One backward pass, so that gradients are reduced over ranks once, under every ZeRO stage.
    """
    if size == 0:
        return function(x)
    return torch.cat([recomputed(function, part) for part in x.split(size)])


def is_recomputing() -> bool:
    """Whether this is a second run: running statistics, for one, have seen its batch already."""
    return _RECOMPUTING.get()


def _contexts():
    return nullcontext(), _again()


@contextmanager
def _again() -> Iterator[None]:
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)
