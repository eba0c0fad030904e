"""Guided sampling with small_16k: one prepared batched pass per step, against two passes per step that share nothing.

Both run in turn on the same weights: `two passes`, the public layout run on the conditions and on the empties at every step; `one pass`,
ours, with both flows in one batch and what does not depend on time computed before.
The bound is the ratio of the multiplications of one step, as counted by torch: what is left to gain is the way up to it.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import alternate, machine, show
from benchmarks.generator_step import Reference, made_inputs, made_model
from models.generators.mmdit import MMDiT

STRENGTH = 4.5


def two_passes(model: MMDiT, given: dict[str, torch.Tensor]):
    """The flow as a function of (x, t), in the reference layout."""
    reference, (batch, length, _) = Reference(model), given["latent"].shape
    clip_len, sync_len = model.config.condition_lengths(length)
    empties = (model.empty_clip_feat.expand(batch, clip_len, -1), model.empty_sync_feat.expand(batch, sync_len, -1), None)

    def flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditional = reference(x, given["clip"], given["sync"], given["text"], t)
        return STRENGTH * conditional + (1 - STRENGTH) * reference(x, *empties, t)

    return flow


def one_pass(model: MMDiT, given: dict[str, torch.Tensor]):
    """The flow as a function of (x, t), ours."""
    return model.guidance(given["latent"].shape[:2], given["clip"], given["sync"], given["text"], STRENGTH)


def multiplications(work) -> float:
    """Multiply-adds of a call, in billions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2e9


@torch.no_grad()
def main() -> None:
    """Print seconds per step and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, rows, left = made_model().eval().requires_grad_(False), [], []
    for batch in options.batches:
        given = made_inputs(batch)
        flows = {"two passes": two_passes(model, given), "one pass": one_pass(model, given)}
        runs = {name: partial(flow, given["latent"], given["t"]) for name, flow in flows.items()}
        seconds = alternate(runs | {"preparing": partial(one_pass, model, given)}, options.repeats)
        rows.append([batch, *seconds.values(), seconds["two passes"] / seconds["one pass"]])
        work = [multiplications(run) for run in runs.values()]
        left.append([batch, *work, work[0] / work[1]])
    print(f"{machine('torch')}, {torch.get_num_threads()} threads")
    show("Guided sampling, small_16k: seconds per step, and once per sample for preparing",
         ["batch", "two passes", "one pass", "preparing", "ratio"], rows)
    show("Billions of multiplications per step", ["batch", "two passes", "ours", "bound of the ratio"], left)


if __name__ == "__main__":
    main()
