"""URLs without what opens them: no key, password or signature gets into a message, a file or a log."""

from __future__ import annotations

import re

_USERS = (
    re.compile(r"\b(s3a?://)[^\s@:/'\"]+:[^\s@'\"]+@"),  # a secret key of S3 may hold slashes
    re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/?#@'\"]+@", re.IGNORECASE),
)
_QUERY = re.compile(
    r"([?&;](?:[\w.%-]*(?:signature|credential|token|secret|passw|api_?key|access_?key|key-pair)[\w.%-]*|sig|auth|policy|key)=)"
    r"[^\s&;#'\"<>)\]\\]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text, with the user part and the signing parameters of every URL in it replaced by `***`."""
    for pattern in _USERS:
        text = pattern.sub(r"\1***@", text)
    return _QUERY.sub(r"\1***", text)


def without_credentials(url: str) -> str:
    """The URL itself; ValueError where it holds credentials, as a folder's URL is written into messages and files."""
    if (shown := redacted(url)) != url:
        raise ValueError(
            f"{shown}: holds credentials; take them out of the URL and put them into the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), ~/.aws/credentials or fsspec's configuration"
        )
    return url
