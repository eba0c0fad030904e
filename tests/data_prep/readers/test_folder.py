import fsspec
import pytest

from data_prep.manifest import write_manifest
from data_prep.readers.folder import read_folder
from tests.fixtures.made_media import write_media


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_all_videos_in_order_of_their_names(tmp_path):
    touch(tmp_path, "b.MP4", "a/c.mov", "a/b.mkv", "a.webm", "notes.txt", ".hidden/x.mp4", "a/._b.mp4", "clip.tar", "z.ts")
    rows = list(read_folder(tmp_path))
    assert [row.source for row in rows] == [f"{tmp_path}/{name}" for name in ("a.webm", "a/b.mkv", "a/c.mov", "b.MP4", "z.ts")]
    assert [row.key for row in rows] == ["folder_a_0", "folder_a_b_0", "folder_a_c_0", "folder_b_0", "folder_z_0"]
    assert {(row.dataset, row.split, row.start, row.end, row.caption) for row in rows} == {("folder", "train", 0.0, None, "")}


def test_names_that_would_share_a_key_get_a_hash(tmp_path):
    touch(tmp_path, "a.b.mp4", "a/b.mp4", "a b.mov", "c.mp4", "-ü.mp4", "x" * 150 + ".mp4", "x" * 150 + ".mov", "C.mp4")
    rows = list(read_folder(tmp_path, dataset="my set"))
    keys = {row.source.removeprefix(f"{tmp_path}/"): row.key for row in rows}
    assert len(set(keys.values())) == 8 and keys["c.mp4"] == "my_set_c_0"
    assert all(keys[name].startswith("my_set_a_b-") for name in ("a.b.mp4", "a/b.mp4", "a b.mov"))
    assert [row.key for row in read_folder(tmp_path, dataset="my set")] == [row.key for row in rows]
    write_manifest(rows, tmp_path / "m.parquet")


def test_fsspec_url():
    memory = fsspec.filesystem("memory")
    for name in ("/videos/a.mp4", "/videos/deep/b.mp4"):
        memory.pipe_file(name, b"")
    assert [row.source for row in read_folder("memory://videos/")] == ["memory://videos/a.mp4", "memory://videos/deep/b.mp4"]


@pytest.mark.parametrize("root", ["nowhere", "."])
def test_folders_without_videos_are_refused(tmp_path, root):
    with pytest.raises(ValueError, match="no such folder" if root == "nowhere" else "no videos"):
        list(read_folder(tmp_path / root))


def test_heldout_takes_whole_files_and_stays_with_them(tmp_path):
    touch(tmp_path, *(f"{index:03d}.mp4" for index in range(200)))

    def away():
        return {row.source for row in read_folder(tmp_path, heldout=0.2) if row.split == "heldout"}

    before = away()
    assert 25 <= len(before) <= 55
    touch(tmp_path, *(f"new{index}.mp4" for index in range(50)))
    assert before == {source for source in away() if "new" not in source}


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_neither_split_is_empty(tmp_path, share, count):
    touch(tmp_path, *(f"{index}.mp4" for index in range(count)))
    assert {row.split for row in read_folder(tmp_path, heldout=share)} == ({"train"} if count == 1 else {"train", "heldout"})


def test_files_are_cut_into_consecutive_clips(tmp_path):
    write_media(tmp_path / "a.mp4", seconds=2.0, audio=None)
    (tmp_path / "broken.mp4").write_bytes(b"<html>")
    rows = list(read_folder(tmp_path, clip_seconds=0.8, min_seconds=0.4))
    assert [(row.key, row.start, row.end) for row in rows] == [
        ("folder_a_0", 0.0, 0.8),
        ("folder_a_800", 0.8, 1.6),
        ("folder_a_1600", 1.6, 2.0),
        ("folder_broken_0", 0.0, None),
    ]
    assert [row.end for row in read_folder(tmp_path, clip_seconds=0.8, min_seconds=0.5)] == [0.8, 1.6, None]
    assert [row.end for row in read_folder(tmp_path, clip_seconds=1.0)] == [1.0, 2.0, None]
    assert [(row.start, row.end) for row in read_folder(tmp_path, clip_seconds=3.0, min_seconds=2.5)] == [(0.0, None)] * 2
    splits = {(row.source, row.split) for row in read_folder(tmp_path, clip_seconds=0.4, min_seconds=0.1, heldout=0.5)}
    assert len(splits) == 2


def test_csv_says_which_files_and_what_of_them(tmp_path):
    touch(tmp_path, "a/one.mp4", "two.mov", "three.mp4")
    (tmp_path / "list.csv").write_text(
        "\ufeffName, label, caption, start, end, split, loudness\n"
        'a/one.mp4,dog; bark,"A dog, barking",1.5,4,,-20\n'
        "two,,,,,test,\n\n"
        "one.mp4,,,30,,,\n"
        "a/one,,,30,40,,\n",
        encoding="utf-8",
    )
    rows = list(read_folder(tmp_path, csv=tmp_path / "list.csv"))
    assert [(row.key, row.split, row.start, row.end, row.labels, row.caption) for row in rows] == [
        ("folder_a_one_1500", "train", 1.5, 4.0, ["dog", "bark"], "A dog, barking"),
        ("folder_two_0", "test", 0.0, None, [], ""),
        ("folder_a_one_30000", "train", 30.0, None, [], ""),
        ("folder_a_one_30000-2", "train", 30.0, 40.0, [], ""),
    ]
    assert rows[0].extra == {"loudness": "-20"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption\nx\n", "list.csv:1: the header must name one column 'name' or 'path', found caption"),
        ("", "list.csv:1: the header must name one column 'name' or 'path', found nothing"),
        ("name,path\na,b\n", "list.csv:1: the header"),
        ("name,start,start\na.mp4,1,2\n", "list.csv:1: more than one column for 'start'"),
        ("name\na.mp4\nb.mp4\n", "list.csv:3: 'b.mp4' is no video below the folder"),
        ("name\nsame\n", "list.csv:2: 'same' may be any of same.mp4, x/same.mp4; give the path"),
        ("name,start\na.mp4,soon\n", "list.csv:2: start 'soon' is no number of seconds"),
        ("name,end\na.mp4,-2\n", "list.csv:2: end '-2' is no number of seconds"),
        ("name,start\na.mp4,nan\n", "list.csv:2: start 'nan' is no number of seconds"),
        ("name,start,end\na.mp4,3,3\n", "list.csv:2: end 3 is not after start 3"),
        ("name,caption\na.mp4,one, two\n", "list.csv:2: 3 cells under a header of 2; quote texts that hold commas"),
    ],
)
def test_csv_that_does_not_fit_is_refused_with_its_line(tmp_path, text, message):
    touch(tmp_path, "a.mp4", "same.mp4", "x/same.mp4")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError) as caught:
        list(read_folder(tmp_path, csv=tmp_path / "list.csv"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"), [({"heldout": 1.0}, "heldout"), ({"clip_seconds": 0}, "clip_seconds"), ({"min_seconds": -1}, "min_seconds")]
)
def test_impossible_arguments_are_refused(tmp_path, arguments, field):
    with pytest.raises(ValueError, match=field):
        list(read_folder(tmp_path, **arguments))
