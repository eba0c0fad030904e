"""Weights of foreign checkpoints: read without running code, and fitted name by name."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

__all__ = ["first_names", "fitted", "read_checkpoint"]

M = TypeVar("M", bound=nn.Module)


def read_checkpoint(path: str | Path) -> Any:
    """Contents of a .safetensors, .pt, .pth or .bin file on the CPU; tensors and plain containers only, nothing that could run code."""
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, safetensors.SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is refused: it holds more than tensors, or no weights at all; save its state_dict ({reason})") from error


def fitted(
    module: M, state: Mapping[str, Tensor], source: str, remedy: str = "choose the preset it was made with", assign: bool = False
) -> M:
    """`module` with the tensors of `state`, which must fit exactly. `assign` takes them over instead of copying: for a module on "meta"."""
    wanted = module.state_dict()
    problems = {
        "missing": wanted.keys() - state.keys(),
        "not known": state.keys() - wanted.keys(),
        "of another shape": {name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape},
    }
    found = [f"{len(names)} {problem} ({first_names(names)})" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"{source} does not fit {type(module).__name__}: {', '.join(found)}; {remedy}")
    module.load_state_dict(state, assign=assign)
    return module


def first_names(names: Iterable[str], count: int = 3) -> str:
    """The first few of some names, in order, for a message."""
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
