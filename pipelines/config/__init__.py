"""The typed recipe, a module per section."""

from pipelines.config.autoencoder import AutoencoderConfig
from pipelines.config.conditioning import ConditioningConfig
from pipelines.config.contrastive import ContrastiveConfig
from pipelines.config.data import ClipConfig, PrepareSection, StreamConfig
from pipelines.config.ema import EMAConfig
from pipelines.config.evaluation import BarsConfig, EvaluationConfig
from pipelines.config.fields import merge
from pipelines.config.generative import FeaturesConfig, GenerativeConfig
from pipelines.config.preference import PreferenceConfig
from pipelines.config.recipe import Recipe
from pipelines.config.training import GuardConfig, OptimiserConfig, TrainConfig, ZeroConfig
from pipelines.config.vocoder import VocoderConfig

__all__ = [
    "AutoencoderConfig", "BarsConfig", "ClipConfig", "ConditioningConfig", "ContrastiveConfig", "EMAConfig", "EvaluationConfig",
    "FeaturesConfig", "GenerativeConfig", "GuardConfig", "OptimiserConfig", "PreferenceConfig", "PrepareSection", "Recipe", "StreamConfig",
    "TrainConfig", "VocoderConfig", "ZeroConfig", "merge",
]  # fmt: skip
