"""Preference optimisation of flow models: AVP-RPO of MultiSoundGen (arXiv:2509.19999, equations 3-5)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.collectives import rank_count


def bottom_quartile_score(similarities: Tensor) -> Tensor:
    """Mean of the floor(S / 4) smallest of (B, S) segment similarities, (B,): equation 3. Below four segments it is the minimum."""
    lowest = max(1, similarities.shape[-1] // 4)
    scores = similarities.topk(lowest, dim=-1, largest=False).values.mean(dim=-1)
    # To topk NaN is the largest of all: a clip with a broken segment would be scored by its sound ones.
    return scores.masked_fill(similarities.isnan().any(dim=-1), torch.nan)


_SEGMENT_SCORES = {
    "bottom_quartile": bottom_quartile_score,
    "mean": lambda similarities: similarities.mean(dim=-1),
    "min": lambda similarities: similarities.amin(dim=-1),
}


def segment_score(similarities: Tensor, kind: str = "bottom_quartile") -> Tensor:
    """Reward (B,) of clips from their segments' similarities (B, S): "bottom_quartile" (equation 3), "mean" or "min"; NaN where one is."""
    if kind not in _SEGMENT_SCORES:
        raise ValueError(f'segment score "{kind}" is unknown: choose one of {", ".join(_SEGMENT_SCORES)}')
    if similarities.shape[-1] == 0:
        raise ValueError("no segment to score: the clip is shorter than one segment of the encoder")
    return _SEGMENT_SCORES[kind](similarities)


class FlowDPO(NamedTuple):
    """Scalars of one batch of preference pairs."""

    loss: Tensor
    """Equation 4; ln 2 as long as the policy equals its reference."""
    margin: Tensor
    """Mean gain of the policy over the reference in (losing - winning) flow loss; detached."""
    accuracy: Tensor
    """Share of pairs with a positive margin; detached."""


def flow_dpo_loss(policy_win: Tensor, policy_lose: Tensor, reference_win: Tensor, reference_lose: Tensor, beta: float) -> FlowDPO:
    """`-log sigmoid(-beta ((policy_win - policy_lose) - (reference_win - reference_lose)))`, equation 4.

    The arguments are flow losses per sample (B,). Winner and loser of a pair, and both models, must share their noise and time.
    `beta` is the paper's beta_w for losses *averaged* over a latent's elements, as `flow_loss` gives them. TangoFlux writes a factor
    0.5 before its own beta: beta_w = 0.5 beta, so its 2000 is 1000 here.
    """
    margin = (reference_win - reference_lose) - (policy_win - policy_lose)
    observed = margin.detach()
    return FlowDPO(-F.logsigmoid(beta * margin).mean(), observed.mean(), (observed > 0).float().mean())


class RunningScale(nn.Module):
    """N(.) of equation 5, which the paper leaves open: a loss over its running maximum, so in [0, 1] with its gradient's direction.

    It is the loss of all ranks that is scaled: each on its own would weigh the two terms of equation 5 in its own way. One rank's part
    may then exceed 1, as their mean does not. The maximum is saved with the state.
    """

    def __init__(self, decay: float = 0.999):
        """`decay` per pass lets the maximum forget an early spike, which would silence its term for good; 1 keeps it."""
        super().__init__()
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}: give a value above 0, at most 1")
        self.decay = decay
        self.register_buffer("maximum", torch.zeros(()))

    def forward(self, loss: Tensor) -> Tensor:
        """Scalar `loss` >= 0, scaled to [0, 1]."""
        return loss / self.unit(loss)

    def unit(self, loss: Tensor) -> Tensor:
        """The running maximum with `loss` in it, detached: what a loss is divided by."""
        maximum = torch.maximum(_over_ranks(loss), self.decay * self.maximum.float())
        # A non-finite loss is skipped by the training loop, but a maximum that kept it would spoil every later step.
        if self.training:
            self.maximum.copy_(torch.where(maximum.isfinite(), maximum, self.maximum.float()))
        return maximum.clamp_min(torch.finfo(torch.float32).tiny)


class UnitScale(nn.Module):
    """N(.) as a loss over its own detached value: always 1, so both terms of equation 5 keep the same relative gradient.

    It never stops pushing pairs apart, for which the loser's flow loss has no bound: divided by L_DPO-FM as it falls, the gradient per
    unit of margin rises from beta / (2 ln 2) at the start to beta, however far all pairs are decided; that of the others goes to 0.
    """

    def forward(self, loss: Tensor) -> Tensor:
        return loss / _over_ranks(loss).clamp_min(torch.finfo(torch.float32).tiny)


