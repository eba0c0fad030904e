"""Averaged gradients before the optimiser takes them: their norms by part of the model, and a step that leaves the weights alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import nn


class GradientNorms:
    """Squared gradient norms by part of the model: the children of the innermost module that holds all trainable parameters."""

    def __init__(self, engine):
        names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}
        parts = part_names(list(names.values()))
        self.parts = tuple(dict.fromkeys(parts))
        """Names of the parts, in the order of the model."""
        self._engine = engine
        self._part_of = {key: self.parts.index(part) for key, part in zip(names, parts, strict=True)}

    @torch.no_grad()
    def squares(self) -> torch.Tensor:
        """This rank's share of the squared norms (parts,), after backward and before `engine.step()`: their sum over ranks is exact."""
        found = list(_norms(self._engine))
        totals = torch.zeros(len(self.parts), dtype=torch.float64, device=self._engine.device)
        if not found:
            return totals
        index = torch.tensor([self._part_of[id(parameter)] for parameter, _ in found], device=totals.device)
        return totals.index_add_(0, index, torch.stack([norm.to(totals) for _, norm in found]).square())


def part_names(names: Sequence[str]) -> list[str]:
    """For each dotted parameter name the first component after what all names have in common."""
    paths = [name.split(".") for name in names]
    shared = os.path.commonprefix([path[:-1] for path in paths])
    return [path[len(shared)] for path in paths]


def _norms(engine) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Norms of the pieces of averaged gradients that this rank holds, no piece on two ranks."""
    stage, optimiser = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        # Every rank holds them all: one of them speaks.
        pieces = [(p, p.grad) for p in engine.module.parameters() if p.grad is not None] if engine.global_rank == 0 else []
    elif getattr(optimiser, "cpu_offload", False) or getattr(optimiser, "offload_optimizer", False):
        yield from _offloaded_norms(optimiser, stage)
        return
    elif stage == 3:
        pieces = [pair for number, group in enumerate(optimiser.fp16_groups)
                  for pair in zip(group, optimiser.averaged_gradients.get(number, ()), strict=False)]
    else:
        pieces = [pair for number, group in enumerate(optimiser.params_in_partition)
                  for pair in zip(group, _without_padding(optimiser.averaged_gradients[number]), strict=False)]
    if pieces:
        parameters, gradients = zip(*pieces, strict=True)
        yield from zip(parameters, torch._foreach_norm(gradients, dtype=torch.float32), strict=True)


def _without_padding(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [piece for piece in pieces or () if not getattr(piece, "_zero_padding", False)]


def _offloaded_norms(optimiser, stage: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """DeepSpeed notes the norms while it moves the gradients to the host."""
    groups = optimiser.fp16_groups if stage == 3 else optimiser.params_in_partition
    for parameter in (parameter for group in groups for parameter in group):
        norm = optimiser.norm_for_param_grads.get(optimiser.get_param_id(parameter))
        if norm is not None:
            yield parameter, torch.as_tensor(norm)


@contextlib.contextmanager
def update_held_back(engine) -> Iterator[None]:
    """Inside, `engine.step()` drops the gradients and counts as ever, and no weight, moment or count of the optimiser changes.

    In fp32 and bf16 DeepSpeed skips only what it finds not finite, and not under every stage; this holds for any reason and all stages.
    """
    optimiser = engine.basic_optimizer
    optimiser.step = _no_update
    try:
        yield
    finally:
        del optimiser.step


def _no_update(closure=None) -> None:
    """In place of torch.optim.Optimizer.step."""
