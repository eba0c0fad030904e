"""Rendered clips: an endless, seeded set of sounding events with known truth, drawn here as real mp4 files."""

from __future__ import annotations

import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from data_prep import rendering
from data_prep.manifest import ManifestRow
from data_prep.rendering.config import RenderConfig
from data_prep.rendering.encode import encode_mp4
from data_prep.rendering.scene import Scene, kind_names

_CHUNK = 16
"""Clips drawn per task: enough to hide what sending a task costs, few enough that rows come steadily."""


class Clip(NamedTuple):
    """Which clip of the endless set: all that its content depends on besides the settings."""

    seed: int
    split: str
    index: int

    @property
    def key(self) -> str:
        """Its key in manifest and shards."""
        return f"rendered_{self.seed}_{self.split}_{self.index:06d}"

    def path(self, folder: Path) -> Path:
        """Its file."""
        return folder / self.split / f"{self.key}.mp4"


def read_rendered(
    out_dir: str | Path, count: int, seed: int = 0, heldout: int = 0, settings: RenderConfig | None = None, workers: int = 2
) -> Iterator[ManifestRow]:
    """Draw `count` training and `heldout` held-out clips into a local folder and yield their rows, in order, as files are complete.

    Clip i of a seed and split is the same whichever process draws it and however many are asked for; files already there are
    kept, so that an interrupted call goes on where it was. A row's `extra` holds the truth: `kinds` and `events`
    (kind, time in seconds, x and y in picture sides, `onset`: whether the sound starts sharply at `time`, and what else a kind has).
    """
    settings = settings or RenderConfig()
    if count < 0 or heldout < 0 or seed < 0:
        raise ValueError(f"read_rendered: count, heldout and seed are {count}, {heldout}, {seed}: none may be negative")
    kind_names(settings)
    folder = Path(out_dir).resolve()
    _claim(folder, settings)
    clips = [Clip(seed, split, index) for split, size in (("train", count), ("heldout", heldout)) for index in range(size)]
    return _rows(folder, settings, clips, workers)


def _claim(folder: Path, settings: RenderConfig):
    """Record what the clips were drawn with beside them: their names do not tell, and rows would state another clip's truth."""
    record, wanted = folder / "settings.json", json.dumps(asdict(settings) | {"renderer": _renderer()}, indent=1) + "\n"
    for split in ("train", "heldout"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    if not record.exists():
        _write(record, wanted.encode())
    elif record.read_text() != wanted:
        raise ValueError(
            f"{folder} holds clips of other settings or of another version of the renderer (settings.json): "
            "choose another folder or remove this one"
        )


def _renderer() -> str:
    """Checksum of the code that draws."""
    sources = sorted(Path(rendering.__file__).parent.glob("*.py"))
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in sources)):08x}"


def _rows(folder: Path, settings: RenderConfig, clips: list[Clip], workers: int) -> Iterator[ManifestRow]:
    missing = [clip for clip in clips if not clip.path(folder).exists()]
    drawn = _draw_all(folder, settings, missing, workers)
    pending = set(missing)
    for clip in clips:
        while clip in pending:
            pending.difference_update(next(drawn))
        yield _row(folder, settings, clip)


def _row(folder: Path, settings: RenderConfig, clip: Clip) -> ManifestRow:
    scene = Scene.cast(settings, *clip)
    return ManifestRow(
        key=clip.key, dataset="rendered", split=clip.split, source=str(clip.path(folder)), start=0.0, end=settings.seconds,
        labels=scene.kinds, caption=scene.caption, extra={"kinds": scene.kinds, "events": scene.events},
    )


def _draw_all(folder: Path, settings: RenderConfig, clips: list[Clip], workers: int) -> Iterator[list[Clip]]:
    """Draw in `workers` processes (up to one: in this one); yields each chunk when its files are complete, in order."""
    chunks = [clips[i : i + _CHUNK] for i in range(0, len(clips), _CHUNK)]
    if workers <= 1 or len(chunks) <= 1:
        for chunk in chunks:
            yield _draw(folder, settings, chunk)
        return
    # Spawned, not forked: the caller may hold threads (torch, fsspec) whose locks a fork would copy locked.
    pool = ProcessPoolExecutor(min(workers, len(chunks)), mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in [pool.submit(_draw, folder, settings, chunk) for chunk in chunks]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(folder: Path, settings: RenderConfig, clips: list[Clip]) -> list[Clip]:
    for clip in clips:
        scene = Scene.cast(settings, *clip)
        _write(
            clip.path(folder),
            encode_mp4(scene.draw(), scene.play(), settings.fps, settings.sample_rate, settings.crf, settings.audio_bitrate),
        )
    return clips


def _write(path: Path, content: bytes):
    """Under another name first: what bears its final name is complete."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
