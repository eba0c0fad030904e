from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from data_prep.streaming.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    keep_freed_memory()
batch = [bytes([row]) * 400_000 for row in range(16)]
del batch
before = faults()
for _ in range(10):
    batch = [bytes([row]) * 400_000 for row in range(16)]
    del batch
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="an allocator of its own")
def test_a_batch_takes_the_memory_of_the_last_one():
    def faults(how):
        return int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True).stdout)

    assert faults("returned") > 10 * 16 * 50 and faults("kept") < 50
