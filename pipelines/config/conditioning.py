"""Section `conditioning`: which encoders tell the generator about a clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from models.encoders.clip import CLIPConfig
from pipelines.config.fields import check


@dataclass(kw_only=True)
class ConditioningConfig:
    """An encoder for each of the generator's conditions. MMAudio's are CLIP for pictures and captions, and Synchformer."""

    clip: Literal["own", "clip", "none"] = "own"
    """Semantic tokens: the slow path of the contrastive stage's encoder, CLIP's pictures, or none."""
    sync: Literal["own", "synchformer", "none"] = "own"
    """Tokens that carry the timing: the fast path of the contrastive stage's encoder, Synchformer's, or none."""
    text: Literal["clip", "none"] = "none"
    """Tokens of the caption, or of the labels where a clip has no caption: CLIP's, or none."""
    clip_weights: str = ""
    """Local checkpoint of open_clip, where CLIP is used."""
    clip_model: CLIPConfig = field(default_factory=CLIPConfig)
    """Which CLIP that is; the default is MMAudio's."""
    synchformer_weights: str = ""
    """Local checkpoint published with Synchformer or with MMAudio, where Synchformer is used."""
    precompute: bool = True
    """Write latents and conditions to feature shards before training; false makes them from the clip shards at every step."""

    def __post_init__(self):
        check(self.clip != "none" or self.sync != "none", "clip and sync are both none: a generator of sound for video needs one of them")
        check(bool(self.clip_weights) or not self.uses_clip, "clip_weights: name the local checkpoint of CLIP")
        check(bool(self.synchformer_weights) or self.sync != "synchformer", "synchformer_weights: name the local checkpoint of Synchformer")

    @property
    def slots(self) -> tuple[str, ...]:
        """Conditions that are filled, of "clip", "sync" and "text"."""
        return tuple(slot for slot in ("clip", "sync", "text") if getattr(self, slot) != "none")

    @property
    def uses_own(self) -> bool:
        """Whether the contrastive stage's encoder fills any."""
        return "own" in (self.clip, self.sync)

    @property
    def uses_clip(self) -> bool:
        """Whether CLIP fills any."""
        return "clip" in (self.clip, self.text)
