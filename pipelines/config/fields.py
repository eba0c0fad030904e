"""What the sections of a recipe share: checks, presets, and laying one tree of values over another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pydantic


def check(condition: bool, message: str) -> None:
    """ValueError with `message` where `condition` does not hold."""
    if not condition:
        raise ValueError(message)


def text(value: Any) -> Any:
    """Numbers on a command line are text; a recipe need not quote them."""
    return str(value) if isinstance(value, int | float) else value


def from_presets(presets: Mapping[str, Any]) -> pydantic.BeforeValidator:
    """Let a recipe write a model as `tiny`, or as `{preset: tiny, hidden: 96}`, or in full."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, Mapping) or "preset" not in value:
            return value
        name = value["preset"]
        check(name in presets, f"no preset {name!r}; choose from {', '.join(presets)}")
        return merge(dataclasses.asdict(presets[name]), {k: v for k, v in value.items() if k != "preset"})

    return pydantic.BeforeValidator(expand)


def merge(base: Mapping, changes: Mapping) -> dict:
    """`base` with `changes` laid over it, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), str):
            # `model: tiny` with `model.hidden=96` laid over it: the preset with a change.
            merged[key] = {"preset": merged[key]}
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
