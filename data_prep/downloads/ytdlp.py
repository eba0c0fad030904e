"""One video by yt-dlp, the optional dependency `[download]`: its options, its streams, and its many errors in a few reasons."""

from __future__ import annotations

import heapq
import io
import re
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from data_prep.remote.urls import redacted
from data_prep.transcoding.container import ClipError, audio_stream, opened, video_stream

if TYPE_CHECKING:
    from data_prep.downloads.download import DownloadConfig

_BLOCK = 16384
"""Bytes between two looks at the clock."""
_LONGEST = 300
"""Characters of a message."""
_PAGE_EXTRACTORS = ("Generic", "HTML5MediaEmbed")
"""What answers for sites that yt-dlp does not know: links to files, and whatever looks like a video on a page."""

_REASONS = [
    # The order counts: "no longer available because the account ... was terminated" also speaks of an account.
    ("blocked", r"not a bot|rate-limited|captcha|try again later|too many requests"),
    ("private", r"\b(private video|(is|are|was) private)\b"),
    ("removed", r"removed|deleted|terminated|no longer available|available anymore|does not exist|closed their"),
    (
        "restricted",
        r"your age|age.restricted|inappropriate|members|subscri|premium|rental|purchase|your (country|region|location)|geo.?restrict"
        r"|\b(log|sign).?in\b|registered|drm protected",
    ),
    ("network", r"timed? ?out|connection|resolve|name or service|unreachable|bytes read|downloaded \d+ bytes|\bssl\b|reset by peer"),
]
"""What sites and yt-dlp say, searched in this order; anything else is "unavailable"."""


class DownloadFailed(ClipError):
    """A video that cannot be had.

    Reasons: private, removed, restricted (country, age, members, payment), unavailable, blocked (bot check, 403, 429), network, not_media,
    too_large, too_slow. `retry_after` is how many seconds to wait at least before asking again, None where that does not help now.
    """

    def __init__(self, reason: str, message: str, retry_after: float | None = None):
        super().__init__(reason, message)
        self.retry_after = retry_after


def download(url: str, work: Path, config: DownloadConfig, deadline: float) -> Path:
    """Download one video into the folder `work` and return the whole file there; DownloadFailed says why not.

    `deadline` is a time of time.monotonic(), looked at before the download and with each block of data.
    What an earlier call left in `work` is resumed where the site tells one version of a file from another.
    """
    from yt_dlp import YoutubeDL
    from yt_dlp.utils import YoutubeDLError

    watch = _Watch(config, deadline)
    try:
        with YoutubeDL(_options(config, watch)) as site:
            info = site.extract_info(url, download=False)
            streams = _streams(info)
            watch.check(sum(stream.get("filesize") or 0 for stream in streams))
            files = [_fetched(site, stream, work / f"stream{number}") for number, stream in enumerate(streams)]
        return _openable(files[0]) if len(files) == 1 else _joined(*files, work / "joined.mkv")
    except YoutubeDLError as error:
        raise translated(error) from error
    except DownloadFailed:
        raise
    except ClipError as error:
        raise DownloadFailed("not_media", f"what came is no video: {str(error).rpartition(': ')[2]}") from error


class _Watch:
    """Stops a download that takes too long or grows too large; yt-dlp itself has no limit on the time of a whole download."""

    def __init__(self, config: DownloadConfig, deadline: float):
        self._config, self._deadline = config, deadline

    def __call__(self, progress: dict[str, Any]) -> None:
        self.check(max(progress.get("total_bytes") or 0, progress.get("downloaded_bytes") or 0))

    def check(self, size: int) -> None:
        limit = self._config.max_megabytes
        if limit is not None and size > limit * 1e6:
            raise DownloadFailed("too_large", f"{size / 1e6:,.1f} MB, DownloadConfig.max_megabytes is {limit:g}")
        if time.monotonic() > self._deadline:
            raise DownloadFailed("too_slow", f"not there within DownloadConfig.time_limit of {self._config.time_limit:g} s")


class _Silence:
    """Takes yt-dlp's own log: it would print signed addresses."""

    def debug(self, message: str) -> None:
        pass

    warning = error = debug


def _options(config: DownloadConfig, watch: _Watch) -> dict[str, Any]:
    options: dict[str, Any] = {
        "logger": _Silence(),
        "quiet": True,
        "noprogress": True,
        "progress_hooks": [watch],
        # Separate picture and sound first: single files tend to have the poorer sound. H.264 is cheap to decode.
        "format": "bv+ba/b/bv*",
        "format_sort": [f"res:{config.short_side}", "vcodec:h264"],
        "noplaylist": True,
        "extract_flat": "in_playlist",
        "geo_bypass": False,  # a forged address is no way to ask for a video
        "hls_prefer_native": True,
        # Retried by the Downloader, which asks the site afresh: signed addresses go stale.
        "retries": 0,
        "extractor_retries": 0,
        "fragment_retries": config.retries,
        "skip_unavailable_fragments": False,  # else a video with holes counts as whole
        "socket_timeout": config.timeout,
        # yt-dlp would read up to 4 MB at once: where a site becomes slow, nobody looks at the clock for as long as that takes.
        "buffersize": _BLOCK,
        "noresizebuffer": True,
        "updatetime": False,
    }
    if config.rate_limit is not None:
        options["ratelimit"] = config.rate_limit
    if (cookies := config.read_cookies()) is not None:
        # In memory: yt-dlp writes a cookies file anew when it ends, and many workers would spoil the user's own.
        options["cookiefile"] = io.StringIO(cookies)
    return options


