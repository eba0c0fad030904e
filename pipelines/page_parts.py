"""Small parts that the pages share: notes, verdicts, numbers, sections."""

from __future__ import annotations

import math

from pipelines.page import Html, tag

__all__ = ["error", "note", "number", "pill", "section"]


def section(title: str, content: list[Html]) -> Html:
    """A card with a heading."""
    return tag("section", tag("h2", title), *content)


def note(text: str) -> Html:
    """A line of explanation."""
    return tag("p", text, class_="note")


def pill(passed: bool, text: str) -> Html:
    """A few words on green or red."""
    return tag("span", text, class_=f"pill {'good' if passed else 'bad'}")


def number(value: float | None) -> str:
    """A number in a table; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def error(value: float | None) -> str:
    """A standard error in a table; nothing where there is none."""
    return "" if value is None else f"± {value:.2g}"
