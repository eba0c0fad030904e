"""Raw samples per second in one process: this project's stream against webdataset, MosaicML streaming and litdata.

    pip install webdataset mosaicml-streaming litdata
    python -m benchmarks.stream_reading [--folder DIR] [--samples 1024] [--kb 400] [--batch 16] [--repeats 5]

All read the same random bytes from the page cache and hand over every sample's bytes; webdataset reads our own tars. "In order"
is one pass as the samples lie; "shuffled" is training's order: a window of 16 shards here, each peer's own shuffle there. Each side
gives samples as it does to training: the peers one at a time, this project in batches. Only this project compares a checksum of every
sample with the one that was written; there is no switch to leave that out.

Processor time counts all threads: this project reads long batches with two. Where the processors are busy with other work, compare that.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import itemgetter
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import alternate, machine, show
from data_prep.index import ShardSet, build_index
from data_prep.shards import ShardWriter
from data_prep.stream import ClipStream, one_pass

SHARDS = 4
PEERS = {"webdataset": "webdataset", "MosaicML MDS": "mosaicml-streaming", "litdata": "litdata"}
MODULES = {"webdataset": "webdataset", "MosaicML MDS": "streaming", "litdata": "litdata"}


def main() -> None:
    """Write the samples for every peer that is installed, read them in turns, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--kb", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        runs, order = prepare(Path(folder), arguments.samples, arguments.kb * 1000, arguments.batch)
        busy: dict[str, list[float]] = {name: [] for name in runs}
        timed = {name: (lambda name=name, read=read: busy[name].append(count(read(), arguments.samples))) for name, read in runs.items()}
        seconds = alternate(timed, arguments.repeats)
    rate = {name: arguments.samples / value for name, value in seconds.items()}
    print(machine(*("torch", *order.values())))
    for how in ("in order", "shuffled"):
        ours = rate[f"foleyscale {how}"]
        used = {name: 1e6 * median(busy[f"{name} {how}"]) / arguments.samples for name in ("foleyscale", *order)}
        rows = [[name, rate[f"{name} {how}"], rate[f"{name} {how}"] * arguments.kb / 1000, ours / rate[f"{name} {how}"],
                 used[name], used[name] / used["foleyscale"]] for name in used]  # fmt: skip
        header = ["reader", "samples/s", "MB/s", "ours / theirs", "processor, us a sample", "theirs / ours"]
        show(f"{arguments.samples} samples of {arguments.kb} KB, {how}", header, rows)


def prepare(folder: Path, samples: int, size: int, batch: int) -> tuple[dict[str, Callable[[], Iterable[bytes]]], dict[str, str]]:
    """What reads all samples once, by name; and the packages of the peers."""
    runs = ours(write_tars(folder / "tars", samples, size), batch)
    peers = {name: package for name, package in PEERS.items() if importlib.util.find_spec(MODULES[name])}
    if "webdataset" in peers:
        runs |= webdataset_runs(folder / "tars")
    if "MosaicML MDS" in peers:
        runs |= mosaic_runs(folder / "mds", samples, size)
    if "litdata" in peers:
        runs |= litdata_runs(folder / "litdata", samples, size)
    return runs, peers


def contents(samples: int, size: int) -> Iterator[bytes]:
    """The samples: bytes that no format can make smaller."""
    noise = np.random.default_rng(0)
    return (noise.bytes(size) for _ in range(samples))


def count(samples: Iterable[bytes], expected: int) -> float:
    """Seconds of processor to take all samples as decoders do, as bytes: some readers hand over views of files that nobody has read yet."""
    begin = time.process_time()
    found = sum(1 for sample in samples if bytes(sample))
    if found != expected:
        raise RuntimeError(f"{found} samples came instead of {expected}")
    return time.process_time() - begin


def raw(members, entry, random):
    """A decoder that leaves the bytes as they are."""
    return {"bin": members["bin"]}


raw.members = ("bin",)


def write_tars(folder: Path, samples: int, size: int) -> ShardSet:
    """The shards that this project and webdataset read."""
    source = contents(samples, size)
    for shard in range(SHARDS):
        with ShardWriter(folder, shard) as writer:
            for row in range(shard * samples // SHARDS, (shard + 1) * samples // SHARDS):
                writer.add(f"clip-{row}", {"bin": next(source)})
    return build_index(folder, {})


def ours(shards: ShardSet, batch: int) -> dict[str, Callable[[], Iterable[bytes]]]:
    """This project: a pass in order, and an epoch of training."""
    def shuffled() -> Iterator[bytes]:
        batches = ClipStream(ShardSet.open(shards.url), raw, batch_size=batch).batches()
        return (sample for _ in range(len(shards) // batch) for sample in next(batches)["bin"])

    def in_order() -> Iterator[bytes]:
        return chain.from_iterable(map(itemgetter("bin"), one_pass(ShardSet.open(shards.url), raw, batch)))  # holds one batch at a time

    return {"foleyscale in order": in_order, "foleyscale shuffled": shuffled}


def webdataset_runs(folder: Path) -> dict[str, Callable[[], Iterable[bytes]]]:
    """webdataset over the same tars, with its usual buffer of 1000 samples where it shuffles."""
    import webdataset

    urls = sorted(map(str, folder.glob("*.tar")))

    def read(buffer: int) -> Iterator[bytes]:
        data = webdataset.WebDataset(urls, shardshuffle=SHARDS if buffer else False, empty_check=False)
        return (sample["bin"] for sample in (data.shuffle(buffer) if buffer else data))

    return {"webdataset in order": lambda: read(0), "webdataset shuffled": lambda: read(1000)}


def mosaic_runs(folder: Path, samples: int, size: int) -> dict[str, Callable[[], Iterable[bytes]]]:
    """MosaicML streaming over its own shards of 64 MB, already local."""
    # Its pictures' data sets import torchvision, whose build on PyPI does not load beside a CPU build of torch.
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.VisionDataset = module.to_tensor = object
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"bin": "bytes"}) as writer:
        for sample in contents(samples, size):
            writer.write({"bin": sample})

    def read(shuffle: bool) -> Iterator[bytes]:
        return (sample["bin"] for sample in StreamingDataset(local=str(folder), batch_size=1, shuffle=shuffle))

    return {"MosaicML MDS in order": lambda: read(False), "MosaicML MDS shuffled": lambda: read(True)}


def litdata_runs(folder: Path, samples: int, size: int) -> dict[str, Callable[[], Iterable[bytes]]]:
    """litdata over its own chunks of 64 MB."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    os.makedirs(folder)
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, sample in enumerate(contents(samples, size)):
        writer.add_item(number, sample)
    writer.done()
    writer.merge()

    def read(shuffle: bool) -> Iterator[bytes]:
        return iter(StreamingDataset(str(folder), shuffle=shuffle))

    return {"litdata in order": lambda: read(False), "litdata shuffled": lambda: read(True)}


if __name__ == "__main__":
    main()
