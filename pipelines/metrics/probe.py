"""A linear probe: the onsets that a straight line can read from features over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.metrics.onsets import onset_f1

__all__ = ["OnsetProbe", "onset_density"]

WIDTH = 0.04
"""Standard deviation of an onset's bump, seconds: a frame of video."""
GAP = 0.1
"""Least seconds between two onsets of a curve."""
LEVELS = 32
"""Levels that are tried."""


def onset_density(onsets: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """How near an onset is at each of the times (T,), in [0, 1]: 1 at one, falling off as a Gaussian."""
    if not len(onsets):
        return np.zeros(len(seconds))
    distance = np.abs(seconds[:, None] - np.asarray(onsets)[None]).min(axis=1)
    return np.exp(-0.5 * (distance / WIDTH) ** 2)


class OnsetProbe:
    """Ridge regression from each token and its neighbours to `onset_density`, fitted on batches as they come.

    Every fourth clip is kept out of the fit; on those the level is chosen above which the crests of a curve count as onsets.
    """

    def __init__(self, seconds: np.ndarray, group: int, penalty: float = 0.01, reach: int = 2):
        """Tokens lie at `seconds` (N,), in groups of `group` that may overlap in time; neighbours are taken up to `reach` within one.

        `penalty` is on standardised inputs, so that the scale of the features does not matter.
        """
        self.seconds = np.unique(seconds.round(3))
        self._token_seconds, self._group, self._penalty, self._reach = seconds, group, penalty, reach
        self._place = torch.as_tensor(np.searchsorted(self.seconds, seconds.round(3)))
        self._moments: Tensor | None = None
        self._seen, self._kept = 0, []
        self._weight: Tensor | None = None
        self.level = 0.0
        """Least height of a crest that is an onset."""

    def add(self, tokens: Tensor, onsets: Sequence[np.ndarray]) -> None:
        """Take account of clips: tokens (B, N, D) and the onset times of each."""
        held = (torch.arange(self._seen, self._seen + len(tokens)) % 4 == 3).tolist()
        self._seen += len(tokens)
        self._kept += [(clip.cpu(), times) for clip, times, keep in zip(tokens, onsets, held, strict=True) if keep]
        rows = [row for row, keep in enumerate(held) if not keep]
        if rows:
            target = np.stack([onset_density(onsets[row], self._token_seconds) for row in rows])
            x = self._inputs(tokens[rows]).flatten(0, 1)
            # With a column of ones and the target, one product holds all that the regression needs.
            joined = torch.cat([x, x.new_ones(len(x), 1), torch.as_tensor(target).to(x).reshape(-1, 1)], dim=1)
            product = joined.T @ joined
            self._moments = product if self._moments is None else self._moments + product

    def fit(self) -> None:
        """Solve the regression and choose the level. ValueError: fewer than four clips were added."""
        if not self._kept:
            raise ValueError(f"a linear probe needs at least four clips, got {self._seen}: prepare more training clips")
        moments = self._moments / self._moments[-2, -2]
        mean, target = moments[-2, :-2], moments[-2, -1]
        covariance = moments[:-2, :-2] - torch.outer(mean, mean)
        std = covariance.diagonal().clamp_min(1e-12).sqrt()
        correlation = covariance / torch.outer(std, std) + self._penalty * torch.eye(len(mean)).to(covariance)
        weight = torch.linalg.solve(correlation, (moments[:-2, -1] - target * mean) / std) / std
        self._weight = torch.cat([weight, (target - weight @ mean)[None]])
        curves = np.concatenate([self.curves(clip[None]) for clip, _ in self._kept])
        levels = np.quantile(curves, np.linspace(0.5, 1.0, LEVELS, endpoint=False))
        true = [times for _, times in self._kept]
        scores = [np.mean([onset_f1(self._crests(curve, level), times) for curve, times in zip(curves, true, strict=True)])
                  for level in levels]  # fmt: skip
        self.level = float(levels[int(np.argmax(scores))])

    def curves(self, tokens: Tensor) -> np.ndarray:
        """Predicted `onset_density` (B, T) at `self.seconds` (T,) from tokens (B, N, D); tokens at one time are averaged."""
        weight = self._weight.to(tokens.device)
        predicted = self._inputs(tokens) @ weight[:-1] + weight[-1]
        place, shape = self._place.to(tokens.device), (len(tokens), len(self.seconds))
        total = predicted.new_zeros(shape).index_add_(1, place, predicted)
        return (total / place.bincount(minlength=len(self.seconds))).cpu().numpy()

    def onsets(self, curve: np.ndarray) -> np.ndarray:
        """Onset times in seconds, ascending, of a curve (T,)."""
        return self._crests(curve, self.level)

    def _crests(self, curve: np.ndarray, level: float) -> np.ndarray:
        before, after = (np.pad(curve, 1, constant_values=-np.inf)[side] for side in (slice(None, -2), slice(2, None)))
        kept: list[float] = []
        crests = np.flatnonzero((curve > level) & (curve > before) & (curve >= after))
        for place in crests[np.argsort(-curve[crests], kind="stable")]:
            if all(abs(self.seconds[place] - other) >= GAP for other in kept):
                kept.append(float(self.seconds[place]))
        return np.sort(np.array(kept))

    def _inputs(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> each with its neighbours (B, N, (2 reach + 1) D); at the ends of a group the last one stands again."""
        groups = tokens.double().unflatten(1, (-1, self._group))
        places = torch.arange(self._group)[:, None] + torch.arange(-self._reach, self._reach + 1)
        return groups[:, :, places.clamp(0, self._group - 1)].flatten(3).flatten(1, 2)
