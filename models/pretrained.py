"""Public checkpoints in, our own weights out and in."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from models.checkpoints import first_names, fitted
from models.codecs import autoencoder
from models.codecs.autoencoder import MelVAE, MelVAEConfig
from models.codecs.bigvgan import load_bigvgan as load_bigvgan
from models.encoders import slowfast, synchformer
from models.encoders.clip import load_clip as load_clip
from models.encoders.slowfast import SlowFast
from models.encoders.synchformer import Synchformer
from models.generators import mmdit
from models.generators.mmdit import MMDiT, MMDiTConfig

__all__ = [
    *("load_bigvgan", "load_clip", "load_mmaudio", "load_mmaudio_vae", "load_slowfast_r50", "load_synchformer"),
    *("MMAUDIO_VAES", "MMAUDIO_VARIANTS", "export_mmaudio", "export_mmaudio_vae", "mmaudio_vae_preset", "mmaudio_variant"),
    *("load_weights", "save_weights"),
]

M = TypeVar("M", bound=nn.Module)

WEIGHTS, CONFIG = "weights.safetensors", "config.json"

MMAUDIO_VARIANTS = ("small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2")
"""Presets of MMDiT whose weights are published."""

MMAUDIO_VAES = ("16k", "44k")
"""Presets of MelVAE whose weights are published: v1-16.pth and v1-44.pth."""

_MMAUDIO_CONSTANTS = ("t_embed.freqs", "latent_rot", "clip_rot")
"""Tables that old MMAudio checkpoints hold and the model computes."""

_SYNCHFORMER_VISUAL = "vfeat_extractor."
"""Prefix of the visual encoder in Synchformer's checkpoints."""


def load_mmaudio(state_dict: Mapping[str, Tensor], preset: str | MMDiTConfig) -> MMDiT:
    """Generator of a public MMAudio checkpoint (mmaudio_<preset>.pth); a config in the preset's place may have other lengths than it."""
    state = {name: value for name, value in state_dict.items() if name not in _MMAUDIO_CONSTANTS}
    own = isinstance(preset, MMDiTConfig)
    config, name = (preset, "this config") if own else (_preset(mmdit.PRESETS, preset), preset)
    return fitted(MMDiT(config), state, f"MMAudio checkpoint for {name}")


def export_mmaudio(model: MMDiT) -> dict[str, Tensor]:
    """State dict as MMAudio's own code loads it, for `torch.save` to mmaudio_<variant>.pth; ValueError where it is none of its variants."""
    mmaudio_variant(model)
    return _own_copy(model)


def mmaudio_variant(model: MMDiT) -> str:
    """Which of MMAudio's published variants has the weights of `model`; how long its sequences are does not matter."""
    shapes = _shapes(model)
    for variant in MMAUDIO_VARIANTS if not model.config.final_layer_extended_condition else ():
        with torch.device("meta"):
            if _shapes(MMDiT(mmdit.PRESETS[variant])) == shapes:
                return variant
    raise ValueError(f"this generator has the sizes of none of MMAudio's variants ({', '.join(MMAUDIO_VARIANTS)}): its code cannot load it")


def load_mmaudio_vae(state_dict: Mapping[str, Tensor], preset: str) -> MelVAE:
    """Autoencoder published with MMAudio: v1-16.pth is "16k", v1-44.pth is "44k"."""
    return fitted(MelVAE(_preset(autoencoder.PRESETS, preset)), state_dict, f"MMAudio autoencoder checkpoint for {preset}")


def export_mmaudio_vae(vae: MelVAE) -> dict[str, Tensor]:
    """State dict as MMAudio's own code loads it, for `torch.save` to v1-16.pth or v1-44.pth; ValueError where it is neither.

    Kernels go out as they are stored: MMAudio brings them to unit norm when it loads them, as `MPConv1d` does at every use.
    """
    mmaudio_vae_preset(vae.config)
    return _own_copy(vae)


def mmaudio_vae_preset(config: MelVAEConfig) -> str:
    """Which of MMAudio's published autoencoders computes what one of `config` does; how it was trained does not matter."""
    trained = {name: getattr(config, name) for name in autoencoder.TRAINING_FIELDS}
    for preset in MMAUDIO_VAES:
        if dataclasses.replace(autoencoder.PRESETS[preset], **trained) == config:
            return preset
    raise ValueError(f"this autoencoder has the sizes of none of MMAudio's ({', '.join(MMAUDIO_VAES)}): its code cannot load it")


