"""Lists of literals: the short cuts give what `ast.literal_eval` gives, or nothing."""

import ast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.readers.literals import parse_list, parse_numbers, parse_strings

AWKWARD = st.text(st.sampled_from("'\"\\ ,[]n\n\r\t\0xuN{}a\u2028\ufeff\xad\U0001f436é"), max_size=12)
NEARLY = st.text(st.sampled_from("'\"\\, []nxu0a\n#"), max_size=14)


@given(st.lists(st.one_of(AWKWARD, st.text(max_size=30))))
@example(["A man's dog", 'says "hi"', "both ' and \"", "back\\slash", "line\nend", "\x07\u200b\ud800", "🐶 é"])
@example([""])
@example(["', '"])
def test_strings_written_by_repr(values):
    assert parse_strings(repr(values)) == values == parse_list(repr(values))


@given(st.one_of(NEARLY, NEARLY.map(lambda text: f"['{text}']"), NEARLY.map(lambda text: f"['a', {text}, \"b\"]")))
@example("['''a''']")
@example("['a' 'b']")
@example(r"['\N{DOG FACE}\x41\u0042\101']")
@example(r"['\x1', '\N{no such name}']")
@example("[r'\\n', b'x']")
@example(" ['a']")
@example("['a',\n 'b',]")
@example("['a\nb']")
@example("['a'], ['b']")
@example("['a', \"b', 'c\", 'd']")
def test_any_other_text_is_read_as_literal_eval_reads_it(cell):
    try:
        expected = ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError):
        expected = None
    if isinstance(expected, list) and all(isinstance(value, str) for value in expected):
        assert parse_strings(cell) == expected
    else:
        with pytest.raises(ValueError, match="literal|no list|other than strings"):
            parse_strings(cell)


@given(st.lists(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers())))
@example([0.453857421875, -0.0, 1e300, 10**400, 5e-324])
def test_numbers_written_by_repr(values):
    assert list(map(repr, parse_numbers(repr(values)))) == list(map(repr, values))


@pytest.mark.parametrize("cell", ["[0.5,.5, 1_0, +1]", "[0x10]", " [1]", "[1 ]", "[\n1]"])
def test_numbers_that_json_writes_otherwise(cell):
    assert parse_numbers(cell) == ast.literal_eval(cell)


@pytest.mark.parametrize(
    "cell", ["[nan]", "[NaN]", "[Infinity]", "[1e999]", "[true]", "[True]", "[null]", "['1']", "[[1]]", "1.5", "{}", "[1] 2"]
)
def test_what_is_no_list_of_finite_numbers(cell):
    with pytest.raises(ValueError, match="number|literal|list"):
        parse_numbers(cell)


@pytest.mark.parametrize("parse", [parse_strings, parse_numbers, parse_list])
@pytest.mark.parametrize(
    "cell", ["", "[", "[" * 100_000, "[" + "-" * 100_000 + "1]", "('a',)", "[__import__('os').abort()]", "\0", "[1*2]"]
)
def test_what_is_no_list_of_literals_is_refused_and_never_run(parse, cell):
    with pytest.raises(ValueError, match="is no|other than"):
        parse(cell)
