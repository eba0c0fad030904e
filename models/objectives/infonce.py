"""Contrastive loss of segments (MultiSoundGen, equations 1 and 2), with negatives from every rank or from this one."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.collectives import gather, rank_count

__all__ = ["NEGATIVES", "segment_infonce"]

NEGATIVES = ("global", "local")


def segment_infonce(
    audio: Tensor, video: Tensor, temperature: Tensor | float, negatives: Literal["global", "local"] = "global"
) -> tuple[Tensor, Tensor]:
    """Loss and retrieval accuracy of the paired segments (N, D) of this rank, averaged over them and over both directions.

    Row i of both is the same segment; other segments of its clip and all of the other clips are negatives: "global" takes those of all
    ranks, which must hold equally many, "local" those of this rank. Averaged over ranks, as data-parallel training averages gradients,
    loss and gradient are those of the global batch, or with "local" the mean over the batches of the ranks. A rank scores only its own
    rows: N x (N * ranks) logits in each direction.
    """
    if audio.shape != video.shape or audio.dim() != 2:
        raise ValueError(f"segment_infonce takes audio and video of one shape (N, D), not {tuple(audio.shape)} and {tuple(video.shape)}")
    if negatives not in NEGATIVES:
        raise ValueError(f"segment_infonce: negatives is {negatives!r}: choose one of {', '.join(NEGATIVES)}")
    # bfloat16 logits divided by a small temperature are wrong in the first digit.
    with torch.autocast(audio.device.type, enabled=False):
        audio, video = (F.normalize(x.float(), dim=1) for x in (audio, video))
        others, first = ((gather(audio), gather(video)), _first_row(audio)) if negatives == "global" else ((audio, video), 0)
        target = torch.arange(first, first + len(audio), device=audio.device)
        directions = [mine @ theirs.T / temperature for mine, theirs in ((audio, others[1]), (video, others[0]))]
        loss = sum(F.cross_entropy(logits, target) for logits in directions) / 2
        hits = [(logits.argmax(dim=1) == target).float().mean() for logits in directions]
    return loss, sum(hits) / 2


def _first_row(x: Tensor) -> int:
    """Place of this rank's first row among those of all ranks."""
    return dist.get_rank() * len(x) if rank_count() > 1 else 0