def load_slowfast_r50(state_dict: Mapping[str, Tensor]) -> SlowFast:
    """Video tower of PyTorchVideo's slowfast_r50 (SLOWFAST_8x8_R50.pyth), without its classifier."""
    state_dict = state_dict.get("model_state", state_dict)
    state = {_slowfast_name(name): value for name, value in state_dict.items() if not name.startswith("blocks.6.")}
    return fitted(SlowFast(slowfast.PRESETS["video_r50_kinetics"]), state, "PyTorchVideo slowfast_r50 checkpoint")


def load_synchformer(state_dict: Mapping[str, Tensor]) -> Synchformer:
    """Visual encoder of a public Synchformer checkpoint, the whole model or MMAudio's synchformer_state_dict.pth.

    Normalised segments (B, S, 16, 3, 224, 224) -> (B, S, 8, 768). Its hearing and its synchroniser are left out.
    """
    state_dict, prefix = state_dict.get("model", state_dict), _SYNCHFORMER_VISUAL
    visual = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if not visual:
        raise ValueError(f"no Synchformer checkpoint: none of its {len(state_dict)} names starts with {prefix} ({first_names(state_dict)})")
    # The picture model that it was initialised from left its 2-d patch embedding behind; nothing reads it.
    state = {name: value for name, value in visual.items() if not name.startswith("patch_embed.")}
    remedy = "take the file published with Synchformer or with MMAudio"
    return fitted(Synchformer(synchformer.PRESETS["divided_224_16x4"]), state, "Synchformer checkpoint", remedy)


def save_weights(module: nn.Module, config: Any, folder: str | Path) -> None:
    """Write `folder`/weights.safetensors and, last, `folder`/config.json, each complete before it appears under its name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    _complete(folder / WEIGHTS, lambda path: safetensors.torch.save_file(state, path))
    _complete(folder / CONFIG, lambda path: path.write_text(text))


def load_weights(make: Callable[[Any], M], config_cls: type, folder: str | Path) -> M:
    """The module that `save_weights` wrote: `make(config)`, filled, on the CPU."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing: name a folder written by save_weights, such as a stage's export")
    config = _config(config_cls, json.loads((folder / CONFIG).read_text()), str(folder / CONFIG))
    return fitted(make(config), safetensors.torch.load_file(folder / WEIGHTS), str(folder / WEIGHTS))


def _own_copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _preset(presets: Mapping[str, Any], name: str) -> Any:
    if name not in presets:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(presets)}")
    return presets[name]


def _config(cls: type, values: Mapping[str, Any], source: str) -> Any:
    """Dataclass from what JSON left of it: nested dataclasses became objects and tuples became lists."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = values.keys() - fields.keys()
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if unknown or required - values.keys():
        names = first_names(unknown or required - values.keys())
        raise ValueError(f"{source} is no {cls.__name__}: {'unknown' if unknown else 'missing'} field {names}; load it as it was saved")
    return cls(**{name: _restored(hints[name], value, source) for name, value in values.items()})


def _restored(hint: Any, value: Any, source: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _config(hint, value, source)
    return tuple(value) if isinstance(value, list) and typing.get_origin(hint) is tuple else value


def _complete(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


_SLOWFAST_PARTS = (
    (r"branch1_(conv|norm)", r"shortcut.\1"),
    (r"branch2\.(conv|norm)_([abc])", r"\2.\1"),
)


def _slowfast_name(name: str) -> str:
    """Our name of a weight of PyTorchVideo's slowfast_r50; a name it does not have is returned as it is."""
    for theirs, ours in _SLOWFAST_PARTS:
        name = re.sub(theirs, ours, name)
    if match := re.fullmatch(r"blocks\.(\d)\.multipathway_fusion\.(conv|norm)(?:_fast_to_slow)?\.(.+)", name):
        return f"laterals.{match[1]}.0.{match[2]}.{match[3]}"
    if match := re.fullmatch(r"blocks\.(\d)\.multipathway_blocks\.([01])\.(?:res_blocks\.)?(.+)", name):
        block, path = int(match[1]), ("slow", "fast")[int(match[2])]
        return f"{path}_stages.{block - 1}.{match[3]}" if block else f"{path}_stem.0.{match[3]}"
    return name
