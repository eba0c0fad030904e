"""BigVGAN (Lee et al. 2023, arXiv:2206.04658): log-mels to waveforms by a trained network, that of the package bigvgan."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoints import fitted, read_checkpoint

__all__ = ["PRESETS", "BigVGAN", "BigVGANConfig", "load_bigvgan"]


@dataclass(frozen=True, kw_only=True)
class BigVGANConfig:
    """One published network: its log-mels, its sizes, and how its waveform ends."""

    name: str
    """Which vocoder it is, for reports."""
    mel: str
    """Name of its log-mel front end in data_prep.audio: logarithm, bands and hop must be those it was trained on."""
    bands: int
    """Mel bands."""
    rates: tuple[int, ...]
    """Upsampling per stage; their product is the hop."""
    kernels: tuple[int, ...]
    """Kernel of each stage's transposed convolution."""
    channels: int = 1536
    """Channels before the first stage; each stage halves them."""
    block_kernels: tuple[int, ...] = (3, 7, 11)
    """Kernels of the residual blocks side by side in a stage."""
    dilations: tuple[int, int, int] = (1, 3, 5)
    """Dilations within a residual block."""
    tanh: bool = True
    """Bound the waveform by tanh, with a bias before it (v1); otherwise it is clipped, without bias (v2)."""

    def __post_init__(self):
        if len(self.rates) != len(self.kernels):
            raise ValueError(f"BigVGANConfig.kernels is {self.kernels}: give one per stage of rates {self.rates}")
        if any(kernel < rate or (kernel - rate) % 2 for rate, kernel in zip(self.rates, self.kernels, strict=True)):
            raise ValueError(f"BigVGANConfig.kernels is {self.kernels}: give rates {self.rates} plus an even number each")
        if self.channels % 2 ** len(self.rates):
            raise ValueError(f"BigVGANConfig.channels is {self.channels}: stages halve it, choose a multiple of {2 ** len(self.rates)}")

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.rates)


PRESETS: dict[str, BigVGANConfig] = {
    # MMAudio's best_netG.pt, by Make-An-Audio 2: the layout of BigVGAN v1, on log10 mels.
    "16k": BigVGANConfig(name="bigvgan_v1_16k", mel="mmaudio_16k", bands=80, rates=(4, 4, 2, 2, 2, 2), kernels=(8, 8, 4, 4, 4, 4)),
    # nvidia/bigvgan_v2_44khz_128band_512x, on mels in natural logarithm.
    "44k": BigVGANConfig(
        name="bigvgan_v2_44k", mel="mmaudio_44k", bands=128, rates=(8, 4, 2, 2, 2, 2), kernels=(16, 8, 4, 4, 4, 4), tanh=False
    ),
}
"""By the name of the autoencoder's preset that they follow."""


class BigVGAN(nn.Module):
    """A Vocoder: deterministic, and one waveform does not depend on the others of its batch."""

    def __init__(self, config: BigVGANConfig):
        super().__init__()
        self.config, self.name = config, config.name
        self.network = _network(config)

    @torch.no_grad()
    def vocode(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, F, T) of the front end `config.mel` -> waveform (B, T * hop) in [-1, 1], float32."""
        if log_mel.dim() != 3 or log_mel.shape[1] != self.config.bands:
            raise ValueError(f"{self.name} takes log-mels (B, {self.config.bands}, T) of {self.config.mel}, not {tuple(log_mel.shape)}")
        return self.network(log_mel.to(self.network.conv_pre.bias.dtype)).squeeze(1).float()

    def remove_weight_norm(self) -> None:
        """Multiply the weights' sizes into their directions: once, instead of in every pass."""
        for module in self.network.modules():
            if hasattr(module, "weight_g"):
                nn.utils.remove_weight_norm(module)


def load_bigvgan(path: str | Path, config: str | BigVGANConfig) -> BigVGAN:
    """Vocoder from a local checkpoint: best_netG.pt is preset "16k", bigvgan_generator.pt of the 44 kHz, 128-band v2 is "44k"."""
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"no BigVGAN preset {config!r}: choose one of {', '.join(PRESETS)}")
        config = PRESETS[config]
    with torch.device("meta"):
        vocoder = BigVGAN(config)
    state = read_checkpoint(path)
    state = state.get("generator", state)
    if not any(name.endswith(".weight_g") for name in state):
        # Some copies were saved after that.
        vocoder.remove_weight_norm()
    fitted(vocoder.network, state, str(path), f"choose the preset it was made with, of {', '.join(PRESETS)}", assign=True)
    vocoder.remove_weight_norm()
    return vocoder.eval().requires_grad_(False)


def _network(config: BigVGANConfig) -> nn.Module:
    """The package's generator; its CUDA kernels, compiled on first use, stay off."""
    try:
        from bigvgan.bigvgan import BigVGAN as Generator
        from bigvgan.env import AttrDict
    except ImportError as error:
        raise ImportError(f"BigVGAN needs the package bigvgan: pip install 'foleyscale[bigvgan]' ({error})") from error
    settings = AttrDict(
        num_mels=config.bands,
        upsample_rates=config.rates,
        upsample_kernel_sizes=config.kernels,
        upsample_initial_channel=config.channels,
        resblock="1",
        resblock_kernel_sizes=config.block_kernels,
        resblock_dilation_sizes=[config.dilations] * len(config.block_kernels),
        activation="snakebeta",
        snake_logscale=True,
        use_tanh_at_final=config.tanh,
        use_bias_at_final=config.tanh,
    )
    with warnings.catch_warnings():
        # The published names are those of the older weight norm.
        warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
        return Generator(settings, use_cuda_kernel=False)
