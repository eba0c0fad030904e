import csv
import io
import json

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.manifest import write_manifest
from data_prep.readers.rejects import ReaderError, Rejects
from data_prep.readers.vggsound import read_vggsound, read_vggss

LIST = """\
---g-f_I2yQ,1,people marching,test
--0PQM4-hqg,30,waterfall burbling,train
--9O4XZOge4,30,"female speech, woman speaking",train
-0dzLw4NyrM,596,playing didgeridoo,train
"""
BOXES = [
    {"file": "ORaz32CQ29k_000130", "class": "coyote howling", "bbox": [[0.121875, 0.171875, 0.6, 0.853125], [0.7, 0, 1.0, 0.5]]},
    {"file": "-oSzD8P2BtU_000030", "class": "reversing beeps", "bbox": [[0.471875, 0.303125, 0.971875, 0.66875]]},
    {"file": "bl5PHVntD70_000009", "class": "fly, housefly buzzing", "bbox": [[0.421875, 0.015625, 0.95625, 0.784375]]},
]


@pytest.fixture
def write(tmp_path):
    def write(text, name="vggsound.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return write


def test_clips_of_the_published_list(write, tmp_path):
    rows = list(read_vggsound(write(LIST)))
    assert [(row.key, row.split, row.labels, row.start, row.end) for row in rows] == [
        ("vggsound_---g-f_I2yQ_1000", "test", ["people marching"], 1.0, 11.0),
        ("vggsound_--0PQM4-hqg_30000", "train", ["waterfall burbling"], 30.0, 40.0),
        ("vggsound_--9O4XZOge4_30000", "train", ["female speech, woman speaking"], 30.0, 40.0),
        ("vggsound_-0dzLw4NyrM_596000", "train", ["playing didgeridoo"], 596.0, 606.0),
    ]
    assert rows[0].source == "https://www.youtube.com/watch?v=---g-f_I2yQ"
    assert {row.dataset for row in rows} == {"vggsound"} and rows[0].extra == {"video_id": "---g-f_I2yQ"}
    assert write_manifest(rows, tmp_path / "m.parquet") == 4


@pytest.mark.parametrize("folder", ["", "video/", "train/"])
def test_cut_files_begin_at_zero(write, tmp_path, folder):
    (tmp_path / "media" / folder).mkdir(parents=True)
    (tmp_path / "media" / folder / "--0PQM4-hqg_000030.mp4").touch()
    row = list(read_vggsound(write(LIST), tmp_path / "media"))[1]
    assert (row.source, row.start, row.end) == (f"{tmp_path}/media/{folder}--0PQM4-hqg_000030.mp4", 0.0, 10.0)


def test_whole_videos_are_cut_by_time(write):
    fsspec.filesystem("memory").pipe_file("/videos/-0dzLw4NyrM.webm", b"")
    rows = list(read_vggsound(write(LIST), "memory://videos/"))
    assert (rows[3].source, rows[3].start, rows[3].end) == ("memory://videos/-0dzLw4NyrM.webm", 596.0, 606.0)
    with pytest.raises(ReaderError, match="none of the first 4 rows"):
        list(read_vggsound(write(LIST), "memory://videos/", patterns=["{id}.mp4"]))


@pytest.mark.parametrize(
    "header",
    ["# YouTube ID,start seconds,label,train/test split", "youtube_id,start_seconds,label,split", "video_title,start,label,set"],
)
def test_an_added_header_costs_no_row(write, header):
    rejects = Rejects()
    assert len(list(read_vggsound(write(f"\ufeff{header}\n{LIST}"), rejects=rejects))) == 4
    assert rejects.rejected == 0


def test_malformed_rows_are_set_aside_with_their_lines(write):
    bad = [
        "--0PQM4-hqg,30,waterfall burbling", "--0PQM4-hqg,30,bird chirping, tweeting,train", "--0PQM4-hqg,thirty,waterfall,train",
        "--0PQM4-hqg,30.5,waterfall,train", "--0PQM4-hqg,-3,waterfall,train", "../../etc/passwd,30,waterfall,train",
        "--0PQM4-hq,30,waterfall,train", "--0PQM4-hqg,30,waterfall,valid", '--0PQM4-hqg,30," ",train', '--0PQM4-hqg,30,"waterfall,train',
        "--0PQM4-hqg,99999999999999999999,waterfall,train",
    ]  # fmt: skip
    path, rejects = write(LIST + "\n" + "\n".join(bad) + "\n" + LIST), Rejects(max_share=0.9)
    assert [row.key for row in read_vggsound(path, rejects=rejects)] == 2 * [
        "vggsound_---g-f_I2yQ_1000", "vggsound_--0PQM4-hqg_30000", "vggsound_--9O4XZOge4_30000", "vggsound_-0dzLw4NyrM_596000",
    ]  # fmt: skip
    assert [line.split(": ")[0] for line in rejects.lines] == [f"{path}:{number}" for number in range(6, 17)]
    assert [line.split(": ", 1)[1].split(":")[0].split(" ")[0] for line in rejects.lines] == [
        "3", "5", "start", "start", "start", "id", "id", "split", "the", "is", "start",
    ]  # fmt: skip


def test_a_malformed_first_row_is_no_header(write):
    rejects = Rejects()
    assert len(list(read_vggsound(write("--0PQM4-hqg,thirty,waterfall,train\n" + LIST), rejects=rejects))) == 4
    assert rejects.lines[0].startswith(f"{write(LIST)}:1: start 'thirty'")


def test_another_file_is_refused(write):
    with pytest.raises(ReaderError, match="a.csv:1: .* cells.*no row is well-formed"):
        list(read_vggsound(write("videoID,url,timestamp\n", "a.csv")))


def test_too_many_malformed_rows_end_the_reading(write):
    path = write(LIST * 25 + "x\n" * 2)
    with pytest.raises(ReaderError, match="2 of 102 rows set aside, the first: .*:101: 1 cells.*more than 1 %"):
        list(read_vggsound(path))


def test_repeated_clips_are_passed_on(write):
    keys = [row.key for row in read_vggsound(write(LIST + LIST))]
    assert len(keys) == 8 and len(set(keys)) == 4


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), min_size=1).filter(str.strip))
def test_any_label_survives(label):
    text = io.StringIO(newline="")
    csv.writer(text).writerow(["--0PQM4-hqg", 30, label, "train"])
    fsspec.filesystem("memory").pipe_file("/lists/any.csv", text.getvalue().encode())
    assert [row.labels for row in read_vggsound("memory://lists/any.csv")] == [[label.strip()]]


