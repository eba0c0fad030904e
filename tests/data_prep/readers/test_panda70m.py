"""Panda-70M's lists in their true format: every clip with its times, caption and score, and malformed ones set aside."""

import ast
import csv
import gzip
import math
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.readers import panda_clips
from data_prep.readers.panda70m import ClipChoice, read_panda70m
from data_prep.readers.rejects import ReaderError, Rejects

HEADER = "videoID,url,timestamp,caption,matching_score"
LATER = f"{HEADER},desirable_filtering,shot_boundary_detection"
# The first five cells of the first line are those of a line of the published list.
TIMES = "[['0:00:16.300', '0:00:32.566'], ['0:00:44.100', '0:00:49.066'], ['0:01:50.000', '0:01:58.833']]"
CAPTIONS = (
    "['A news anchor standing next to a picture of a dog in a wheel chair.', 'A man talking to a woman on fox news.', "
    "'A man in an orange shirt is working on a piece of wood.']"
)
SCORES = "[0.453857421875, 0.44873046875, 0.464111328125]"
CLASSES = "['desirable', '1_still_foreground_image', 'desirable']"
SHOTS = (
    "[[['0:00:00.000', '0:00:16.266']], [['0:00:00.000', '0:00:02.000'], ['0:00:02.000', '0:00:04.966']], "
    "['0:00:00.000', '0:00:08.833']]"
)
VIDEO = "---4IxR2xOg"


def line(video=VIDEO, times=TIMES, captions=CAPTIONS, scores=SCORES, *later):
    cells = [cell.replace('"', '""') for cell in (times, captions, scores, *later)]
    return f'{video},https://www.youtube.com/watch?v={video},"' + '","'.join(cells) + '"'


def write(path, *lines, header=HEADER):
    path.write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return path


def seconds(time):
    hours, minutes, rest = time.split(":")
    return round(int(hours) * 3600 + int(minutes) * 60 + float(rest), 3)


def written(milliseconds):
    return f"{milliseconds // 3600000}:{milliseconds // 60000 % 60:02d}:{milliseconds // 1000 % 60:02d}.{milliseconds % 1000:03d}"


def test_a_published_line(tmp_path):
    rows = list(read_panda70m(write(tmp_path / "list.csv", line()), split="val"))
    assert [(row.key, row.start, row.end, row.extra["matching_score"]) for row in rows] == [
        ("panda70m_---4IxR2xOg_16300", 16.3, 32.566, 0.453857421875),
        ("panda70m_---4IxR2xOg_44100", 44.1, 49.066, 0.44873046875),
        ("panda70m_---4IxR2xOg_110000", 110.0, 118.833, 0.464111328125),
    ]
    assert rows[1].caption == "A man talking to a woman on fox news."
    assert {(row.dataset, row.split, row.source) for row in rows} == {("panda70m", "val", f"https://www.youtube.com/watch?v={VIDEO}")}
    assert rows[2].extra == {"video_id": VIDEO, "clip": 2, "matching_score": 0.464111328125}


def test_classes_and_shots(tmp_path):
    rows = list(read_panda70m(write(tmp_path / "list.csv", line(VIDEO, TIMES, CAPTIONS, SCORES, CLASSES, SHOTS), header=LATER)))
    assert [row.extra["desirable"] for row in rows] == ["desirable", "1_still_foreground_image", "desirable"]
    assert [row.extra["shots"] for row in rows] == [[[0.0, 16.266]], [[0.0, 2.0], [2.0, 4.966]], [[0.0, 8.833]]]


def test_compressed_lists_and_columns_in_another_order(tmp_path):
    with gzip.open(tmp_path / "list.csv.gz", "wt") as file:
        file.write(f'caption,videoID,matching_score,timestamp\n"{CAPTIONS}",{VIDEO},"{SCORES}","{TIMES}"\n')
    assert [row.start for row in read_panda70m(tmp_path / "list.csv.gz")] == [16.3, 44.1, 110.0]


@pytest.mark.parametrize(
    ("choice", "clips"),
    [
        ({}, [0, 1, 2]),
        ({"min_score": 0.45}, [0, 2]),
        ({"classes": ("desirable",)}, [0, 2]),
        ({"classes": ("1_still_foreground_image", "desirable")}, [0, 1, 2]),
        ({"clips_per_video": 2}, [0, 2]),
        ({"clips_per_video": 1}, [2]),
        ({"clips_per_video": 1, "max_seconds": 8.0}, [1]),
        ({"min_seconds": 8.833}, [0, 2]),
        ({"min_seconds": 8.834}, [0]),
        ({"max_seconds": 4.966}, [1]),
        ({"min_score": 1.0}, []),
    ],
)
def test_choice_of_clips(tmp_path, choice, clips):
    path = write(tmp_path / "list.csv", line(VIDEO, TIMES, CAPTIONS, SCORES, CLASSES, SHOTS), header=LATER)
    assert [row.extra["clip"] for row in read_panda70m(path, choice=ClipChoice(**choice))] == clips


