"""What a restart and a long run cost: the first batch at 90 % of an epoch, the order of 100 million clips, memory over 20,000 samples.

    pip install webdataset
    python -m benchmarks.stream_resume [--folder DIR] [--samples 40960] [--kb 25] [--repeats 5]

Both readers start anew and give the first batch of 16 behind 90 % of the samples: webdataset, over the same tars, has to read up to
there, which takes longer the larger the set is (VGGSound has 180,000 clips); this project computes the place. The bytes lie in the
page cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common import alternate, machine, show
from data_prep.index import ShardSet, build_index
from data_prep.order import Order
from data_prep.shards import ShardWriter
from data_prep.stream import ClipStream

SHARDS, BATCH = 256, 16


def main() -> None:
    """Measure and print all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--samples", type=int, default=40960)
    parser.add_argument("--kb", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    installed = importlib.util.find_spec("webdataset") is not None
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        shards = write(Path(folder), arguments.samples, arguments.kb * 1000)
        skip = round(0.9 * arguments.samples / BATCH) * BATCH
        runs = {"foleyscale": lambda: seek(shards, skip)} | ({"webdataset, skipping": lambda: skipping(shards, skip)} if installed else {})
        seconds = alternate(runs, arguments.repeats)
        growth = memory(shards, arguments.samples)
    print(machine("torch", *(["webdataset"] if installed else [])))
    rows = [[name, 1000 * value, value / seconds["foleyscale"]] for name, value in seconds.items()]
    show(f"First batch behind {skip:,} of {arguments.samples:,} samples of {arguments.kb} KB", ["reader", "ms", "times ours"], rows)
    show("The order of 100 million clips in 300,000 shards", ["what", "value", "unit"], order_costs())
    rows = [[f"{number:,}", *values] for number, values in growth.items()]
    show("Memory of a run with 2 workers", ["samples", "MB of this process", "MB of the workers"], rows)


def raw(members, entry, random):
    """A decoder that leaves the bytes as they are."""
    return {"bin": members["bin"]}


raw.members = ("bin",)


def write(folder: Path, samples: int, size: int) -> ShardSet:
    """Shards of random bytes."""
    noise = np.random.default_rng(0)
    for shard in range(SHARDS):
        with ShardWriter(folder, shard) as writer:
            for row in range(shard * samples // SHARDS, (shard + 1) * samples // SHARDS):
                writer.add(f"clip-{row}", {"bin": noise.bytes(size)})
    return build_index(folder, {})


def seek(shards: ShardSet, position: int) -> None:
    """This project: open the set, load the state, take a batch."""
    stream = ClipStream(ShardSet.open(shards.url), raw, batch_size=BATCH)
    stream.load_state_dict(stream.state_dict() | {"position": position})
    batch = next(stream.batches())
    if batch["position"].tolist() != list(range(position, position + BATCH)):
        raise RuntimeError("another batch came")


def skipping(shards: ShardSet, position: int) -> None:
    """webdataset: read on until the place is reached."""
    import webdataset

    data = iter(webdataset.WebDataset(sorted(map(str, Path(shards.url).glob("*.tar"))), shardshuffle=False, empty_check=False))
    batch = list(itertools.islice(data, position, position + BATCH))
    if len(batch) != BATCH:
        raise RuntimeError("another batch came")


def order_costs() -> list[list[object]]:
    """Building the order, one position after a seek, and the next ones."""
    counts = np.random.default_rng(0).integers(200, 467, 300_000)
    order, build = timed(lambda: Order([counts], seed=1))
    start = round(0.9 * len(order))
    _, first = timed(lambda: order.locate(start))
    _, following = timed(lambda: [order.locate(start + number) for number in range(20_000)])
    return [["built", 1000 * build, "ms"], ["first position after a seek", 1e6 * first, "us"],
            ["each of the next 20,000", 1e6 * following / 20_000, "us"], ["pickled", len(pickle.dumps(order)) / 1e6, "MB"]]  # fmt: skip


def timed(run: Callable[[], object]) -> tuple[object, float]:
    """The result and the seconds it took."""
    begin = time.perf_counter()
    return run(), time.perf_counter() - begin


def memory(shards: ShardSet, samples: int) -> dict[int, tuple[float, float]]:
    """Resident MB of this process and of its workers, at the first quarter and at each after it."""
    stream, found = ClipStream(shards, raw, batch_size=BATCH), {}
    batches = stream.batches(workers=2)
    for number in range(1, samples // BATCH + 1):
        next(batches)
        if number % (samples // BATCH // 4) == 0:
            found[number * BATCH] = own_mb(os.getpid()), sum(map(own_mb, children()))
    batches.close()
    return found


def own_mb(pid: int) -> float:
    """Memory that a process shares with no other, MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def children() -> list[int]:
    """Processes that this one started."""
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


if __name__ == "__main__":
    main()