def test_boxes_of_vggss(write, tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/bl5PHVntD70_000009.mp4").touch()
    rows = list(read_vggss(write(json.dumps(BOXES), "vggss.json"), tmp_path / "media"))
    assert [(row.key, row.dataset, row.split, row.labels) for row in rows] == [
        ("vggss_ORaz32CQ29k_130000", "vggss", "test", ["coyote howling"]),
        ("vggss_-oSzD8P2BtU_30000", "vggss", "test", ["reversing beeps"]),
        ("vggss_bl5PHVntD70_9000", "vggss", "test", ["fly, housefly buzzing"]),
    ]
    assert (rows[0].source, rows[0].start, rows[0].end) == (f"{tmp_path}/media/ORaz32CQ29k_000130.mp4", 0.0, 10.0)
    assert [row.extra for row in rows] == [{"video_id": item["file"][:11], "bbox": item["bbox"]} for item in BOXES]


def test_malformed_objects_are_set_aside_with_their_numbers(write):
    bad = [
        {"class": "a", "bbox": []}, {"file": "ORaz32CQ29k", "class": "a"}, {"file": "../z32CQ29k_000130", "class": "a"},
        "ORaz32CQ29k_000130", {"file": "ORaz32CQ29k_000130", "class": ""},
        {"file": "ORaz32CQ29k_000130", "class": "a", "bbox": [[0, 0, "1", 1]]},
    ]  # fmt: skip
    path, rejects = write(json.dumps([*BOXES, *bad]), "vggss.json"), Rejects(max_share=0.9)
    assert len(list(read_vggss(path, rejects=rejects))) == 3
    assert [line.split(": ")[0] for line in rejects.lines] == [f"{path}[{number}]" for number in range(3, 9)]


@pytest.mark.parametrize("text", ['[{"file": "ORaz32', '{"file": "ORaz32CQ29k_000130"}', "\xff"])
def test_other_json_is_refused(write, text):
    with pytest.raises(ReaderError, match="vggss.json: "):
        list(read_vggss(write(text.encode("latin-1"), "vggss.json")))


def test_vggss_can_be_a_training_set(tmp_path):
    (tmp_path / "vggss.json").write_text('[{"file": "---g-f_I2yQ_000001", "class": "people marching", "bbox": []}]')
    assert [row.split for row in read_vggss(tmp_path / "vggss.json", split="train")] == ["train"]
