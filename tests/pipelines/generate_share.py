"""One of the processes that share the videos of a test: OUT VIDEO..., its part by RANK and WORLD_SIZE."""

import os
import sys
from pathlib import Path

from pipelines.generate import GenerateOptions, generate_files
from tests.fixtures.made_encoders import small_mmaudio

if __name__ == "__main__":
    share = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    generate_files(small_mmaudio(), [Path(path) for path in sys.argv[2:]], Path(sys.argv[1]), GenerateOptions(batch_size=1), share)
