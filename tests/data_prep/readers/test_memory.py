import gzip
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys
from pathlib import Path
from data_prep.readers.audioset import read_audioset
from data_prep.readers.vggsound import read_vggsound

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))

reader, count, *files = sys.argv[1:]
rows = {"vggsound": read_vggsound, "audioset": read_audioset}[reader](*files)
for _ in range(1000):
    next(rows)
before = peak()
assert 1000 + sum(1 for _ in rows) == int(count)
print(peak() - before)
"""


def vggsound(folder, rows):
    lines = (f'{index:011d},{index % 600},"bird chirping, tweeting",train\n' for index in range(rows))
    (folder / "vggsound.csv.gz").write_bytes(gzip.compress("".join(lines).encode(), 1))
    return [folder / "vggsound.csv.gz"]


def audioset(folder, rows):
    (folder / "labels.csv").write_text('index,mid,display_name\n0,/m/09x0r,"Speech"\n')
    lines = (f'{index:011d}, {index % 600}.000, {index % 600 + 10}.000, "/m/09x0r"\n' for index in range(rows))
    head = f"# num_ytids={rows}, num_segs={rows}, num_unique_labels=1, num_positive_labels={rows}\n"
    (folder / "unbalanced_train_segments.csv").write_text(head + "".join(lines))
    return [folder / "unbalanced_train_segments.csv", folder / "labels.csv"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is asked of Linux")
@pytest.mark.parametrize(("make", "rows"), [(vggsound, 200_000), (audioset, 100_000)])
def test_memory_stays_flat(tmp_path, make, rows):
    command = [sys.executable, "-c", MEASURE, make.__name__, str(rows), *map(str, make(tmp_path, rows))]
    kilobytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert kilobytes < 4096  # the rows alone, kept, would be tens of megabytes