def _over_ranks(loss: Tensor) -> Tensor:
    """Mean over the ranks of a scalar, float32 and detached: the loss of the whole batch, however many processes share it."""
    mean = loss.detach().float().clone()
    if rank_count() > 1:
        dist.all_reduce(mean)
        mean /= rank_count()
    return mean


BALANCED = "balanced"
_NORMALISATIONS = {BALANCED: RunningScale, "running_max": RunningScale, "detached": UnitScale, "none": nn.Identity}
OBJECTIVES = ("avp_rpo", "dpo", "flow_win")


def loss_normalisation(kind: str = BALANCED) -> nn.Module:
    """N(.) of equation 5 by name: "running_max", "detached" (divided by its own value) or "none"; "balanced" is a running maximum too,
    the winner's, which `AVPRPOLoss` takes for both terms."""
    if kind not in _NORMALISATIONS:
        raise ValueError(f'loss normalisation "{kind}" is unknown: choose one of {", ".join(_NORMALISATIONS)}')
    return _NORMALISATIONS[kind]()


class AVPRPOLoss(nn.Module):
    """`N(L_DPO-FM) + N(L_FM-win)`, equation 5: prefer the winner, and stay anchored to it when both losses would rise.

    "balanced" takes both terms in units of the winner's flow loss, L_DPO-FM / (beta s) + L_FM-win / s with the running maximum s of
    L_FM-win: each keeps its gradient's direction, per unit of flow loss that of the anchor is 1 / s and that of the preference at most as
    much, half of it while the policy equals its reference. Scaled each by its own maximum ("running_max"), the preference would then weigh
    beta L_FM-win / (2 ln 2) times the anchor. As in equation 4 a pair is let go at a margin of a few 1 / beta. The anchor's term lies
    in [0, 1]; so does that of the preference from beta >= ln 2 / s on, as long as no margin falls below ln 2 / beta - s.

    The objective "dpo" is equation 4 alone, "flow_win" L_FM-win alone, what fine-tuning on the winner would do without any preference:
    each as it stands, for what is not added to anything needs no scale.
    """

    def __init__(self, beta: float, normalisation: str = BALANCED, objective: str = "avp_rpo"):
        super().__init__()
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta is {beta}: give a positive number, such as 1000 (TangoFlux's 2000 x 0.5)")
        if objective not in OBJECTIVES:
            raise ValueError(f'objective "{objective}" is unknown: choose one of {", ".join(OBJECTIVES)}')
        self.beta, self.objective = beta, objective
        if objective == "avp_rpo":
            self.scale_dpo = None if normalisation == BALANCED else loss_normalisation(normalisation)
            self.scale_win = loss_normalisation(normalisation)

    def forward(self, policy_win: Tensor, policy_lose: Tensor, reference_win: Tensor, reference_lose: Tensor) -> dict[str, Tensor]:
        """`loss`, and detached scalars for the log; the arguments are those of `flow_dpo_loss`."""
        dpo = flow_dpo_loss(policy_win, policy_lose, reference_win, reference_lose, self.beta)
        terms = self._terms(dpo.loss, policy_win.mean())
        seen = {"dpo": dpo.loss, "margin": dpo.margin, "accuracy": dpo.accuracy, **terms}
        seen |= _sides(policy_win, policy_lose, reference_win, reference_lose)
        return {"loss": sum(terms.values())} | {name: value.detach() for name, value in seen.items()}

    def _terms(self, dpo: Tensor, win: Tensor) -> dict[str, Tensor]:
        """What is added up, by its name in the log."""
        if self.objective != "avp_rpo":
            return {"dpo": dpo} if self.objective == "dpo" else {"flow_win": win}
        if self.scale_dpo is not None:
            return {"scaled_dpo": self.scale_dpo(dpo), "scaled_win": self.scale_win(win)}
        unit = self.scale_win.unit(win)
        return {"scaled_dpo": dpo / (self.beta * unit), "scaled_win": win / unit}


def _sides(policy_win: Tensor, policy_lose: Tensor, reference_win: Tensor, reference_lose: Tensor) -> dict[str, Tensor]:
    """Which side moves: a margin made by a rising loss of the loser alone, while the winner's rises too, is the first sign of trouble."""
    win, lose, win_before, lose_before = (loss.mean() for loss in (policy_win, policy_lose, reference_win, reference_lose))
    return {"flow_win": win, "flow_lose": lose, "reference_win": win_before, "reference_lose": lose_before,
            "margin_win": win_before - win, "margin_lose": lose - lose_before}
