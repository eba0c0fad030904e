"""Section `evaluation`: what is measured on held-out clips, and what must be reached."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.config.fields import check


@dataclass(kw_only=True)
class BarsConfig:
    """What `evaluate` demands; a bar that is not set is not checked."""

    retrieval_times_chance: float | None = None
    """Least R@1 in galleries of 64, as a multiple of chance."""
    right_segment_times_chance: float | None = None
    """Least share of segments that find their own among those of their clip, as a multiple of chance."""
    shift_preference: float | None = None
    """Least share of clips whose true sound scores above the same sound 0.3 s out of time."""
    autoencoder_ratio: float | None = None
    """Largest L1 of the autoencoder over that of the per-band mean."""
    flow_gap: float | None = None
    """How far the flow loss must be below that with shuffled videos, as a share of the latter."""
    flow_gap_sigmas: float | None = None
    """Least significance of that rise, standard errors."""
    reward_gap_sigmas: float | None = None
    """Least significance by which generated sound prefers its own video."""
    onset_gap: float | None = None
    """Least onset F1 of generated sound above that against another clip's true sound."""
    onset_gap_sigmas: float | None = None
    """Least significance of that difference, standard errors."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Figures on held-out clips."""

    clips: int = 192
    """Held-out clips that are measured."""
    galleries: int = 3
    """Retrieval galleries of 64."""
    examples: int = 4
    """Clips shown in the report."""
    controls: bool = False
    """Measure what the figures are to be held against as well: an untrained encoder, a linear probe, a ceiling and floors."""
    probe_clips: int = 512
    """Training clips that the linear probe is fitted on."""
    bars: BarsConfig = field(default_factory=BarsConfig)
    """What must be reached."""

    def __post_init__(self):
        check(self.probe_clips >= 8, f"evaluation.probe_clips is {self.probe_clips}: give at least 8, or evaluation.controls=false")
