"""What reads and writes media, and whether the data can be reached."""

from __future__ import annotations

import importlib.util
import threading
import time

from data_prep.remote.urls import redacted
from launch.doctor.check import Check

_URL_SECONDS = 20.0
_ENCODERS = ("libx264", "flac", "aac")
_DECODERS = ("h264", "hevc", "vp9", "libdav1d", "aac", "opus", "mp3", "flac")


def codecs() -> Check:
    """Whether FFmpeg's libraries write the formats of the shards and read those of videos."""
    import av

    wanted = [(name, "w") for name in _ENCODERS] + [(name, "r") for name in _DECODERS]
    missing = {mode: [name for name, each in wanted if each == mode and not _has_codec(name, mode)] for mode in "wr"}
    found = f"PyAV {av.__version__} with FFmpeg {av.ffmpeg_version_info}"
    remedy = "install the wheel of av from PyPI, which brings its own FFmpeg"
    if missing["w"]:
        return Check("codecs", "fail", f"{found} cannot write {', '.join(missing['w'])}", remedy)
    if missing["r"]:
        return Check("codecs", "warn", f"{found} cannot read {', '.join(missing['r'])}", remedy)
    return Check("codecs", "ok", f"{found} writes {', '.join(_ENCODERS)}, reads {', '.join(_DECODERS)}")


def _has_codec(name: str, mode: str) -> bool:
    import av

    try:
        av.codec.Codec(name, mode)
    except (ValueError, av.error.FFmpegError):  # unknown, or known for the other direction only
        return False
    return True


def decoders() -> Check:
    """What `clip.backend` may be."""
    from data_prep.streaming.backends import BACKENDS, backend

    usable, broken = [], []
    for name in BACKENDS:
        try:
            backend(name)
            usable.append(name)
        except ValueError as error:
            if importlib.util.find_spec(name):  # one that is not installed is not wanted
                broken.append(redacted(str(error))[:200])
    found = f"clip.backend may be {', '.join(usable)}"
    return Check("decoders", "warn", "; ".join([found, *broken])) if broken else Check("decoders", "ok", found)


def data(url: str) -> Check:
    """Whether the folder of data can be listed, and how fast."""
    from data_prep.storage import Folder

    answer: list[int | Exception] = []

    def ask() -> None:
        try:
            answer.append(len(Folder(url).sizes()))
        except Exception as error:
            answer.append(error)

    started = time.perf_counter()
    # A store that never answers must not hold up the report.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_URL_SECONDS)
    remedy = "see AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3, the network and the clock"
    if not answer:
        return Check("data", "fail", f"{redacted(url)}: no answer within {_URL_SECONDS:g} s", remedy)
    if isinstance(found := answer[0], Exception):
        text = " ".join(str(found).split())[:300]
        needs = "install foleyscale[s3]" if isinstance(found, ImportError) else remedy
        return Check("data", "fail", redacted(f"{url}: {type(found).__name__}: {text}"), needs)
    if not found:
        return Check("data", "warn", f"{url} is empty, or is not there", "name the folder that holds the shards")
    return Check("data", "ok", f"{found} files in {url}, listed in {time.perf_counter() - started:.1f} s")
