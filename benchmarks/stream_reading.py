"""Raw samples per second in one process: this project's stream against webdataset, MosaicML streaming and litdata.

    pip install webdataset mosaicml-streaming litdata
    python -m benchmarks.stream_reading [--folder DIR] [--samples 4096] [--kb 400] [--batch 16] [--passes 3] [--repeats 5]
        [--peers litdata ...]

All read the same random bytes from the page cache and hand over every sample's bytes; webdataset reads our own tars. "In order"
is one pass as the samples lie; "shuffled" is training's order: a window of 16 shards here, each peer's own shuffle there. Each side
gives samples as it does to training: the peers one at a time, this project in batches. Only this project compares a checksum of every
sample with the one that was written; there is no switch to leave that out.

Each reader has a process of its own, so that what one does to its memory allocator or leaves behind in threads is no other's gain or
loss; they take turns. Processor time counts all threads: this project reads long batches with two. Where the processors are busy with
other work, compare that.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
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
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--kb", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--passes", type=int, default=3, help="of one turn: the first tenth of a second after a pause is slow for all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS], help="those to read with, of what is installed")
    arguments = parser.parse_args()
    peers = {name: PEERS[name] for name in arguments.peers if importlib.util.find_spec(MODULES[name])}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write(Path(folder), peers, arguments.samples, arguments.kb * 1000)
        readers = {f"foleyscale, batch {batch}": partial(ours, Path(folder), batch) for batch in sorted({arguments.batch, 1}, reverse=True)}
        readers |= {name: partial(READERS[name], Path(folder)) for name in peers}
        seconds, busy = take_turns(readers, arguments.samples, arguments.passes, arguments.repeats)
    print(machine(*("torch", *peers.values())))
    ours_first = [name for name in readers if name not in peers]
    for how in ("in order", "shuffled"):
        taken = arguments.samples * arguments.passes
        rate = {name: taken / seconds[name, how] for name in readers}
        used = {name: 1e6 * median(busy[name, how]) / taken for name in readers}
        rows = [[name, rate[name], rate[name] * arguments.kb / 1000, *(rate[own] / rate[name] for own in ours_first),
                 used[name], *(used[name] / used[own] for own in ours_first)] for name in readers]  # fmt: skip
        header = ["reader", "samples/s", "MB/s", *(f"{own} / this" for own in ours_first),
                  "processor, us a sample", *(f"this / {own}" for own in ours_first)]  # fmt: skip
        show(f"{arguments.samples} samples of {arguments.kb} KB, {how}", header, rows)


Read = Callable[[bool], Iterable[bytes]]
"""All samples once: shuffled or in order."""
Run = tuple[str, str]
"""A reader and how it reads."""


def take_turns(
    readers: dict[str, Read], samples: int, passes: int, repeats: int
) -> tuple[dict[Run, float], dict[Run, list[float]]]:
    """Median seconds of each reader for a turn of so many passes, by name and order, and its seconds of processor each turn."""
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        homes = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in readers}
        busy: dict[Run, list[float]] = {(name, how): [] for name in readers for how in ("in order", "shuffled")}

        def run(name: str, how: str) -> None:
            busy[name, how].append(homes[name].submit(count, readers[name], how == "shuffled", samples, passes).result())

        for name in readers:  # imports are no part of reading
            homes[name].submit(count, readers[name], False, samples, 1).result()
        return alternate({each: partial(run, *each) for each in busy}, repeats), busy


def write(folder: Path, peers: Iterable[str], samples: int, size: int) -> None:
    """The same samples as each reader wants them."""
    write_tars(folder / "tars", samples, size)
    if "MosaicML MDS" in peers:
        write_mosaic(folder / "mds", samples, size)
    if "litdata" in peers:
        write_litdata(folder / "litdata", samples, size)
    os.sync()  # else the kernel writes to the disk while the first ones read


def contents(samples: int, size: int) -> Iterator[bytes]:
    """The samples: bytes that no format can make smaller."""
    noise = np.random.default_rng(0)
    return (noise.bytes(size) for _ in range(samples))


def count(read: Read, shuffle: bool, expected: int, passes: int) -> float:
    """Seconds of processor to take all samples as decoders do, as bytes: some readers hand over views of files that nobody has read yet."""
    begin = time.process_time()
    for _ in range(passes):
        found = sum(1 for sample in read(shuffle) if bytes(sample))
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


def ours(folder: Path, batch: int, shuffle: bool) -> Iterator[bytes]:
    """This project: a pass in order, or an epoch of training."""
    shards = ShardSet.open(folder / "tars")
    if not shuffle:
        yield from chain.from_iterable(map(itemgetter("bin"), one_pass(shards, raw, batch)))  # holds one batch at a time
        return
    batches = ClipStream(shards, raw, batch_size=batch).batches()
    for _ in range(len(shards) // batch):
        yield from next(batches)["bin"]


def webdataset(folder: Path, shuffle: bool) -> Iterator[bytes]:
    """webdataset over the same tars, with its usual buffer of 1000 samples where it shuffles."""
    from webdataset import WebDataset

    urls = sorted(map(str, (folder / "tars").glob("*.tar")))
    data = WebDataset(urls, shardshuffle=SHARDS if shuffle else False, empty_check=False)
    return (sample["bin"] for sample in (data.shuffle(1000) if shuffle else data))


def write_mosaic(folder: Path, samples: int, size: int) -> None:
    """Shards of 64 MB."""
    _without_torchvision()
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"bin": "bytes"}) as writer:
        for sample in contents(samples, size):
            writer.write({"bin": sample})


def mosaic(folder: Path, shuffle: bool) -> Iterator[bytes]:
    """MosaicML streaming over its own shards, already local."""
    _without_torchvision()
    from streaming import StreamingDataset

    return (sample["bin"] for sample in StreamingDataset(local=str(folder / "mds"), batch_size=1, shuffle=shuffle))


def _without_torchvision() -> None:
    """MosaicML's data sets of pictures import torchvision, whose build on PyPI does not load beside a CPU build of torch."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.VisionDataset = module.to_tensor = object


def write_litdata(folder: Path, samples: int, size: int) -> None:
    """Chunks of 64 MB."""
    from litdata.streaming.writer import BinaryWriter

    os.makedirs(folder)
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, sample in enumerate(contents(samples, size)):
        writer.add_item(number, sample)
    writer.done()
    writer.merge()


def litdata(folder: Path, shuffle: bool) -> Iterator[bytes]:
    """litdata over its own chunks."""
    from litdata import StreamingDataset

    return iter(StreamingDataset(str(folder / "litdata"), shuffle=shuffle))


READERS = {"webdataset": webdataset, "MosaicML MDS": mosaic, "litdata": litdata}


if __name__ == "__main__":
    main()
