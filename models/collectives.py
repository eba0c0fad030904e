"""What ranks tell one another inside a module: nothing else in models/ knows that there are several."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "rank_count"]


def rank_count() -> int:
    """Processes of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Rows of every rank, in rank order; differentiable. Without a process group, `x` itself."""
    return x if rank_count() == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all ranks. torch.distributed.nn has one, deprecated as of torch 2.13."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(rank_count())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Gloo has no reduce-scatter of tensors; (N, D) embeddings are small enough to reduce whole.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(rank_count())[dist.get_rank()]
