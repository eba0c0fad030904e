"""How much memory training needs before it starts: the model's states by ZeRO stage, without the activations.

Follows the accounting of ZeRO (Rajbhandari et al., 2020, section 3) for what the engine here holds: with bf16 the fp32 master weights
are beside the model's, and in fp32 stages 1 and 2 hold them twice as well. run: python -m pipelines.engine.memory
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

GB = 1e9


@dataclass(frozen=True)
class States:
    """Bytes per rank that last from step to step, and the gradients at their peak."""

    parameters: int
    """What the forward pass multiplies with."""
    master: int
    """fp32 weights of the optimiser, where they are not the parameters themselves."""
    moments: int
    """Both moments of AdamW, fp32."""
    gradients: int
    """Averaged gradients before the update, or at it together with the copies that DeepSpeed makes of them."""
    averages: int
    """Averaged weights, fp32."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.master + self.moments + self.gradients + self.averages


def model_states(trainable: int, stage: Literal[0, 1, 2, 3], ranks: int, precision: Literal["fp32", "bf16"] = "bf16", averages: int = 1,
                 frozen: int = 0, offload_optimiser: bool = False) -> States:
    """What one rank's device holds for a model of so many parameters; a share of a rank is the largest one.

    averages: averaged copies of the weights. offload_optimiser: master weights, moments and averages are in the host's memory.
    """
    width = 2 if precision == "bf16" else 4
    share = -(-trainable // ranks)
    owned = trainable if stage == 0 else share
    apart = 0 if stage == 0 and precision == "fp32" else 4 * owned
    here = not offload_optimiser
    gradients = width * (share if stage >= 2 else trainable)
    if here and stage:
        # A flat copy of the share and one of that in fp32, which in fp32 is the same: stage_1_and_2.py and stage3.py of DeepSpeed.
        gradients = max(gradients, 8 * share)
    elif here and precision == "bf16":
        gradients += 4 * trainable  # unfused_optimizer.py: all of them at once
    return States(
        parameters=width * (share + -(-frozen // ranks) if stage == 3 else trainable + frozen),
        master=apart * here,
        moments=8 * owned * here,
        gradients=gradients,
        averages=4 * averages * share * here,
    )


SIZES = {"0.16 B (`small_16k`)": 157_283_644, "0.5 B": 500_000_000, "1 B": 1_000_000_000}
"""Parameters of the models in the table."""


def table(sizes: dict[str, int] = SIZES, ranks: tuple[int, ...] = (8, 16, 32, 64)) -> str:
    """Markdown: GB per GPU by number of parameters, stage and number of GPUs, bf16 with one average."""
    rows = [f"| parameters | ZeRO stage | {' | '.join(f'{n} GPUs' for n in ranks)} |", f"|{'---|' * (len(ranks) + 2)}"]
    cases = [*((str(stage), stage, False) for stage in (0, 1, 2, 3)), ("2, optimiser on the host", 2, True)]
    for (name, trainable), (title, stage, offload) in itertools.product(sizes.items(), cases):
        totals = (model_states(trainable, stage, n, offload_optimiser=offload).total for n in ranks)
        rows.append(f"| {name} | {title} | {' | '.join(f'{total / GB:.2f}' for total in totals)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
