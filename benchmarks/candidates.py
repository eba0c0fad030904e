"""Candidates of small_16k for preference rounds: all of a batch of videos together, against one after the other.

One by one is how public code is run by hand: a candidate at a time, and at every step a conditional and an unconditional pass that share
nothing. `one pass` takes the candidates one at a time too, but both flows in one pass: what of the ratio is due to batches is seen from
it. All three start from the same noise and end in the same latents.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import alternate, machine, show
from benchmarks.generator_step import made_inputs, made_model
from benchmarks.guided_sampling import STRENGTH, two_passes
from models.generators.mmdit import MMDiT
from models.objectives.flow_matching import integrate

Given = dict[str, torch.Tensor]


def guided(model: MMDiT, given: Given):
    """Our flow as a function of (x, t)."""
    return model.guidance(given["latent"].shape[:2], given["clip"], given["sync"], given["text"], STRENGTH)


def sampled(flow_of: Callable, given: Given, size: int, steps: int) -> torch.Tensor:
    """Latents of all candidates, generated `size` at a time."""
    rows = torch.arange(len(given["latent"])).split(size)
    parts = ({name: values[part] for name, values in given.items()} for part in rows)
    latents = torch.cat([integrate(flow_of(part), part["latent"], steps) for part in parts])
    if latents.is_cuda:
        torch.cuda.synchronize()
    return latents


@torch.no_grad()
def main() -> None:
    """Print seconds per candidate and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, nargs="+", default=[1])
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model, rows = made_model().eval().requires_grad_(False).to(options.device), []
    for videos in options.videos:
        count = videos * options.candidates
        given = {name: values.to(options.device) for name, values in made_inputs(videos).items()}
        given = {name: values.repeat_interleave(options.candidates, 0) for name, values in given.items()}
        given["latent"] = torch.randn_like(given["latent"])
        ways = {"two passes": (two_passes, 1), "one pass": (guided, 1), "batch": (guided, count)}
        runs = {name: partial(sampled, partial(flow_of, model), given, size, options.steps) for name, (flow_of, size) in ways.items()}
        latents = {name: run() for name, run in runs.items()}  # also the first, slower calls
        difference = (latents["batch"] - latents["two passes"]).abs().max() / latents["two passes"].abs().max()
        seconds = {name: value / count for name, value in alternate(runs, options.repeats).items()}
        rows.append([f"{videos} x {options.candidates}", *seconds.values(), seconds["two passes"] / seconds["batch"],
                     seconds["one pass"] / seconds["batch"], difference.item()])
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"{machine('torch')}, {where}; {options.steps} steps, without decoding and scoring")
    show("Candidates of small_16k, seconds each", ["videos x candidates", "one by one, two passes", "one by one, one pass", "in a batch",
                                                   "ratio to two passes", "ratio to one pass", "relative difference"], rows)


if __name__ == "__main__":
    main()
