import json

import fsspec
import pytest

from data_prep.readers.audioset import read_audioset
from data_prep.readers.ontology import Classes
from data_prep.readers.rejects import ReaderError, Rejects

HEAD = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids={}, num_segs={}, num_unique_labels={}, num_positive_labels={}
# YTID, start_seconds, end_seconds, positive_labels
"""
ROWS = """\
--4gqARaEJE, 0.000, 10.000, "/m/0bt9lr,/m/0jbk"
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
-0FxXzkyO9U, 21.500, 28.250, "/m/05zppz"
"""
LABELS = """\
index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
72,/m/0jbk,"Animal"
74,/m/0bt9lr,"Dog"
506,/t/dd00088,"Gush"
"""
ONTOLOGY = [
    {"id": "/m/0dgw9r", "name": "Human sounds", "child_ids": ["/m/09l8g"], "restrictions": ["abstract"]},
    {"id": "/m/09l8g", "name": "Human voice", "child_ids": ["/m/09x0r"], "restrictions": ["abstract"]},
    {"id": "/m/09x0r", "name": "Speech", "child_ids": ["/m/05zppz"], "restrictions": []},
    {"id": "/m/05zppz", "name": "Male speech, man speaking", "child_ids": [], "restrictions": []},
    {"id": "/m/0jbk", "name": "Animal", "child_ids": ["/m/068hy", "/m/wild"], "restrictions": []},
    {"id": "/m/068hy", "name": "Domestic animals, pets", "child_ids": ["/m/0bt9lr"], "restrictions": []},
    {"id": "/m/wild", "name": "Wild animals", "child_ids": ["/m/0bt9lr"], "restrictions": []},
    {"id": "/m/0bt9lr", "name": "Dog", "child_ids": [], "restrictions": []},
    {"id": "/t/dd00088", "name": "Gush", "child_ids": [], "restrictions": []},
]  # fmt: skip


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "labels.csv").write_text(LABELS)
    (tmp_path / "ontology.json").write_text(json.dumps(ONTOLOGY))
    (tmp_path / "balanced_train_segments.csv").write_text(HEAD.format(3, 3, 5, 5) + ROWS)
    (tmp_path / "eval_segments.csv").write_text(HEAD.format(1, 1, 1, 1) + 'ZZcYPEkYDkY, 0.000, 6.000, "/m/0jbk"\n')
    return tmp_path


def read(lists, name="balanced_train_segments.csv", **options):
    return list(read_audioset(lists / name, **{"labels": lists / "labels.csv"} | options))


def test_segments_of_the_published_lists(lists):
    rows = list(read_audioset([lists / "balanced_train_segments.csv", str(lists / "eval_segments.csv")], lists / "labels.csv"))
    assert [(row.key, row.split, row.start, row.end, row.labels) for row in rows] == [
        ("audioset_--4gqARaEJE_0", "train", 0.0, 10.0, ["Dog", "Animal"]),
        ("audioset_--PJHxphWEs_30000", "train", 30.0, 40.0, ["Speech", "Gush"]),
        ("audioset_-0FxXzkyO9U_21500", "train", 21.5, 28.25, ["Male speech, man speaking"]),
        ("audioset_ZZcYPEkYDkY_0", "test", 0.0, 6.0, ["Animal"]),
    ]
    assert rows[1].extra == {"video_id": "--PJHxphWEs", "label_ids": ["/m/09x0r", "/t/dd00088"]}
    assert rows[1].source == "https://www.youtube.com/watch?v=--PJHxphWEs" and rows[1].dataset == "audioset"


def test_splits(lists):
    assert {row.split for row in read(lists, split="heldout")} == {"heldout"}
    (lists / "part.csv").write_text(ROWS)
    with pytest.raises(ReaderError, match="part.csv: the name .* --split"):
        read(lists, "part.csv")
    assert len(read(lists, "part.csv", split="train")) == 3


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("-0FxXzkyO9U_21500_28250.mp4", 0.0, 6.75), ("Y-0FxXzkyO9U.mp4", 0.0, 6.75), ("-0FxXzkyO9U.mkv", 21.5, 28.25),
     ("balanced_train_segments/-0FxXzkyO9U_000021.mp4", 0.0, 6.75), ("balanced_train_segments/-0FxXzkyO9U.mp4", 21.5, 28.25)],
)  # fmt: skip
def test_media_by_the_customs_in_use(lists, name, start, end):
    root = f"memory://{lists.name}"
    fsspec.filesystem("memory").pipe_file(f"/{lists.name}/{name}", b"")
    row = read(lists, media=root)[2]
    assert (row.source, row.start, row.end) == (f"{root}/{name}", start, end)


def test_names_from_the_ontology(lists):
    rows = read(lists, labels=None, ontology=lists / "ontology.json")
    assert [row.labels for row in rows] == [row.labels for row in read(lists)]
    with pytest.raises(ReaderError, match="--labels"):
        read(lists, labels=None)


def test_ancestors(lists):
    rows = read(lists, ontology=lists / "ontology.json", ancestors=True)
    assert [row.labels for row in rows] == [
        ["Dog", "Animal", "Domestic animals, pets", "Wild animals"],
        ["Speech", "Gush", "Human voice", "Human sounds"],
        ["Male speech, man speaking", "Speech", "Human voice", "Human sounds"],
    ]
    assert rows[2].extra["label_ids"] == ["/m/05zppz"]
    with pytest.raises(ReaderError, match="--ontology"):
        read(lists, ancestors=True)


def test_a_circle_in_the_ontology_ends():
    assert Classes({}, {"a": ["b"], "b": ["c"], "c": ["a"]}).with_ancestors(["a"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("counts", "complaint"),
    [((4, 4, 5, 5), "num_segs=4, its rows make 3:"), ((2, 3, 5, 5), "num_ytids=2, its rows make 3:"),
     ((3, 3, 6, 5), "num_unique_labels=6, its rows make 5:"), ((3, 3, 5, 4), "num_positive_labels=4, its rows make 5:")],
)  # fmt: skip
def test_counts_in_the_head_are_checked(lists, counts, complaint):
    (lists / "balanced_train_segments.csv").write_text(HEAD.format(*counts) + ROWS)
    with pytest.raises(ReaderError, match=f"balanced_train_segments.csv: its head states {complaint} .* delete the line"):
        read(lists)


def test_lists_without_counts_are_not_checked(lists):
    (lists / "eval_segments.csv").write_text("YTID, start_seconds, end_seconds, positive_labels\n" + ROWS.replace("--PJ", "Y--PJ"))
    assert [row.extra["video_id"] for row in read(lists, "eval_segments.csv")] == ["--4gqARaEJE", "--PJHxphWEs", "-0FxXzkyO9U"]


BAD = [
    ('--aE2O5G5WE, 0.000, 10.000, "/m/nowhere,/m/0jbk"', "no class has the id '/m/nowhere'"),
    ('--aE2O5G5WE, 0.000, 10.000, ""', "no class has the id ''"),
    ("--aE2O5G5WE, 0.000, 10.000, /m/09x0r,/t/dd00088", "5 cells"),
    ('--aE2O5G5WE, 10.000, 10.000, "/m/0jbk"', "start and end are '10.000' and '10.000'"),
    ('--aE2O5G5WE, zero, 10.000, "/m/0jbk"', "start and end are 'zero'"),
    ('--aE2O5G5WE, nan, inf, "/m/0jbk"', "start and end are 'nan'"),
    ('../../etc/passwd, 0.000, 10.000, "/m/0jbk"', "id '../../etc/passwd'"),
    ('--aE2O5G5WE, 0.000, 10.000, "/m/0jbk', "is no CSV row"),
]


def test_malformed_rows_are_set_aside_with_their_lines(lists):
    path, count = lists / "eval_segments.csv", 3 + len(BAD)
    path.write_text(HEAD.format(count, count, 7, 99) + "".join(f"{row}\n" for row, _ in BAD) + ROWS)
    rejects = Rejects(max_share=0.9)
    assert len(read(lists, "eval_segments.csv", rejects=rejects)) == 3
    assert rejects.rejected == len(BAD)
    for number, (line, (_, message)) in enumerate(zip(rejects.lines, BAD, strict=True), 4):
        assert line.startswith(f"{path}:{number}: {message}")
    path.write_text(path.read_text().replace(f"num_segs={count}", "num_segs=20"))
    with pytest.raises(ReaderError, match=rf"num_segs=20, its rows make {count} \({len(BAD)} of them set aside\)"):
        read(lists, "eval_segments.csv", rejects=Rejects(max_share=0.9))


@pytest.mark.parametrize(
    ("name", "text"),
    [("labels.csv", "mid,name\n/m/09x0r,Speech\n"), ("labels.csv", ""), ("labels.csv", "mid,display_name\n/m/09x0r,Male speech, man\n"),
     ("ontology.json", "{"), ("ontology.json", "[1]"), ("ontology.json", '[{"id": "/m/09x0r"}]')],
)  # fmt: skip
def test_other_class_lists_are_refused(lists, name, text):
    (lists / name).write_text(text)
    with pytest.raises(ReaderError, match=name):
        read(lists, ontology=lists / "ontology.json")
