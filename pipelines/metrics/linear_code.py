"""The best linear code of log-mels: what an autoencoder of the same size must beat."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["linear_code"]


def linear_code(training: Iterable[Tensor], mel: Tensor, channels: int, window: int = 8) -> tuple[Tensor, Tensor]:
    """Log-mels (B, F, T) through principal components of `window` frames at a time, `channels` values for every two frames.

    Returns the decoded and the true mel, both without the frames beyond the last whole window. The components are those of the batches
    `training`; memory does not depend on their number.
    """
    count, total, product = 0, 0.0, 0.0
    for batch in training:
        rows = _windows(batch, window).double()
        count, total, product = count + len(rows), total + rows.sum(dim=0), product + rows.T @ rows
    mean = total / count
    components = torch.linalg.eigh(product / count - torch.outer(mean, mean))[1].flip(1)[:, :channels * window // 2]
    rows = _windows(mel, window)
    mean, components = (each.to(rows) for each in (mean, components))
    decoded = (rows - mean) @ components @ components.T + mean
    bands, whole = mel.shape[1], mel.shape[2] // window * window
    return decoded.view(len(mel), -1, bands, window).transpose(1, 2).flatten(2), mel[..., :whole]


def _windows(mel: Tensor, window: int) -> Tensor:
    """Log-mels (B, F, T) -> windows (B * (T // window), F * window)."""
    return mel.unfold(2, window, window).transpose(1, 2).flatten(2).flatten(0, 1)
