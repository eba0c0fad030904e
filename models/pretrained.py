"""Public checkpoints in, our own weights out and in."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from models.codecs import autoencoder
from models.codecs.autoencoder import MelVAE
from models.encoders import slowfast
from models.encoders.slowfast import SlowFast
from models.generators import mmdit
from models.generators.mmdit import MMDiT

__all__ = ["load_mmaudio", "load_mmaudio_vae", "load_slowfast_r50", "load_torch_file", "load_weights", "save_weights"]

M = TypeVar("M", bound=nn.Module)

WEIGHTS, CONFIG = "weights.safetensors", "config.json"

_MMAUDIO_CONSTANTS = ("t_embed.freqs", "latent_rot", "clip_rot")
"""Tables that old MMAudio checkpoints hold and the model computes."""


def load_mmaudio(state_dict: Mapping[str, Tensor], preset: str) -> MMDiT:
    """Generator of a public MMAudio checkpoint (mmaudio_<preset>.pth)."""
    state = {name: value for name, value in state_dict.items() if name not in _MMAUDIO_CONSTANTS}
    return _filled(MMDiT(_preset(mmdit.PRESETS, preset)), state, f"MMAudio checkpoint for {preset}")


def load_mmaudio_vae(state_dict: Mapping[str, Tensor], preset: str) -> MelVAE:
    """Autoencoder published with MMAudio: v1-16.pth is "16k", v1-44.pth is "44k"."""
    return _filled(MelVAE(_preset(autoencoder.PRESETS, preset)), state_dict, f"MMAudio autoencoder checkpoint for {preset}")


def load_slowfast_r50(state_dict: Mapping[str, Tensor]) -> SlowFast:
    """Video tower of PyTorchVideo's slowfast_r50 (SLOWFAST_8x8_R50.pyth), without its classifier."""
    state_dict = state_dict.get("model_state", state_dict)
    state = {_slowfast_name(name): value for name, value in state_dict.items() if not name.startswith("blocks.6.")}
    return _filled(SlowFast(slowfast.PRESETS["video_r50_kinetics"]), state, "PyTorchVideo slowfast_r50 checkpoint")


def load_torch_file(path: str | Path) -> Any:
    """Contents of a .pt or .pth file on the CPU; tensors and plain containers only, nothing that could run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is refused: it holds more than tensors, or is no torch file; save its state_dict ({reason})") from error


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
    return _filled(make(config), safetensors.torch.load_file(folder / WEIGHTS), str(folder / WEIGHTS))


def _filled(module: M, state: Mapping[str, Tensor], source: str) -> M:
    """`module` with the weights of `state`, which must fit exactly."""
    wanted = module.state_dict()
    problems = {
        "missing": wanted.keys() - state.keys(),
        "not known": state.keys() - wanted.keys(),
        "of another shape": {name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape},
    }
    found = [f"{len(names)} {problem} ({_first(names)})" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {', '.join(found)}; choose the preset it was made with")
    module.load_state_dict(state)
    return module


def _first(names: Iterable[str], count: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


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
        names = _first(unknown or required - values.keys())
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
