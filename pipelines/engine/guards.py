"""Steps that would do harm are left out, and too many of them take training back before the first of them.

Every rank judges the same sums over all ranks, so all of them decide alike without another word.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

import torch
from torch import nn

from pipelines.config.training import GuardConfig

_NORMAL = 1.4826
"""Standard deviations of a normal distribution per median absolute deviation."""
_FLOOR = 1e-3
"""Least deviation as a share of the median: losses that hardly move would make any change a spike."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what to look at."""


class Guard:
    """Judges each step before its update, and counts."""

    def __init__(self, config: GuardConfig):
        self._config = config
        self._good: deque[float] = deque(maxlen=config.window)
        self._bad: list[int] = []
        self._skipped = self._rollbacks = 0

    @property
    def skipped(self) -> int:
        """Steps left out since the run began."""
        return self._skipped

    def judge(self, step: int, loss: float, norm: float) -> str:
        """Why the update of step `step` (from 0) must not be made; an empty string where it may. Counts the step either way."""
        reason = self._harm(loss, norm)
        self._bad = [bad for bad in self._bad if bad > step - self._config.window]
        if reason:
            self._bad.append(step)
            self._skipped += 1
        else:
            self._good.append(loss)
        return reason

    def _harm(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return "loss not finite"
        if not math.isfinite(norm):
            return "gradient not finite"
        score = spike_score(loss, self._good) if len(self._good) == self._config.window else 0.0
        if self._config.spike_score and score > self._config.spike_score:
            return f"loss {loss:.4g} is {score:.0f} deviations above the last {self._config.window}"
        return ""

    @property
    def suspect(self) -> int | None:
        """First of the steps left out lately, which training may have to go back before; None where there is none."""
        return self._bad[0] if self._bad else None

    @property
    def exhausted(self) -> bool:
        """Whether so many steps were left out lately that the weights themselves must be in doubt."""
        return len(self._bad) >= self._config.max_skips

    def may_go_back(self, steps: int) -> bool:
        """Whether a run of so many steps can come to be exhausted and then be taken back."""
        return steps >= self._config.max_skips and self._config.max_rollbacks > 0

    def first_bad(self, step: int) -> int:
        """First of the steps left out, before which training must start again; TrainingError after `max_rollbacks` of that."""
        first = self._bad[0]
        if self._rollbacks == self._config.max_rollbacks:
            raise TrainingError(
                f"step {step}: {len(self._bad)} of the last {self._config.window} steps were left out, after {self._rollbacks} rollbacks; "
                "lower the learning rate or look at the data, then run again: it resumes from the last checkpoint")
        return first

    def restart(self, state: dict) -> None:
        """After a rollback to the checkpoint that held `state`: its losses are the measure again, and what was counted stays counted."""
        skipped, rollbacks = self._skipped, self._rollbacks
        self.load_state_dict(state)
        self._bad, self._skipped, self._rollbacks = [], skipped, rollbacks + 1

    def state_dict(self) -> dict:
        """What a restart needs."""
        return {"good": list(self._good), "bad": self._bad, "skipped": self._skipped, "rollbacks": self._rollbacks}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken."""
        self._good = deque(state["good"], maxlen=self._config.window)
        self._bad, self._skipped, self._rollbacks = list(state["bad"]), state["skipped"], state["rollbacks"]


class KeptBuffers:
    """A module's buffers as they were before a step: a forward pass changes running statistics before anybody can judge it."""

    def __init__(self, module: nn.Module):
        self._module = module
        self._copies: list[torch.Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Copy them, into the same memory at every call."""
        buffers = list(self._module.buffers())
        if len(buffers) != len(self._copies):
            self._copies = [torch.empty_like(buffer) for buffer in buffers]
        _copy(self._copies, buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give them the values that they had."""
        _copy(list(self._module.buffers()), self._copies)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def spike_score(loss: float, recent: deque[float]) -> float:
    """How many robust standard deviations a loss lies above the median of recent ones; below it the score is negative."""
    middle = median(recent)
    deviation = _NORMAL * median(abs(value - middle) for value in recent)
    return (loss - middle) / max(deviation, _FLOOR * abs(middle), 1e-12)
