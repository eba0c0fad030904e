"""One of the processes that make shards together, one of which gets into trouble: FOLDER fail|hang, its rank from the environment."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.shards import ShardWriter
from data_prep.stream import Batch
from pipelines.config import Recipe, TrainConfig
from pipelines.engine.world import join_world
from pipelines.folders import StageFolders
from pipelines.sharing import Work, make_shards
from tests.fixtures.made_shards import DECODE, write


def main(folder: Path, trouble: str) -> None:
    world = join_world()
    source = write(folder / f"in-{world.rank}")

    def write_shard(writer: ShardWriter, batches: Iterator[Batch]) -> None:
        if world.rank == 1 and trouble == "fail":
            raise ValueError("clip-9 is not to my taste")
        if world.rank == 1 and trouble == "hang":
            time.sleep(1000)
        for batch in batches:
            for key in batch["key"]:
                writer.add(key, {"made.npy": b"x"})

    folders = StageFolders(Recipe(out=str(folder), name="run"), world)
    with folders.watched("features", TrainConfig(hang_seconds=15)):
        make_shards(source, folder / "run" / "features" / "shards", world, "features", {}, lambda: Work(DECODE, 4, write_shard))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
