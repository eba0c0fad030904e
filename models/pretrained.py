"""Temporary: saving and loading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file


def save_weights(module, config, folder):
    """Write."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))


def load_weights(cls, config_cls, folder):
    """Read."""
    folder = Path(folder)
    config = TypeAdapter(config_cls).validate_python(json.loads((folder / "config.json").read_text()))
    module = cls(config)
    module.load_state_dict(load_file(folder / "weights.safetensors"))
    return module


def load_mmaudio_vae(state, preset):
    """Later."""


def load_torch_file(path):
    """Later."""
