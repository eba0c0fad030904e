"""Batch normalisation that says whose batch it measures."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.collectives import gather, rank_count
from models.recomputation import is_recomputing

__all__ = ["POLICIES", "BatchNorm"]

POLICIES = ("local", "sync", "frozen")


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all axes but the channels'.

    In training "local" measures the batch of this rank, "sync" that of all ranks, which must hold equally many rows, and "frozen"
    none: it applies the running statistics and leaves them alone. DeepSpeed rounds parameters to bfloat16 and leaves buffers in
    float32; torch's own refuses to mix the two.
    """

    def __init__(self, dim: int, policy: Literal["local", "sync", "frozen"] = "local", affine: bool = True):
        super().__init__(dim, affine=affine)
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, ...) -> the same, in the type of `x`."""
        mean, var = self.running_mean, self.running_var
        weight, bias = (None if parameter is None else parameter.to(mean.dtype) for parameter in (self.weight, self.bias))
        measure = self.training and self.policy != "frozen"
        # A recomputed pass sees a batch that the running statistics have counted already.
        momentum = 0.0 if is_recomputing() else self.momentum
        if measure and self.policy == "sync" and rank_count() > 1:
            return self._over_ranks(x, weight, bias, momentum)
        return F.batch_norm(x, mean, var, weight, bias, measure, momentum, self.eps)

    def _over_ranks(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float) -> Tensor:
        mean, var, count = _global_statistics(x.detach().to(self.running_mean.dtype))
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (count / (count - 1)), momentum)
        return _Normalise.apply(x, weight, bias, mean, var, count, self.eps)


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and variance (C,) of each channel over the batch of all ranks, and how many values that are."""
    var, mean = torch.var_mean(x, _axes(x), correction=0)
    means, variances = gather(torch.stack([mean, var])[None]).unbind(dim=1)
    mean = means.mean(dim=0)
    # Not the mean square less the squared mean, which cancels where the mean is large.
    return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0), len(means) * x.numel() // x.shape[1]


class _Normalise(torch.autograd.Function):
    """(x - mean) / std * weight + bias, where mean and variance are functions of the `x` of all ranks.

    torch.nn.SyncBatchNorm trains on GPUs only. As in it, the gradients of weight and bias are this rank's share.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps):
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count = count
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, inverse_std = ctx.saved_tensors
        shape = (1, -1) + (1,) * (x.dim() - 2)
        normal = (x - mean.view(shape)) * inverse_std.view(shape)
        grad_weight, grad_bias = (grad * normal).sum(_axes(x)), grad.sum(_axes(x), dtype=mean.dtype)
        averages = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(averages)
        along, level = (average.view(shape) for average in averages / ctx.count)
        scale = inverse_std if weight is None else inverse_std * weight
        grad_x = ((grad - level - normal * along) * scale.view(shape)).to(x.dtype)
        return grad_x, *((None, None) if weight is None else (grad_weight, grad_bias)), None, None, None, None


def _axes(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]
