"""Sizes of the MM-DiT and of the public MMAudio variants (arXiv:2412.15322), and how many condition tokens a duration has."""

from __future__ import annotations

from dataclasses import dataclass

from models.layers import swiglu_width

_ROUNDING = 1e-6
"""Of a token: a duration that is a whole number of them may come out slightly below."""


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Sizes of an MM-DiT; the defaults are those common to all MMAudio variants."""

    latent_dim: int
    """Channels of an audio latent."""
    hidden: int
    """Width D of every token."""
    heads: int
    """Attention heads; `hidden / heads` is even (MMAudio: 64)."""
    depth: int = 12
    """Transformer blocks, joint and fused together."""
    fused_depth: int = 8
    """Blocks over the latents alone, after the joint ones."""
    clip_dim: int = 1024
    """Channels of a frame feature (semantic condition)."""
    sync_dim: int = 768
    """Channels of a synchrony feature."""
    text_dim: int = 1024
    """Channels of a text token."""
    latent_len: int = 250
    """Latents of a clip of the training length."""
    clip_len: int = 64
    """Frame features of a clip of the training length."""
    sync_len: int = 192
    """Synchrony tokens of a clip of the training length, in whole groups."""
    sync_group: int = 8
    """Synchrony tokens per encoder window; each has its own position embedding (Synchformer: 8)."""
    sync_margin: int = 1
    """Groups by which the synchrony tokens fall short of the clip: the encoder's windows overlap (Synchformer: 1)."""
    text_len: int = 77
    """Text tokens, padding included."""
    mlp_ratio: float = 4.0
    """Width of an equivalent plain MLP over D; a SwiGLU takes two thirds of it."""
    mlp_multiple: int = 256
    """SwiGLU widths are rounded up to a multiple of this."""
    v2: bool = False
    """Second MMAudio release: SiLU in every input projection, time embedded over D frequencies up to t x 10,000."""
    final_layer_extended_condition: bool = False
    """Condition the final layer on each latent's synchrony too. MMAudio, and so its checkpoints, use the global condition only."""

    def __post_init__(self):
        for name in (
            *("latent_dim", "hidden", "heads", "fused_depth", "clip_dim", "sync_dim", "text_dim"),
            *("latent_len", "clip_len", "sync_len", "sync_group", "text_len", "mlp_ratio", "mlp_multiple"),
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"MMDiTConfig.{name} is {getattr(self, name)}: give a positive value")
        if self.sync_margin < 0:
            raise ValueError(f"MMDiTConfig.sync_margin is {self.sync_margin}: give 0 or more groups")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"MMDiTConfig.hidden is {self.hidden}: give a multiple of 2 x heads = {2 * self.heads}")
        if self.depth <= self.fused_depth:
            raise ValueError(f"MMDiTConfig.depth is {self.depth}: give more than fused_depth = {self.fused_depth}, for a joint block")
        if self.sync_len % self.sync_group:
            raise ValueError(f"MMDiTConfig.sync_len is {self.sync_len}: give a multiple of sync_group = {self.sync_group}")

    @property
    def mlp_hidden(self) -> int:
        """Width of every SwiGLU."""
        return swiglu_width(self.hidden, self.mlp_ratio, self.mlp_multiple)

    def condition_lengths(self, latent_len: int) -> tuple[int, int]:
        """Frame features and synchrony tokens of a clip of `latent_len` latents (MMAudio's presets: its own for whole seconds to 20 s)."""
        clip = round(self.clip_len * latent_len / self.latent_len)
        margin = self.sync_margin * self.sync_group
        groups = (self.sync_len + margin) * latent_len // (self.latent_len * self.sync_group) - self.sync_margin
        return max(1, clip), max(1, groups) * self.sync_group

    def lengths_at(self, share: float) -> tuple[int, int]:
        """The same of a clip that lasts `share` times as long as one of training, whole tokens and groups only: MMAudio's for any duration.

        Latents are rounded up, so that from their number alone the duration is not known well enough.
        """
        groups = int((self.sync_len // self.sync_group + self.sync_margin) * share + _ROUNDING) - self.sync_margin
        return max(1, int(self.clip_len * share + _ROUNDING)), max(1, groups) * self.sync_group


_SMALL = {"hidden": 448, "heads": 7}
_MEDIUM = {"hidden": 896, "heads": 14}
_44K = {"latent_dim": 40, "latent_len": 345}

PRESETS: dict[str, MMDiTConfig] = {
    "small_16k": MMDiTConfig(latent_dim=20, **_SMALL),
    "small_44k": MMDiTConfig(**_44K, **_SMALL),
    "medium_44k": MMDiTConfig(**_44K, **_MEDIUM),
    "large_44k": MMDiTConfig(**_44K, **_MEDIUM, depth=21, fused_depth=14),
    "large_44k_v2": MMDiTConfig(**_44K, **_MEDIUM, depth=21, fused_depth=14, v2=True),
    # For a laptop: 3.84 s at 16 kHz, conditioned by a tiny SF-CAVP (8 slow and 32 fast tokens per 1.28 s), no text encoder.
    "tiny": MMDiTConfig(
        **{"latent_dim": 16, "hidden": 64, "heads": 2, "depth": 4, "fused_depth": 2, "clip_dim": 512, "sync_dim": 128, "text_dim": 16},
        **{"latent_len": 120, "clip_len": 24, "sync_len": 96, "sync_group": 32, "sync_margin": 0, "text_len": 1},
        **{"mlp_ratio": 2.0, "mlp_multiple": 32},
    ),
}
"""The five public MMAudio variants, and `tiny` (its condition widths and lengths follow the recipe's encoder)."""
