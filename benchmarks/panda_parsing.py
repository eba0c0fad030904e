"""Reading Panda-70M's lists against the plain way: `csv.DictReader` and `ast.literal_eval`, giving the same clips.

`python -m benchmarks.panda_parsing [ROWS]`
"""

from __future__ import annotations

import ast
import csv
import random
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import alternate, machine, show
from data_prep.manifest import ManifestRow
from data_prep.readers.panda70m import read_panda70m
from data_prep.readers.panda_clips import plain_entries

_LISTS = ("timestamp", "caption", "matching_score", "desirable_filtering", "shot_boundary_detection")
_WORDS = ("a", "the", "man", "woman", "dog", "picture", "street", "is", "standing", "talking", "next to", "in", "on", "wheel chair")
_CLASSES = ("desirable",) * 7 + ("0_low_desirable_score", "1_still_foreground_image", "2_tiny_camera_movement")


def main():
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        results = [_compare(Path(folder) / f"{clips}.csv", rows, clips) for clips in (3, 19)]
    title = "Lists of Panda-70M on one core: the lists alone, and the whole reader from a file to manifest rows"
    header = ["clips a video", "literal_eval, videos/s", "ours", "times", "DictReader + literal_eval, videos/s", "ours", "times"]
    show(title, header, results)


def _compare(path: Path, rows: int, clips: int) -> list[object]:
    rows = rows * 3 // clips
    _write(path, rows, clips)
    with open(path, newline="") as file:
        table = list(csv.DictReader(file))
    if list(_plain(path)) != list(read_panda70m(path)):
        raise SystemExit("the two readers give different clips")
    # Nothing is kept, as nothing is where rows go straight to a manifest.
    seconds = alternate({
        "literal_eval": lambda: deque((ast.literal_eval(line[name]) for line in table for name in _LISTS), maxlen=0),
        "lists": lambda: deque((plain_entries(*(line[name] for name in _LISTS)) for line in table), maxlen=0),
        "plain": lambda: deque(_plain(path), maxlen=0),
        "reader": lambda: deque(read_panda70m(path), maxlen=0),
    }, repeats=15)  # fmt: skip
    speed = {name: round(rows / value) for name, value in seconds.items()}
    lists, reader = speed["lists"] / speed["literal_eval"], speed["reader"] / speed["plain"]
    return [clips, speed["literal_eval"], speed["lists"], lists, speed["plain"], speed["reader"], reader]


def _plain(path: Path) -> Iterator[ManifestRow]:
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            video = line["videoID"]
            lists = [ast.literal_eval(line[name]) for name in _LISTS]
            for index, ((start, end), caption, score, desirable, shots) in enumerate(zip(*lists, strict=True)):
                begin = _seconds(start)
                yield ManifestRow(
                    key=f"panda70m_{video}_{round(begin * 1000)}",
                    dataset="panda70m",
                    source=f"https://www.youtube.com/watch?v={video}",
                    start=begin,
                    end=_seconds(end),
                    caption=caption,
                    extra={
                        "video_id": video,
                        "clip": index,
                        "matching_score": score,
                        "desirable": desirable,
                        "shots": [[_seconds(first), _seconds(last)] for first, last in shots],
                    },
                )


def _seconds(time: str) -> float:
    hours, minutes, seconds = time.split(":")
    return round(3600 * int(hours) + 60 * int(minutes) + float(seconds), 3)


def _write(path: Path, rows: int, clips: int):
    """Rows in the list's format, with sentences of its length, one in twenty with an apostrophe, and times of frames."""
    random.seed(clips)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["videoID", "url", *_LISTS])
        for number in range(rows):
            video = f"{number:011d}"
            lists = [repr(list(column)) for column in zip(*_clips(clips), strict=True)]
            table.writerow([video, f"https://www.youtube.com/watch?v={video}", *lists])


def _clips(count: int) -> Iterator[tuple[object, ...]]:
    end = 0
    for _ in range(count):
        start = end + random.randrange(600)
        end = start + random.randrange(60, 480)
        caption = " ".join(random.choices(_WORDS, k=11)) + (" of a man's house" if random.random() < 0.05 else ".")
        shots = [[_time(0), _time(end - start)]]
        yield [_time(start), _time(end)], caption, random.randrange(2500, 4500) / 8192, random.choice(_CLASSES), shots


def _time(frame: int) -> str:
    value = frame * 1000 // 30
    return f"{value // 3600000}:{value // 60000 % 60:02d}:{value // 1000 % 60:02d}.{value % 1000:03d}"


if __name__ == "__main__":
    main()
