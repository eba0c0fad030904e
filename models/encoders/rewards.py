"""Encoders as judges: what a reward of AVP-RPO has to offer, and loading one that another run exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Protocol

from torch import Tensor

from models.encoders.features import AudioFeatures, VideoFeatures
from models.encoders.sf_cavp import SFCAVP, SFCAVPConfig
from models.pretrained import CONFIG, load_weights

__all__ = ["Reward", "RewardConfig", "load_reward"]

JUDGES = ((SFCAVP, SFCAVPConfig),)
"""Encoders that can judge, each with its config."""


class RewardConfig(Protocol):
    """What an encoder says of what it takes."""

    mel: str
    """Name of its log-mel front end in data_prep.audio."""
    fps: float
    """Frames per second of its video."""


class Reward(Protocol):
    """An encoder that puts the segments of a video and of its sound into one space; any number of segments, of any width."""

    config: RewardConfig

    def encode_video(self, frames: Tensor) -> VideoFeatures:
        """Frames (B, T, C, H, W), float in [0, 1] -> `segments` (B, S, D)."""
        ...

    def encode_audio(self, mel: Tensor) -> AudioFeatures:
        """Log-mel (B, F, T') of the same time -> `segments` (B, S, D)."""
        ...

    def similarity(self, video: Tensor, audio: Tensor) -> Tensor:
        """How well each pair of segments (B, S, D), (B, S, D) fits, (B, S)."""
        ...


def load_reward(folder: str | Path) -> Reward:
    """The encoder that `folder`, the export of a contrastive stage, holds; ValueError or FileNotFoundError where it holds none."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: name the export of a contrastive stage, such as runs/NAME/contrastive/export")
    keys = json.loads(path.read_text()).keys()
    for module, config in JUDGES:
        if keys <= {field.name for field in dataclasses.fields(config)}:
            return load_weights(module, config, folder)
    raise ValueError(f"{path} describes no encoder that can judge sounds: name the export of a contrastive stage")
