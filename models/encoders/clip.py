"""CLIP (Radford et al. 2021, arXiv:2103.00020) as MMAudio looks at pictures and reads captions, by the package open_clip_torch.

MMAudio was trained with the weights of DFN5B (Fang et al. 2023, arXiv:2309.17425), published as apple/DFN5B-CLIP-ViT-H-14-384.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints import fitted, read_checkpoint

__all__ = ["CLIP", "CLIPConfig", "load_clip"]


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Which CLIP, and how pictures reach it; the defaults are MMAudio's."""

    architecture: str = "ViT-H-14-378-quickgelu"
    """Name of the two transformers in open_clip."""
    picture_size: int = 384
    """Side in pixels that pictures are squashed to. Of 384 the patches of 14 cover 378: the last 6 rows and columns go unseen."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the pixels in [0, 1], per channel (OpenAI's)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Their standard deviation."""
    frames_at_once: int = 64
    """Pictures encoded in one pass. Bounds memory."""

    def __post_init__(self):
        if self.picture_size < 1 or self.frames_at_once < 1:
            raise ValueError(f"CLIPConfig.picture_size, frames_at_once are {self.picture_size}, {self.frames_at_once}: give at least 1")
        if min(self.std) <= 0:
            raise ValueError(f"CLIPConfig.std is {self.std}: give values above 0")


class CLIP(nn.Module):
    """Pictures and captions in one space. Nothing is trained here; callers choose `torch.no_grad`."""

    def __init__(self, config: CLIPConfig | None = None):
        super().__init__()
        self.config = config = config or CLIPConfig()
        open_clip = _open_clip()
        sizes = _sizes(open_clip, config)
        self.model = open_clip.model.CLIP(**sizes)
        self.tokenizer = open_clip.get_tokenizer(config.architecture)
        self.image_dim: int = sizes["embed_dim"]
        self.text_dim: int = self.model.ln_final.normalized_shape[0]
        self.text_len: int = self.model.context_length
        # No checkpoint holds the causal mask, so nothing would fill one on the meta device.
        mask = torch.full((self.text_len, self.text_len), float("-inf"), device="cpu").triu(1)
        self.model.register_buffer("attn_mask", mask, persistent=False)

    def encode_image(self, frames: Tensor) -> Tensor:
        """Frames (B, T, 3, H, W) in [0, 1] -> embeddings (B, T, image_dim), L2-normalised."""
        if frames.dim() != 5 or frames.shape[2] != 3:
            raise ValueError(f"CLIP takes frames (B, T, 3, H, W), not {tuple(frames.shape)}")
        chunks = frames.flatten(0, 1).split(self.config.frames_at_once)
        embeddings = torch.cat([self.model.encode_image(self._pixels(chunk), normalize=True) for chunk in chunks])
        return embeddings.unflatten(0, frames.shape[:2])

    def encode_text(self, text: Sequence[str]) -> Tensor:
        """B captions -> tokens (B, text_len, text_dim): last hidden states, each L2-normalised. Padding is not masked, as in MMAudio.

        A caption longer than text_len loses what is behind.
        """
        model = self.model
        if isinstance(text, str):
            raise ValueError(f"CLIP takes a list of captions, not one: [{text!r}]")
        dtype = model.transformer.get_cast_dtype()
        tokens = self.tokenizer(list(text)).to(model.positional_embedding.device)
        x = model.token_embedding(tokens).to(dtype) + model.positional_embedding.to(dtype)
        # open_clip goes on to pick the end token and project it; MMAudio conditions on every token, without the projection.
        return F.normalize(model.ln_final(model.transformer(x, attn_mask=model.attn_mask)), dim=-1)

    def _pixels(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, H, W) in [0, 1], squashed and normalised in float32, then in the weights' precision."""
        config, frames = self.config, frames.float()
        size = (config.picture_size, config.picture_size)
        if frames.shape[-2:] != size:
            # Cubic interpolation overshoots at edges.
            frames = F.interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (frames.new_tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
        return ((frames - mean) / std).to(self.model.visual.conv1.weight.dtype)


def load_clip(path: str | Path, config: CLIPConfig | None = None) -> CLIP:
    """CLIP from a local checkpoint of open_clip, such as open_clip_pytorch_model.bin; in evaluation mode, on the CPU."""
    with torch.device("meta"):
        clip = CLIP(config)
    state = read_checkpoint(path)
    remedy = f"take a checkpoint of open_clip's {clip.config.architecture}"
    fitted(clip.model, state.get("state_dict", state), str(path), remedy, assign=True)
    return clip.eval().requires_grad_(False)


def _sizes(open_clip: ModuleType, config: CLIPConfig) -> dict:
    """Arguments of open_clip's model, or one line on why it will not do."""
    name = config.architecture
    sizes = open_clip.get_model_config(name)
    if sizes is None:
        raise ValueError(f"CLIPConfig.architecture is {name!r}: open_clip knows no such model; see open_clip.list_models()")
    side, patch = (sizes["vision_cfg"].get(key) for key in ("image_size", "patch_size"))
    if patch is None or sizes.keys() - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}:
        raise ValueError(f"CLIPConfig.architecture is {name!r}: choose one with a plain vision transformer, such as ViT-H-14-378-quickgelu")
    patches = side // patch
    if config.picture_size // patch != patches:
        raise ValueError(
            f"CLIPConfig.picture_size is {config.picture_size}: {name} sees {patches} patches of {patch} a side, "
            f"choose {patches * patch} to {(patches + 1) * patch - 1}"
        )
    return sizes


def _open_clip() -> ModuleType:
    """The package, imported when first needed: with what it pulls in it takes seconds."""
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise ImportError(f"CLIP needs the package open_clip_torch: pip install 'foleyscale[clip]' ({error})") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_torchvision_operators()
        return importlib.import_module("open_clip")


_declared: list[torch.library.Library] = []
"""Keeps the declarations, which end with their object."""


def _declare_torchvision_operators() -> None:
    """Let torchvision be imported without its compiled operators.

    A torchvision built for CUDA, the one on PyPI, cannot load them beside a CPU-only torch, and its import then stops at these two.
    CLIP calls none of the operators.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
