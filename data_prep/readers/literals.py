"""Lists written as Python literals, the way `repr` writes them: split where they are plain, left to `ast.literal_eval` where not.

A short cut is taken only where it provably gives what `ast.literal_eval` would give. Nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import json
import math
import re
import reprlib
from typing import Any, NoReturn

_STRING = re.compile(r"""'[^']*'|"[^"]*\"""")
_NUMBERS = {int, float}


def parse_strings(cell: str) -> list[str]:
    """The list of strings in `cell`; ValueError where it is none."""
    # Without escapes a string ends at the next quote of its kind. Line ends, NUL and surrogates, which none may hold, are not printable.
    if "\\" not in cell and cell.isprintable():
        values = cell[2:-2].split("', '")
        # Where no other quotes are left than those of ends and separators, none lies within a string.
        if cell[:2] == "['" and cell[-2:] == "']" and cell.count("'") == 2 * len(values):
            return values
        tokens = _STRING.findall(cell)
        if f"[{', '.join(tokens)}]" == cell:
            return [token[1:-1] for token in tokens]
    values = parse_list(cell)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{reprlib.repr(cell)} holds other than strings")
    return values


def parse_numbers(cell: str) -> list[float]:
    """The list of finite numbers in `cell`; ValueError where it is none."""
    try:
        values, end = _json(cell)  # a list of numbers in JSON is the same list in Python
    except (ValueError, RecursionError):
        values, end = None, 0
    if end != len(cell) or not isinstance(values, list):
        values = parse_list(cell)
    if not (_NUMBERS.issuperset(map(type, values)) and math.inf not in values and -math.inf not in values):
        raise ValueError(f"{reprlib.repr(cell)} holds other than finite numbers")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is a number in JSON alone")


_json = json.JSONDecoder(parse_constant=_refuse).raw_decode


def parse_list(cell: str) -> list[Any]:
    """The list of any literals in `cell`; ValueError where it is none."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{reprlib.repr(cell)} is no Python literal") from error
    if not isinstance(value, list):
        raise ValueError(f"{reprlib.repr(cell)} is no list")
    return value
