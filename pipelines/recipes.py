"""Recipe files: read, lay changes over, check, write back."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from data_prep.settings import PrepareConfig
from pipelines.config import Recipe, merge

_Settings = TypeVar("_Settings")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line naming the key and what to do."""


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one that ships with the package by name, and lay `key=value` overrides over it.

    Raises RecipeError with one line that names the file, the key and the remedy.
    """
    path = _find(source)
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    for override in overrides:
        tree = merge(tree, _parse_override(override))
    return parse_recipe(tree, str(path))


def parse_recipe(tree: Mapping, origin: str = "recipe") -> Recipe:
    """Check a nested mapping against the typed recipe."""
    try:
        return pydantic.TypeAdapter(Recipe).validate_python(dict(tree))
    except pydantic.ValidationError as error:
        raise RecipeError(f"{origin}: {_first_problem(error, Recipe())}") from None


def load_preparation(recipe: str | Path | None, overrides: Sequence[str] = ()) -> PrepareConfig:
    """The preparation that a recipe asks for, or the defaults, with `key=value` overrides such as format.short_side=128 laid over."""
    return change(PrepareConfig() if recipe is None else load_recipe(recipe).preparation, overrides)


def change(settings: _Settings, overrides: Sequence[str]) -> _Settings:
    """A settings dataclass with `key=value` overrides laid over, checked as a recipe is."""
    tree = to_tree(settings)
    for override in overrides:
        tree = merge(tree, _parse_override(override))
    # As a field of a class that forbids unknown keys: a plain dataclass by itself would pass them over.
    holder = dataclasses.make_dataclass("Holder", [("settings", type(settings))])
    holder.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    try:
        return pydantic.TypeAdapter(holder).validate_python({"settings": tree}).settings
    except pydantic.ValidationError as error:
        raise RecipeError(_first_problem(error, holder(settings)).removeprefix("settings.").removeprefix("settings: ")) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(to_tree(recipe), sort_keys=False)


def to_tree(config: Any) -> Any:
    """Dataclasses as nested plain values."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("launch.recipes").iterdir() if p.name.endswith(".yaml"))


def _find(source: str | Path) -> Path:
    if Path(source).is_file():
        return Path(source)
    shipped = resources.files("launch.recipes") / f"{source}.yaml"
    if shipped.is_file():
        return Path(str(shipped))
    raise RecipeError(f"{source}: no such recipe file, and no shipped recipe of that name ({', '.join(shipped_recipes())})")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _parse_override(text: str) -> dict:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {text!r}: write it as key=value")
    tree: Any = yaml.load(value, Loader=_Loader) if value else ""
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _first_problem(error: pydantic.ValidationError, defaults: Any) -> str:
    problems = error.errors(include_url=False)
    # An unknown key is the likeliest cause of whatever else is wrong, so it is named first.
    problem = min(problems, key=lambda p: p["type"] != "unexpected_keyword_argument")
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "unexpected_keyword_argument":
        return f"{key}: no such key{_suggest(problem['loc'], defaults)}"
    if problem["type"] == "value_error":  # our own words
        return f"{key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}"
    return f"{key + ': ' if key else ''}{problem['msg'][0].lower() + problem['msg'][1:]}{_given(problem)}"


def _given(problem: Mapping) -> str:
    value = problem.get("input")
    return f", not {value!r}" if isinstance(value, (str, int, float, bool, type(None))) else ""


def _suggest(loc: Sequence, config: Any) -> str:
    for part in loc[:-1]:
        config = getattr(config, str(part), None)
    known = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}" if known else ""
