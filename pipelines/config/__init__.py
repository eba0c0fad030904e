"""The typed recipe, a module per section."""

from pipelines.config.autoencoder import AutoencoderConfig
from pipelines.config.contrastive import ContrastiveConfig
from pipelines.config.data import ClipConfig, PrepareSection, StreamConfig
from pipelines.config.evaluation import BarsConfig, EvaluationConfig
from pipelines.config.fields import merge
from pipelines.config.generative import FeaturesConfig, GenerativeConfig
from pipelines.config.preference import PreferenceConfig
from pipelines.config.recipe import Recipe
from pipelines.config.training import OptimiserConfig, TrainConfig, ZeroConfig

__all__ = [
    "AutoencoderConfig", "BarsConfig", "ClipConfig", "ContrastiveConfig", "EvaluationConfig", "FeaturesConfig", "GenerativeConfig",
    "OptimiserConfig", "PreferenceConfig", "PrepareSection", "Recipe", "StreamConfig", "TrainConfig", "ZeroConfig", "merge",
]  # fmt: skip
