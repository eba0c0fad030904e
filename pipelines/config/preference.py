"""Section `preference`: stage 4."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.fields import check
from pipelines.config.training import OptimiserConfig, TrainConfig


@dataclass(kw_only=True)
class DistortionConfig:
    """Losers made from the true sound by moving it in time, coarsely at first, subtly at last (the idea of SyncDPO, arXiv 2605.12179)."""

    kinds: tuple[Literal["shift", "warp", "swap"], ...] = ("shift", "warp", "swap")
    """What is done to it: moved as a whole, stretched and squeezed within, or two neighbouring stretches exchanged."""
    levels: int = 4
    """Sizes of the distortion, from `coarse_seconds` to `subtle_seconds` in equal ratios."""
    coarse_seconds: float = 0.64
    """How far sound is moved at the start of a round; less than half a clip, and with warp at most a quarter."""
    subtle_seconds: float = 0.08
    """How far at its end; at least one latent."""

    def __post_init__(self):
        check(bool(self.kinds), "kinds is empty: name at least one of shift, warp, swap")
        check(len(set(self.kinds)) == len(self.kinds), f"kinds names one twice: {', '.join(self.kinds)}")
        check(self.levels >= 1, f"levels is {self.levels}: give 1 or more")
        check(self.subtle_seconds > 0, f"subtle_seconds is {self.subtle_seconds:g}: give seconds above 0")
        check(self.coarse_seconds > self.subtle_seconds,
              f"coarse_seconds {self.coarse_seconds:g} must be above subtle_seconds {self.subtle_seconds:g}")


@dataclass(kw_only=True)
class WatchConfig:
    """What is measured after each round, and by what the best one is kept. It does not change what is learned."""

    clips: int = 64
    """Held-out clips, the last of their split, so that none is among those that `evaluation` measures."""
    keep: Literal["reward", "onset_f1", "flow_loss", "last"] = "reward"
    """Measure of the best round; `last` keeps the last one whatever was measured."""
    max_flow_rise: float = 0.05
    """Largest relative rise of the held-out flow loss above the start's; a round beyond it is not kept."""
    max_onset_sigmas: float = 2.0
    """Largest fall of onset F1 below the start's, standard errors of the paired difference; a round beyond it is not kept."""

    def __post_init__(self):
        check(self.clips >= 2, f"clips is {self.clips}: give 2 or more, for a standard error")
        check(self.max_flow_rise >= 0, f"max_flow_rise is {self.max_flow_rise:g}: give 0 or more")
        check(self.max_onset_sigmas >= 0, f"max_onset_sigmas is {self.max_onset_sigmas:g}: give 0 or more")


def _appendix_c() -> TrainConfig:
    """Training of a round as in MultiSoundGen, appendix C; the last weights count, as an average over so few steps would be the start."""
    optimiser = OptimiserConfig(lr=5e-6, weight_decay=1e-4, warmup_steps=100, schedule="cosine", gradient_clipping=1.0)
    return TrainConfig(steps=1000, accumulation=2, ema_decay=0.0, optimiser=optimiser)


@dataclass(kw_only=True)
class PreferenceConfig:
    """Stage 4: AVP-RPO rounds (MultiSoundGen, equations 3-5 and appendix C)."""

    rounds: int = 1
    """Rounds of generate, score, pair, train; each starts from the last. 0 leaves the stage out."""
    candidates: int = 5
    """Sounds generated for each training video (N_a)."""
    videos: int = 0
    """Training videos per round; 0 takes all."""
    batch_videos: int = 16
    """Videos whose candidates are generated at once: a matter of memory, though another number rounds otherwise in the last bit."""
    score: Literal["bottom_quartile", "mean", "min"] = "bottom_quartile"
    """How the cosines of a clip's segments become its reward (equation 3)."""
    reward: str = ""
    """Export folder of the encoder that scores; empty: that of this run's contrastive stage."""
    winner: Literal["truth", "best_of_n"] = "truth"
    """The preferred sound: the video's own, or the candidate with the highest reward."""
    losers: Literal["candidates", "distorted", "mixed"] = "candidates"
    """The other one: the candidate with the lowest reward, the true sound distorted in time, or either."""
    distorted_share: float = 0.5
    """Share of pairs whose loser is a distorted truth, where `losers` is mixed."""
    distortion: DistortionConfig = field(default_factory=DistortionConfig)
    """How the true sound is distorted, where `losers` is distorted or mixed."""
    objective: Literal["avp_rpo", "dpo", "flow_win"] = "avp_rpo"
    """Equation 5, or one of its terms alone without N(.): the first, equation 4; the second, the winner's flow loss, which learns nothing
    from preferences and so is the control of all that do."""
    tuning: Literal["top", "full"] = "top"
    """What trains: the last single-modal block and the layers after it, or everything; then a second, frozen model is the reference."""
    beta: float = 1000.0
    """Beta of equation 4, how soon a pair is decided: a few 1 / beta of margin in flow loss and it is let go. Only where `normalise` is not
    balanced, or the objective is dpo, it is the weight of the preference too. Code that writes -0.5 beta needs twice this value."""
    normalise: Literal["balanced", "running_max", "detached", "none"] = "balanced"
    """N(.) of equation 5: both terms in units of the winner's flow loss, L_DPO / beta and L_FM-win over the running maximum of L_FM-win;
    each over its own running maximum; each over its own value, which never lets a pair go; or as they are."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """What is measured after each round."""
    train: TrainConfig = field(default_factory=_appendix_c)
    """Training of each round; appendix C's where a recipe has no such section. What a section leaves out is as in any other stage."""

    def __post_init__(self):
        check(self.rounds >= 0, f"rounds is {self.rounds}: give 0 or more")
        check(self.videos >= 0, f"videos is {self.videos}: give 0 for all, or how many")
        check(self.batch_videos >= 1, f"batch_videos is {self.batch_videos}: give 1 or more")
        least = 2 if self.winner == "best_of_n" else 1
        check(self.candidates >= least, f"candidates is {self.candidates}: give {least} or more where winner is {self.winner}")
        check(0 < self.distorted_share < 1,
              f"distorted_share is {self.distorted_share:g}: give a share between 0 and 1, or losers=candidates, losers=distorted")
        check(self.needs_candidates or self.winner == "truth", "winner is best_of_n, but with losers=distorted nothing is generated that "
              "could win: give winner=truth, or losers=mixed")

    @property
    def needs_candidates(self) -> bool:
        """Whether any sound is generated."""
        return self.losers != "distorted"

    @property
    def needs_distorted(self) -> bool:
        """Whether the true sound is distorted."""
        return self.losers != "candidates"
