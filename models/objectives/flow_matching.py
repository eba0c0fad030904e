"""Conditional flow matching along straight paths: t = 0 is noise, t = 1 is data (MultiSoundGen, equations A1-A3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def flow_time(quantile: Tensor, kind: str = "logit_normal") -> Tensor:
    """Times in (0, 1), float32, of uniform `quantile`s in [0, 1).

    "logit_normal" is sigmoid(N(0, 1)), as MMAudio trains; "uniform" weighs all times alike. Taking quantiles leaves the caller free to
    stratify them, or to draw them from the clip's position in the stream.
    """
    quantile = quantile.float().clamp(1e-6, 1 - 1e-6)
    if kind == "logit_normal":
        return torch.special.ndtri(quantile).sigmoid()
    if kind == "uniform":
        return quantile
    raise ValueError(f'time distribution "{kind}" is unknown: choose "logit_normal" or "uniform"')


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point `t data + (1 - t) noise` on each sample's path, and the target flow `data - noise` there; `t` is (B,)."""
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return t * data + (1 - t) * noise, data - noise


def flow_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,) in float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


@torch.no_grad()
def integrate(flow: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Data at t = 1 reached from `noise` at t = 0 by Euler steps of equal size; `flow(x, t)` takes t as (B,)."""
    if steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more Euler steps")
    x = noise
    for step in range(steps):
        t = torch.full((len(x),), step / steps, dtype=torch.float32, device=x.device)
        x = x + flow(x, t) / steps
    return x
