import gzip

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.readers.lines import read_lines, split_cells
from data_prep.readers.rejects import ReaderError


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes("\ufeffa,1\r\n\r\n  \nbü,2\nc".encode())
    assert list(read_lines(path)) == [(f"{path}:1", "a,1"), (f"{path}:4", "bü,2"), (f"{path}:5", "c")]


def test_compressed_and_remote():
    content = gzip.compress(b"a,1\nb,2\n")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/lists/list.csv.gz", content)
    memory.pipe_file("/lists/short.csv.gz", content[:-9])
    assert list(read_lines("memory://lists/list.csv.gz")) == [
        ("memory://lists/list.csv.gz:1", "a,1"),
        ("memory://lists/list.csv.gz:2", "b,2"),
    ]
    with pytest.raises(ReaderError, match="short.csv.gz: cannot be read: EOFError"):
        list(read_lines("memory://lists/short.csv.gz"))


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "no.gz").write_text("a,b\n")
    for name in ("absent.csv", "no.gz"):
        with pytest.raises(ReaderError, match=f"{name}: cannot be read"):
            list(read_lines(tmp_path / name))


def test_a_bad_byte_spoils_its_own_row(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b"a,1\nb\xff,2\nc,3\n")
    good, bad, last = (line for _, line in read_lines(path))
    assert split_cells(good) == ["a", "1"] and split_cells(last) == ["c", "3"]
    with pytest.raises(ReaderError, match="not UTF-8"):
        split_cells(bad)


@pytest.mark.parametrize("line", ['a,"b', 'a,"b"c', "a," + "x" * 200_000])
def test_rows_that_are_no_csv(line):
    with pytest.raises(ReaderError, match="no CSV row"):
        split_cells(line)


def test_spaces_before_quotes():
    line = '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"'
    assert split_cells(line, skip_space=True) == ["--PJHxphWEs", "30.000", "40.000", "/m/09x0r,/t/dd00088"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), min_size=2))
def test_any_cells_survive(cells):
    line = ",".join('"{}"'.format(cell.replace('"', '""')) for cell in cells)
    assert split_cells(line) == cells
