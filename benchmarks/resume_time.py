"""How long a job takes to take up a checkpoint, at the world size that wrote it and at another, ours and DeepSpeed's.

    python -m benchmarks.resume_time [--folder DIR] [--width 768] [--layers 12] [--repeats 3]

One process takes up what one and what two have written. For the second DeepSpeed wants its files converted first
(ds_to_universal, run as its documentation says but in this process). Both start from a running engine, so that what a start costs anyway
is not counted; ours verifies every byte before it is used. The files lie in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoint_stall import Options, trained
from benchmarks.common import alternate, machine, show
from pipelines.engine.checkpoint import Checkpoints
from pipelines.engine.world import join_world

STEP = 3


def main() -> None:
    """Measure and print; as one rank of those that write, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        return write(arguments.write, arguments.width, arguments.layers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for size in (1, 2):
            launch(Path(folder) / str(size), size, arguments)
        seconds = measured(Path(folder), arguments)
    print(machine("torch", "deepspeed"))
    values = arguments.layers * arguments.width * (arguments.width + 1)
    show(f"Taking up {values / 1e6:.3g} M parameters, moments and one average in one process", ["checkpoint", "s"], list(seconds.items()))


def launch(folder: Path, size: int, arguments: argparse.Namespace) -> None:
    """Let `size` processes write both kinds of checkpoint."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", "-m",
               "benchmarks.resume_time", "--write", str(folder), "--width", str(arguments.width), "--layers", str(arguments.layers)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def write(folder: Path, width: int, layers: int) -> None:
    """Save a trained engine, ours and DeepSpeed's way."""
    world = join_world()
    engine, ema = trained(world, width, layers)
    Checkpoints(folder / "ours", world, Options(asynchronous_checkpoints=False)).save(STEP, engine, ema, {})
    engine.save_checkpoint(str(folder / "deepspeed"), tag="step", save_latest=False)


def measured(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of every way to take them up."""
    world = join_world()
    engine, ema = trained(world, arguments.width, arguments.layers)

    def ours(size: int) -> None:
        checkpoints = Checkpoints(folder / str(size) / "ours", world, Options(asynchronous_checkpoints=False))
        assert checkpoints.restore(engine, ema) == {"step": STEP}

    def deepspeeds() -> None:
        engine.load_checkpoint(str(folder / "1" / "deepspeed"), tag="step")

    def converted() -> None:
        universal = folder / "2" / "universal"
        shutil.rmtree(universal, ignore_errors=True)
        convert(folder / "2" / "deepspeed" / "step", universal / "step")
        engine._config.load_universal_checkpoint = True
        (universal / "latest_universal").write_text("step")
        engine.load_checkpoint(str(universal), tag="step")
        engine._config.load_universal_checkpoint = False

    return alternate({"ours, of 1 process": lambda: ours(1), "ours, of 2": lambda: ours(2), "DeepSpeed's, of 1": deepspeeds,
                      "DeepSpeed's, of 2, converted": converted}, arguments.repeats)


def convert(source: Path, target: Path) -> None:
    """DeepSpeed's universal checkpoint of a plain one, without its progress bars."""
    from deepspeed.checkpoint import ds_to_universal

    # One worker is this process: more are forked, and may wait for ever for a lock that one of torch's threads held at that moment.
    settings = argparse.Namespace(input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
                                  keep_temp_folder=False, strict=True, inject_missing_state=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)


if __name__ == "__main__":
    main()
