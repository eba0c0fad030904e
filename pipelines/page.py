"""HTML that is escaped by construction, and the look of the report."""

from __future__ import annotations

import html

__all__ = ["Html", "page", "table", "tag"]

_VOID = {"img", "meta"}


class Html(str):
    """Text that is HTML already; every other text is escaped when it becomes part of an element."""


def tag(name: str, /, *children: str, **attributes: str | bool | None) -> Html:
    """An element. `class_` is written class, `data_key` data-key; True is a bare attribute, None and False are left out."""
    opening = name
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            opening += f" {key}"
        elif value not in (None, False):
            opening += f' {key}="{html.escape(str(value))}"'
    if name in _VOID:
        return Html(f"<{opening}>")
    inner = "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    return Html(f"<{opening}>{inner}</{name}>")


def table(head: list[str], rows: list[list[str]], numeric: frozenset[int] = frozenset()) -> Html:
    """A table that scrolls sideways when it is wider than the page; columns in `numeric` are aligned right."""

    def row(cell_name: str, cells: list[str]) -> Html:
        return tag("tr", *(tag(cell_name, cell, class_="number" if i in numeric else None) for i, cell in enumerate(cells)))

    header = [tag("thead", row("th", head))] if head else []
    return tag("div", tag("table", *header, tag("tbody", *(row("td", cells) for cells in rows))), class_="scroll")


def page(title: str, *body: str) -> Html:
    """A whole document that needs nothing beside it but the media it links to."""
    head = tag("head", tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               tag("title", title), tag("style", Html(_STYLE)))
    document = tag("html", head, tag("body", tag("main", *body), tag("script", Html(_SCRIPT))), lang="en")
    return Html(f"<!doctype html>\n{document}\n")


_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --ink: #1b1f27; --muted: #626b7a; --line: #e2e5ea; --accent: #3563e9;
  --second: #d9730d; --good: #12805c; --good-back: #e3f5ee; --bad: #c0362c; --bad-back: #fcebe9; }
@media (prefers-color-scheme: dark) { :root { --back: #12151b; --card: #1b1f27; --ink: #e7eaf0; --muted: #98a1b3; --line: #303643;
  --accent: #7c9dff; --second: #f0a35a; --good: #58cfa1; --good-back: #16352b; --bad: #ff8a80; --bad-back: #43211f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 16px; margin-bottom: 20px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 0 0 8px; overflow-wrap: anywhere; }
h4 { font-size: 12px; font-weight: 500; color: var(--muted); margin: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin-bottom: 20px; }
.note { color: var(--muted); margin: 0 0 12px; overflow-wrap: anywhere; }
.note:last-child { margin-bottom: 0; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
.scroll:last-child { margin-bottom: 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 500; font-size: 12px; color: var(--muted); }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.number + td:not(.number), .number + th:not(.number) { padding-left: 8px; }
figure { margin: 0; }
table:not(:has(thead)) td:first-child { width: 240px; color: var(--muted); }
.pill { display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 13px; font-weight: 600; white-space: nowrap; }
.good { background: var(--good-back); color: var(--good); }
.bad { background: var(--bad-back); color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 16px; margin-bottom: 20px; }
.charts:last-child { margin-bottom: 0; }
.charts svg { display: block; width: 100%; height: auto; }
.charts text { font-family: inherit !important; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr)); gap: 24px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.side { min-width: 0; }
video { display: block; width: 100%; aspect-ratio: 4 / 3; background: #000; border-radius: 8px 8px 0 0; margin-top: 4px; }
.side .note { font-size: 13px; margin: 4px 0; }
.mel { position: relative; cursor: pointer; }
.mel img { display: block; width: 100%; height: 110px; border-radius: 0 0 8px 8px; }
.head { position: absolute; top: 0; bottom: 0; left: 0; width: 2px; background: #fff; pointer-events: none; }
h3 + .note { font-size: 13px; margin-top: -8px; }
details { margin-bottom: 20px; }
details:last-child { margin-bottom: 0; }
summary { cursor: pointer; color: var(--muted); font-size: 13px; margin-bottom: 8px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 8px 0 0; }
"""

# The line over a spectrogram follows its video; a click on the spectrogram seeks.
_SCRIPT = """
for (const side of document.querySelectorAll('.side')) {
  const video = side.querySelector('video'), mel = side.querySelector('.mel'), head = side.querySelector('.head');
  if (!video || !mel) continue;
  const follow = () => {
    head.style.left = 100 * video.currentTime / (video.duration || 1) + '%';
    if (!video.paused) requestAnimationFrame(follow);
  };
  video.addEventListener('play', follow);
  video.addEventListener('seeked', follow);
  mel.addEventListener('click', event => { video.currentTime = (video.duration || 0) * event.offsetX / mel.clientWidth; });
}
"""
