"""Contrastive loss of segments (MultiSoundGen, equations 1 and 2), with negatives from every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gather", "segment_infonce"]


def segment_infonce(audio: Tensor, video: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """Loss and retrieval accuracy of paired segments (N, D) against all others in the global batch.

    Row i of both is the same segment; other segments of its clip and all of the other clips are negatives. N must be the same on
    every rank. Each rank returns the loss of the global batch; its gradient is right once gradients are averaged over ranks,
    as data-parallel training does: the backward of `gather` sums what the ranks ask of each row.
    """
    if audio.shape != video.shape or audio.dim() != 2:
        raise ValueError(f"segment_infonce takes audio and video of one shape (N, D), not {tuple(audio.shape)} and {tuple(video.shape)}")
    # bfloat16 logits divided by a small temperature are wrong in the first digit.
    with torch.autocast(audio.device.type, enabled=False):
        audio, video = (gather(F.normalize(x.float(), dim=1)) for x in (audio, video))
        logits = audio @ video.T / temperature
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        hits = [(scores.argmax(dim=1) == target).float().mean() for scores in (logits, logits.T)]
    return loss, sum(hits) / 2


def gather(x: Tensor) -> Tensor:
    """Rows of every rank, in rank order; differentiable. Without a process group, `x` itself."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all ranks. torch.distributed.nn has one, deprecated as of torch 2.13."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Gloo has no reduce-scatter of tensors; (N, D) embeddings are small enough to reduce whole.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