@pytest.mark.parametrize("choice", [{"clips_per_video": 0}, {"min_seconds": -1}, {"min_seconds": 2, "max_seconds": 2}])
def test_impossible_choices_are_refused(choice):
    with pytest.raises(ValueError, match=r"choose"):
        ClipChoice(**choice)


def test_classes_need_their_column(tmp_path):
    with pytest.raises(ReaderError, match="list.csv: no column 'desirable_filtering'"):
        list(read_panda70m(write(tmp_path / "list.csv", line()), choice=ClipChoice(classes=("desirable",))))


@pytest.mark.parametrize("header", ["", "a,b", f"{VIDEO},https://www.youtube.com/watch?v={VIDEO}"])
def test_another_header_is_refused(tmp_path, header):
    with pytest.raises(ReaderError, match="list.csv.*no column 'videoID'"):
        list(read_panda70m(write(tmp_path / "list.csv", header=header)))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([f"{VIDEO}.webm"], [(f"{VIDEO}.webm", 16.3, 32.566), (f"{VIDEO}.webm", 44.1, 49.066), (f"{VIDEO}.webm", 110.0, 118.833)]),
        (
            [f"{VIDEO}_{index:05d}.mp4" for index in range(3)],
            [(f"{VIDEO}_00000.mp4", 0, 16.266), (f"{VIDEO}_00001.mp4", 0, 4.966), (f"{VIDEO}_00002.mp4", 0, 8.833)],
        ),
        (
            [f"00001/0000101_{index:05d}.mp4" for index in range(3)],
            [("00001/0000101_00000.mp4", 0, 16.266), ("00001/0000101_00001.mp4", 0, 4.966), ("00001/0000101_00002.mp4", 0, 8.833)],
        ),
    ],
)
def test_media_by_the_customs_of_downloaders(tmp_path, names, found):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    others = [line(f"{number:011d}", "[]", "[]", "[]") for number in range(101)]
    rows = list(read_panda70m(write(tmp_path / "list.csv", *others, line()), tmp_path))
    assert [(row.source.removeprefix(f"{tmp_path}/"), row.start, row.end) for row in rows] == found
    assert rows[0].key == f"panda70m_{VIDEO}_16300"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line(captions="['one', 'two']"), "lists of 3, 2, 3 entries: each needs one per clip"),
        (line(captions=r"['\x1', 'b', 'c']"), "is no Python literal"),
        (line(captions="__import__('os').abort()"), "is no Python literal"),
        (line(scores="0.5"), "is no list"),
        (line(video="../../etc/x"), "videoID '../../etc/x' is not that of a video"),
        (line(video="/etc/passwd"), "videoID '/etc/passwd' is not that of a video"),
        (line(video="short"), "videoID 'short'"),
        (f"{VIDEO},only,three", "3 cells under a header of 5"),
        (line()[:-1], "is no CSV row"),
    ],
)
def test_malformed_lines_are_set_aside(tmp_path, bad, message):
    rejects = Rejects()
    rows = list(read_panda70m(write(tmp_path / "list.csv", line(), bad, line("abcdefghijk")), rejects=rejects))
    assert [row.extra["video_id"] for row in rows] == [VIDEO] * 3 + ["abcdefghijk"] * 3
    assert (rejects.accepted, rejects.rejected) == (6, 1)
    assert rejects.lines[0].startswith(f"{tmp_path}/list.csv:3: ") and message in rejects.lines[0]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"times": TIMES.replace("'0:00:49.066'", "'0:00:44.100'")}, "start and end are 44.1 and 44.1 s"),
        ({"times": TIMES.replace("0:00:49.066", "0:00:61.066")}, "time '0:00:61.066' is not of the form H:MM:SS.mmm"),
        ({"times": TIMES.replace("0:00:49.066", "-0:00:49.066")}, "time '-0:00:49.066'"),
        ({"times": TIMES.replace("'0:00:49.066'", "49.066")}, "time 49.066"),
        ({"times": TIMES.replace(", '0:00:49.066'", "")}, "['0:00:44.100'] is no pair of times"),
        ({"scores": "[0.5, True, 0.5]"}, "matching_score True is no number"),
        ({"captions": "['a', None, 'c']"}, "caption None is no text"),
        ({"scores": "[0.5, 'high', 0.5]"}, "matching_score 'high' is no number"),
        ({"scores": "[0.5, 1e999, 0.5]"}, "matching_score inf is no number"),
    ],
)
def test_malformed_clips_are_set_aside_alone(tmp_path, cells, message):
    rejects = Rejects()
    rows = list(read_panda70m(write(tmp_path / "list.csv", line(**cells)), rejects=rejects))
    assert [row.extra["clip"] for row in rows] == [0, 2]
    assert (rejects.accepted, rejects.rejected) == (2, 1)
    assert rejects.lines[0].startswith(f"{tmp_path}/list.csv:2: clip 1: ") and message in rejects.lines[0]


