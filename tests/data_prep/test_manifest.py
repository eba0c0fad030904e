import math
import tempfile
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.manifest import LONGEST_KEY, SCHEMA, Manifest, ManifestRow, make_key, read_manifest, write_manifest

ROWS = [
    ManifestRow(key="a-1", dataset="d", source="x/a.mp4", start=1.5, end=4.0, labels=["dog", "bark, loud"], caption="Ein Hund: „wau“"),
    ManifestRow(key="_b", dataset="d", split="heldout", source="s3://bucket/b.mp4", extra={"score": 0.43, "kinds": ["still"]}),
]


def test_rows_come_back_as_written(tmp_path):
    assert write_manifest(iter(ROWS), tmp_path / "m.parquet") == 2
    assert read_manifest(tmp_path / "m.parquet") == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


def test_columns_are_those_of_the_plan(tmp_path):
    write_manifest(ROWS, tmp_path / "m.parquet")
    table = pq.read_table(tmp_path / "m.parquet")
    assert table.column_names == ["key", "dataset", "split", "source", "start", "end", "labels", "caption", "extra"]
    assert table["end"].to_pylist() == [4.0, None]
    assert table["extra"].to_pylist() == ["{}", '{"kinds": ["still"], "score": 0.43}']


def test_local_name_and_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("m.parquet", "deep/er/m.parquet", "memory://manifests/m.parquet"):
        assert write_manifest(ROWS, url) == 2 and read_manifest(url) == ROWS


def test_end_may_be_nan():
    assert ManifestRow(key="k", dataset="d", source="s", end=math.nan).end is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("key", "a.b"), ("key", "a/b"), ("key", ""), ("key", "k" * (LONGEST_KEY + 1)), ("split", "a b"), ("source", ""), ("labels", "dog"),
     ("start", -1.0), ("start", math.nan), ("end", 0.0), ("end", math.inf)],
)  # fmt: skip
def test_bad_rows_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        ManifestRow(**{"key": "k", "dataset": "d", "source": "s", field: value})


def test_keys_given_twice_and_empty_manifests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a-1' is given twice"):
        write_manifest([*ROWS, ROWS[0]], tmp_path / "m.parquet")
    with pytest.raises(ValueError, match="no clips"):
        write_manifest([], tmp_path / "m.parquet")
    assert not list(tmp_path.iterdir())


def test_later_rows_of_a_key_can_be_set_aside(tmp_path):
    again = [replace(ROWS[0], source="second"), replace(ROWS[0], source="third")]
    told = []
    assert write_manifest([*ROWS, *again], tmp_path / "m.parquet", told.append) == 2
    assert read_manifest(tmp_path / "m.parquet") == ROWS and told == again
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


def test_a_failing_reader_leaves_the_old_manifest(tmp_path):
    def failing():
        yield ROWS[1]
        raise OSError("the list ends in the middle")

    write_manifest(ROWS, tmp_path / "m.parquet")
    with pytest.raises(OSError, match="middle"):
        write_manifest(failing(), tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet") == ROWS and len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_manifest_are_named(tmp_path):
    with pytest.raises(ValueError, match="absent.parquet: no such manifest"):
        read_manifest(tmp_path / "absent.parquet")
    with pytest.raises(ValueError, match="absent.parquet: no such manifest"):
        read_manifest("memory://nowhere/absent.parquet")
    (tmp_path / "text.parquet").write_text("key,source\n")
    with pytest.raises(ValueError, match="text.parquet: not a Parquet file"):
        read_manifest(tmp_path / "text.parquet")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "thin.parquet")
    with pytest.raises(ValueError, match="thin.parquet: no column 'dataset'"):
        read_manifest(tmp_path / "thin.parquet")
    columns = {name: [None] for name in SCHEMA.names}
    pq.write_table(pa.table(columns), tmp_path / "null.parquet")
    with pytest.raises(ValueError, match="null.parquet: a column"):
        read_manifest(tmp_path / "null.parquet")


@given(st.lists(st.integers(0, 39), max_size=30), st.integers(1, 40))
def test_rows_are_taken_by_number_whatever_the_row_groups(numbers, group):
    rows = [replace(ROWS[0], key=f"k{number}", start=number / 64) for number in range(40)]
    table = pa.Table.from_pylist([asdict(row) | {"extra": "{}"} for row in rows], schema=SCHEMA)
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        pq.write_table(table, file.name, row_group_size=group)
        with Manifest(file.name) as manifest:
            assert manifest.take(np.array(numbers, np.int64)) == {number: rows[number] for number in numbers}
            assert list(manifest.rows()) == rows and len(manifest) == 40


def test_hash_is_of_the_contents(tmp_path):
    def hash_of(table, **options):
        pq.write_table(table, tmp_path / "other.parquet", **options)
        with Manifest(tmp_path / "other.parquet") as manifest:
            return manifest.hash()

    write_manifest(ROWS, tmp_path / "m.parquet")
    table = pq.ParquetFile(tmp_path / "m.parquet").read()
    with Manifest(tmp_path / "m.parquet") as manifest:
        original = manifest.hash()
    assert original == hash_of(table, compression="none", row_group_size=1)
    assert len({original, hash_of(table.take([1, 0])), hash_of(table.slice(0, 1)), hash_of(table.slice(1))}) == 4


@given(st.text(max_size=200))
def test_any_text_makes_a_key(text):
    key = make_key(text)
    ManifestRow(key=key, dataset="d", source="s")
    assert make_key(key) == key


def test_keys_stay_readable():
    assert make_key("vggsound_--0PQM4-hqg_30000") == "vggsound_--0PQM4-hqg_30000"
    assert make_key("a.b/c d") == "a_b_c_d"
    assert make_key("x" * 200) != make_key("x" * 201)
    assert make_key("cafe\u0301") == make_key("caf\u00e9")
