"""Cut, transcode and shard clips, against one ffmpeg process per clip and step, as video2dataset does it.

`python -m benchmarks.clip_making [--media FOLDER] [--clips N] [--ffmpeg PATH]`: clips of 10 s, two workers each. Both cut, scale to a
short side of 256, bring to 25 fps (x264 veryfast, crf 23, a key frame every 10) and write 16 kHz mono FLAC; ours also measures, filters
and writes checksums and sidecars. Without a folder, sources of 640x360 at 30 fps are made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import av
from imageio_ffmpeg import get_ffmpeg_exe

from benchmarks.common import alternate, machine, show
from benchmarks.made_video import make_video
from data_prep.filters import FilterConfig
from data_prep.manifest import ManifestRow, write_manifest
from data_prep.prepare import prepare_shards
from data_prep.settings import PrepareConfig
from data_prep.transcoding.encode import ClipFormat

WORKERS, ROUNDS, SECONDS, FORMAT = 2, 3, 10.0, ClipFormat()
KEEP_ALL = FilterConfig(min_loudness=-121.0, max_silence=1.0, min_motion=0.0, max_offset=None)
X264 = (
    f"-c:v libx264 -preset {FORMAT.preset} -crf {FORMAT.crf} -g {FORMAT.gop} -keyint_min {FORMAT.gop} "
    "-threads 1 -sc_threshold 0 -bf 0 -flags +cgop -x264-params mbtree=0 -pix_fmt yuv420p"
).split()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--media", type=Path, help="folder of videos of 10 s or more")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--ffmpeg", default=get_ffmpeg_exe(), help="the program to compare with; imageio-ffmpeg's by default")
    options = parser.parse_args()
    print(machine("av"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = sorted(options.media.glob("*.mp4")) if options.media else [make_video(folder / f"{i}.mp4", i) for i in range(6)]
        rows = list(islice(clips_of(sources), options.clips))
        parts = [rows[number::ROUNDS] for number in range(ROUNDS)]
        peer, ours = Side(partial(by_processes, ffmpeg=options.ffmpeg), folder / "peer", parts), Side(prepare, folder / "ours", parts)
        seconds = alternate({"ffmpeg, one process per clip and step": peer, "foleyscale": ours}, repeats=ROUNDS)
        slowest, lines = max(seconds.values()), []
        for (name, taken), side in zip(seconds.items(), (peer, ours), strict=True):
            figures = [taken * ROUNDS, len(rows) / taken / ROUNDS, side.megabytes(), slowest / taken, side.busy, peer.busy / side.busy]
            lines.append([name, *figures])
    header = ["", "seconds", "clips/s", "MB", "times as fast", "processor seconds", "times less"]
    show(f"{len(rows)} clips of {SECONDS:g} s, {WORKERS} workers, in {ROUNDS} rounds that take turns", header, lines)


class Side:
    """One way to make clips: each call makes the next part of them."""

    def __init__(self, make: Callable[[list[ManifestRow], Path], None], folder: Path, parts: list[list[ManifestRow]]):
        self._make, self._folder, self._parts = make, folder, enumerate(parts)
        self.busy = 0.0
        """Seconds that processors worked on it: what else the machine does changes those less."""

    def __call__(self) -> None:
        number, rows = next(self._parts)
        folder = self._folder / str(number)
        folder.mkdir(parents=True)
        before = os.times()
        self._make(rows, folder)
        self.busy += sum(os.times()[:4]) - sum(before[:4])

    def megabytes(self) -> float:
        """Size of the shards."""
        return sum(path.stat().st_size for path in self._folder.glob("**/*.tar")) / 1e6


def clips_of(sources: list[Path]) -> Iterator[ManifestRow]:
    """Rows without end: ten seconds from each source in turn, each time a second later while it lasts."""
    lengths = {}
    for source in sources:
        with av.open(str(source)) as media:
            lengths[source] = media.duration / av.time_base
    for number, source in enumerate(cycle(sources)):
        start = float(number // len(sources) % max(1, int(lengths[source] - SECONDS)))
        yield ManifestRow(key=f"clip_{number:04d}", dataset="bench", source=str(source), start=start, end=start + SECONDS)


def prepare(rows: list[ManifestRow], folder: Path) -> None:
    write_manifest(rows, folder / "manifest.parquet")
    summary = prepare_shards(folder / "manifest.parquet", folder / "out", PrepareConfig(format=FORMAT, filters=KEEP_ALL), workers=WORKERS)
    if summary.ok != len(rows):
        raise SystemExit(f"not all clips were made: {summary}")


def by_processes(rows: list[ManifestRow], folder: Path, ffmpeg: str) -> None:
    with ThreadPoolExecutor(WORKERS) as pool, tarfile.open(folder / "shard.tar", "w") as tar:
        for paths in pool.map(lambda row: steps(row, folder, ffmpeg), rows):
            for path in paths:
                tar.add(path, path.name)
                path.unlink()


def steps(row: ManifestRow, folder: Path, ffmpeg: str) -> list[Path]:
    cut, scaled, video, audio = (folder / f"{row.key}.{name}" for name in ("cut.mp4", "scaled.mp4", "mp4", "flac"))
    side = FORMAT.short_side
    scale = f"scale='if(gt(iw,ih),-2,{side})':'if(gt(iw,ih),{side},-2)'"

    def run(*arguments):
        # One thread, as ours: with two processes on two cores more of them only cost time.
        subprocess.run([ffmpeg, "-v", "error", "-y", "-threads", "1", *map(str, arguments)], check=True)

    run("-ss", row.start, "-to", row.end, "-i", row.source, *X264, "-c:a", "aac", cut)
    run("-i", cut, "-vf", scale, *X264, "-c:a", "copy", scaled)
    run("-i", scaled, "-r", FORMAT.fps, *X264, "-an", video)
    run("-i", scaled, "-vn", "-ac", 1, "-ar", FORMAT.sample_rate, audio)
    cut.unlink()
    scaled.unlink()
    return [video, audio]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