def test_too_many_malformed_lines_end_the_reading(tmp_path):
    with pytest.raises(ReaderError, match="set aside"):
        list(read_panda70m(write(tmp_path / "list.csv", *[line(scores="[]")] * 3, *[line()] * 40)))


def test_bytes_that_are_not_utf8_spoil_one_line(tmp_path):
    (tmp_path / "list.csv").write_bytes(f"{HEADER}\n{line('abcdefghijk')}\n".encode() + line(captions="['é', 'b', 'c']").encode("latin-1"))
    rejects = Rejects()
    assert len(list(read_panda70m(tmp_path / "list.csv", rejects=rejects))) == 3
    assert rejects.lines == [f"{tmp_path}/list.csv:3: holds bytes that are not UTF-8"]


def test_cells_beyond_the_limit_of_csv_leave_it_as_it_was(tmp_path):
    before, count = csv.field_size_limit(), 6000
    times = repr([[written(1000 * second), written(1000 * second + 999)] for second in range(count)])
    long = line("abcdefghijk", times, repr(["A long sentence about it"] * count), repr([0.5] * count))
    assert len(long) > 2 * before
    rows = list(read_panda70m(write(tmp_path / "list.csv", long, line())))
    assert len(rows) == count + 3 and rows[count - 1].end == 5999.999
    assert csv.field_size_limit() == before


def test_memory_does_not_grow_with_the_list(tmp_path):
    peaks = []
    for count in (300, 3000):
        path = write(tmp_path / f"{count}.csv", *(line(f"{number:011d}") for number in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in read_panda70m(path)) == 3 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


SPAN = st.tuples(st.integers(0, 99 * 3600000), st.integers(1, 60000)).map(lambda pair: [written(pair[0]), written(sum(pair))])
CLIP = st.tuples(SPAN, st.text(max_size=20), st.floats(0, 1), st.text(max_size=5), st.lists(SPAN, min_size=1, max_size=3))


@given(st.lists(CLIP, min_size=1, max_size=5))
def test_the_short_cut_agrees_with_literal_eval(clips):
    cells = [repr(list(column)) for column in zip(*clips, strict=True)]
    rows, faults = panda_clips.parse_clips(VIDEO, "train", cells)
    assert (rows, faults) == panda_clips._unusual_clips(VIDEO, "train", cells)
    spans, captions, scores, classes, shots = map(ast.literal_eval, cells)
    assert not faults and [(row.start, row.end) for row in rows] == [(seconds(start), seconds(end)) for start, end in spans]
    assert [row.caption for row in rows] == captions
    assert [(row.extra["matching_score"], row.extra["desirable"]) for row in rows] == list(zip(scores, classes, strict=True))
    assert [row.extra["shots"] for row in rows] == [[[seconds(start), seconds(end)] for start, end in clip] for clip in shots]
    assert all(math.isclose(row.start * 1000, int(row.key.rpartition("_")[2])) for row in rows)


@given(st.text(st.sampled_from("[]', \"0:.1"), max_size=60))
@example("0:00:01.000', '0:00:02.000'], ['0:00:03.000', '0:00:04.000")
@example("0:00:01.000', '0:00:02.000']], [['0:00:03.000', '0:00:04.000")
@example("0:00:01.000'], ['0:00:02.000', '0:00:03.000', '0:00:04.000")
def test_no_other_text_takes_the_short_cut(text):
    others = "['a']", "[1]", None
    for lists in ((f"[['{text}']]", *others, None), ("[['0:00:00.000', '0:00:00.001']]", *others, f"[[['{text}']]]")):
        try:
            panda_clips.plain_entries(*lists)
        except (KeyError, ValueError):
            continue
        assert panda_clips.parse_clips(VIDEO, "train", lists) == panda_clips._unusual_clips(VIDEO, "train", lists)


@pytest.mark.parametrize("end", ["']", "]]", "'))", "'] ]", '"]]'])
def test_lists_that_end_otherwise_take_no_short_cut(end):
    with pytest.raises((KeyError, ValueError)):
        panda_clips.plain_entries(f"[['0:00:01.000', '0:00:02.000{end}", "['a']", "[1]", None, None)
    with pytest.raises((KeyError, ValueError)):
        panda_clips.plain_entries("[['0:00:01.000', '0:00:02.000']]", "['a']", "[1]", None, f"[[['0:00:01.000', '0:00:02.000{end}")
