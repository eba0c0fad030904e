"""YouTube's ids and the addresses that hold them."""

from __future__ import annotations

import re

VIDEO_ID = "[A-Za-z0-9_-]{11}"
"""The pattern of an id."""
_VIDEO_ID = re.compile(VIDEO_ID)
_PAGE = rf"youtu(?:be(?:-nocookie)?\.com/(?:watch\?(?:[^#]*&)?v=|embed/|shorts/|live/|v/)|\.be/)({VIDEO_ID})(?![A-Za-z0-9_-])"
_ANYWHERE, _ADDRESS = re.compile(_PAGE), re.compile(r"https?://(?:[a-z]+\.)?" + _PAGE)


def is_video_id(text: str) -> bool:
    """Whether it is the id of a YouTube video: 11 letters, digits, '-' or '_'."""
    return _VIDEO_ID.fullmatch(text) is not None


def youtube_url(video_id: str) -> str:
    """Where the video of that id is shown."""
    return f"https://www.youtube.com/watch?v={video_id}"


def id_of_address(url: str) -> str | None:
    """The id of the video that a URL of YouTube shows; None for any other URL."""
    found = _ADDRESS.match(url)
    return found and found[1]


def id_in_text(text: str) -> str | None:
    """The id in an address of YouTube anywhere in a text, with "https://" before it or without."""
    found = _ANYWHERE.search(text)
    return found and found[1]