def _streams(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The one or two files to download for what yt-dlp found out."""
    if "entries" in info:
        raise DownloadFailed("not_media", "a list of videos; name one video")
    if info.get("live_status") in ("is_live", "is_upcoming"):
        raise DownloadFailed("unavailable", "a live stream that has not ended")
    streams = info.get("requested_formats") or [info]
    guessed = info.get("extractor_key") in _PAGE_EXTRACTORS and not info.get("direct")
    if guessed and streams[0].get("protocol") in ("http", "https"):
        raise DownloadFailed("not_media", "a web page; what video it shows is a guess")
    return streams


def _fetched(site: Any, stream: dict[str, Any], stem: Path) -> Path:
    version = _version(stream)
    if version is None:
        for left in stem.parent.glob(f"{stem.name}.*"):
            left.unlink()
    ext = stream["ext"] if re.fullmatch(r"[a-z0-9]{1,5}", stream.get("ext") or "") else "media"
    path = stem.with_name(f"{stem.name}.{ext}" if version is None else f"{stem.name}-{version}.{ext}")
    complete, _ = site.dl(str(path), stream)
    if not complete or not path.exists():
        raise DownloadFailed("network", "the download ended without a file")
    return path


def _openable(path: Path) -> Path:
    with opened(path):
        return path


def _version(stream: dict[str, Any]) -> str | None:
    """A name that changes with the bytes behind the address, None where nothing tells: then halves must not be put together."""
    known = [stream.get("filesize"), stream.get("timestamp")]
    if known == [None, None] or stream.get("protocol") not in ("http", "https"):
        return None
    return blake2b(repr([stream.get("format_id"), *known]).encode(), digest_size=8).hexdigest()


def _joined(video: Path, audio: Path, out: Path) -> Path:
    """Put picture and sound into one file, packet for packet as they are: no ffmpeg program is needed."""
    with opened(video) as pictures, opened(audio) as sound, av.open(str(out), "w") as target:
        streams = [video_stream(pictures), audio_stream(sound)]
        if streams[1] is None:
            raise ClipError("no_audio", f"{audio.name}: no audio stream")
        copies = [target.add_stream_from_template(stream, opaque=True) for stream in streams]
        packets = (_packets(stream, copy) for stream, copy in zip(streams, copies, strict=True))
        # Interleaved by time: a muxer given one stream after the other keeps the whole first one in memory.
        for packet in heapq.merge(*packets, key=lambda packet: (packet.pts if packet.dts is None else packet.dts) * packet.time_base):
            target.mux(packet)
    return out


def _packets(stream: Any, copy: Any) -> Iterator[av.Packet]:
    for packet in stream.container.demux(stream):
        if packet.size:
            packet.stream = copy
            yield packet


def translated(error: Exception) -> Exception:
    """The failure that an exception of yt-dlp stands for, in one line without colours, hints or signed addresses.

    OSError where it is this machine that fails; ValueError where the cookies are no cookies.
    """
    from yt_dlp.cookies import CookieLoadError
    from yt_dlp.networking.exceptions import TransportError
    from yt_dlp.utils import GeoRestrictedError, UnsupportedError

    cause = (getattr(error, "exc_info", None) or (None, error))[1] or error
    text = _plain(str(error))
    if isinstance(error, CookieLoadError):
        return ValueError("DownloadConfig.cookies: yt-dlp cannot read the file; export it again in Netscape format")
    if re.search(r"unable to (open for writing|write)", text, re.IGNORECASE):
        return OSError(text)
    reason = "unavailable"
    if found := re.search(r"HTTP Error (\d{3})", text):
        reason = _of_status(int(found[1]))
    elif isinstance(cause, UnsupportedError):
        reason, text = "not_media", "a web page without a video that yt-dlp knows"
    elif isinstance(cause, GeoRestrictedError):
        reason = "restricted"
    elif isinstance(cause, TransportError):
        reason = "network"
    else:
        reason = next((name for name, pattern in _REASONS if re.search(pattern, text, re.IGNORECASE)), reason)
    return DownloadFailed(reason, text, _retry_after(reason, text, cause))


def _of_status(status: int) -> str:
    if status in (404, 410):
        return "removed"
    if status in (403, 429):
        return "blocked"
    if status in (401, 402, 451):
        return "restricted"
    return "network" if status >= 500 or status == 408 else "unavailable"


def _retry_after(reason: str, text: str, cause: BaseException) -> float | None:
    if reason != "network" and "HTTP Error 429" not in text:
        return None
    response = getattr(cause, "response", None)
    told = "" if response is None else response.headers.get("Retry-After") or ""
    return float(told) if re.fullmatch(r"\d{1,6}", told) else 0.0


def _plain(text: str) -> str:
    text = re.sub(r"\x1b\[[\d;]*m", "", text).replace("\u2019", "'")
    text = " ".join(text.split())
    text = re.sub(r"^(ERROR: )?(\[download\] Got error: )?(\[[\w:+-]+\] (\S+: )?)?", "", text)
    # Advice on yt-dlp's own command line, requests to report a bug, and the cause that the text has named already.
    text = re.split(r"\s*(?:\(caused by |; please report this issue|\.? Use --|\.? You might want to use|\.? It is recommended)", text)[0]
    # Sites sign their own addresses in ways that nobody knows all of: there the whole query goes.
    return redacted(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text))[:_LONGEST] or "no reason given"
