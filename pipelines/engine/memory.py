"""How much memory training needs before it starts: the model's states by ZeRO stage, without the activations.

Follows the accounting of ZeRO (Rajbhandari et al., 2020, section 3) for what the engine here holds: with bf16 the fp32 master weights
are beside the model's, and in fp32 stages 1 and 2 hold them twice as well. run: python -m pipelines.engine.memory
"""

from __future__ import annotations

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
    """Averaged gradients before the update."""
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
    return States(
        parameters=width * (share + -(-frozen // ranks) if stage == 3 else trainable + frozen),
        master=apart * here,
        moments=8 * owned * here,
        gradients=width * (share if stage >= 2 else trainable),
        averages=4 * averages * share * here,
    )


def table(trainable: int, ranks: tuple[int, ...] = (8, 16, 32, 64)) -> str:
    """Markdown: GB per GPU of a model of `trainable` parameters by stage and number of GPUs, bf16 with one average."""
    rows = [f"| ZeRO stage | {' | '.join(f'{n} GPUs' for n in ranks)} |", f"|{'---|' * (len(ranks) + 1)}"]
    for stage in (0, 1, 2, 3):
        rows.append(f"| {stage} | {' | '.join(f'{model_states(trainable, stage, n).total / GB:.1f}' for n in ranks)} |")
    row = " | ".join(f"{model_states(trainable, 2, n, offload_optimiser=True).total / GB:.1f}" for n in ranks)
    return "\n".join([*rows, f"| 2, optimiser on the host | {row} |"])


if __name__ == "__main__":
    print(table(1_000_000_000))
