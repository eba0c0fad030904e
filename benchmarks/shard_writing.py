"""Writing shards: this project's writer, with checksums and sidecar, against webdataset.ShardWriter, with neither.

    pip install webdataset
    python -m benchmarks.shard_writing [--folder DIR] [--megabytes 200] [--repeats 7]

The same clips of three members (mp4, flac, json) go into one tar each. Before a shard of ours appears, the disk has it (fsync);
webdataset leaves that to the system. So "into the page cache" lets os.fsync return at once, which leaves the writers' own work, and
"onto the disk" is measured until the disk has the bytes of either.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import webdataset

from benchmarks.common import alternate, machine, show
from data_prep.shards import ShardWriter

SIZES = {"400 KB": (300_000, 100_000, 600), "900 KB": (650_000, 240_000, 1500)}
"""Bytes of mp4, flac and json; the larger is what ten seconds take at the usual settings."""
_DISTINCT = 64


def main() -> None:
    """Write clips of each size to each place in turns, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(machine("webdataset"))
    for durable, (title, sizes) in itertools.product((False, True), SIZES.items()):
        clips = [tuple(map(random.Random(i).randbytes, sizes)) for i in range(_DISTINCT)]
        count = arguments.megabytes * 1_000_000 // sum(sizes)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, fsync(durable):
            seconds = alternate(runs(Path(folder), clips, count), arguments.repeats)
        megabytes, ours = count * sum(sizes) / 1e6, seconds["foleyscale"]
        rows = [[name, megabytes / value, count / value, value / ours] for name, value in seconds.items()]
        place = "onto the disk" if durable else "into the page cache"
        show(f"{count} clips of {title}, {place}", ["writer", "MB/s", "clips/s", "foleyscale is faster by"], rows)


@contextlib.contextmanager
def fsync(durable: bool) -> Iterator[None]:
    """Waiting for the disk, or not."""
    real = os.fsync
    os.fsync = real if durable else lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = real


def runs(folder: Path, clips: list[tuple[bytes, ...]], count: int) -> dict[str, Callable[[], None]]:
    """What writes one shard into a new folder, by name."""
    folders = (folder / str(number) for number in itertools.count())

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(count):
            yield f"clip_{i:06d}", dict(zip(("mp4", "flac", "json"), clips[i % len(clips)], strict=True))

    def ours() -> None:
        with ShardWriter(next(folders), 0) as writer:
            for key, members in samples():
                writer.add(key, members, labels=["dog barking"], caption="", duration=10.0, fps=25.0, loudness=-20.0)

    def theirs() -> None:
        (place := next(folders)).mkdir()
        with webdataset.ShardWriter(str(place / "shard-%06d.tar"), maxcount=count + 1, maxsize=float("inf"), verbose=0) as writer:
            for key, members in samples():
                writer.write({"__key__": key, **members})
        with open(place / "shard-000000.tar", "rb") as file:
            os.fsync(file.fileno())

    return {"foleyscale": ours, "webdataset": theirs}


if __name__ == "__main__":
    main()
