import pytest

from data_prep.readers.rejects import ReaderError, Rejects


def test_a_few_rows_are_set_aside_and_told():
    rejects = Rejects(keep=2)
    rejects.accept(1000)
    for line in (17, 400, 401):
        rejects.reject(f"list.csv:{line}", "no id")
    rejects.finish()
    assert (rejects.accepted, rejects.rejected) == (1000, 3)
    assert rejects.lines == ["list.csv:17: no id", "list.csv:400: no id"]
    assert str(rejects) == "3 of 1,003 rows set aside, the first: list.csv:17: no id; list.csv:400: no id"
    assert str(Rejects()) == "0 of 0 rows set aside"


def test_too_many_end_the_reading_once_enough_rows_were_seen():
    rejects = Rejects(max_share=0.1, least=20)
    for line in range(1, 20):
        rejects.reject(f"list.csv:{line}", "no id")
    with pytest.raises(ReaderError, match="20 of 20 rows set aside, the first: list.csv:1: no id; .* more than 10 % are malformed"):
        rejects.reject("list.csv:20", "no id")


def test_the_share_is_of_all_rows():
    rejects = Rejects(max_share=0.1, least=20)
    rejects.accept(18)
    rejects.reject("a:19", "bad")
    rejects.reject("a:20", "bad")
    with pytest.raises(ReaderError, match="3 of 21"):
        rejects.reject("a:21", "bad")


@pytest.mark.parametrize(
    ("good", "bad", "ends"), [(2, 1, False), (2, 2, True), (0, 1, True), (0, 0, False), (197, 2, True), (198, 2, False)]
)
def test_the_end_of_a_list(good, bad, ends):
    rejects = Rejects(max_share=0.01, least=100)
    rejects.accept(good)
    rejects.rejected = bad
    if ends:
        with pytest.raises(ReaderError, match=f"{bad} of {good + bad} rows"):
            rejects.finish()
    else:
        rejects.finish()


def test_lists_without_one_good_row_are_refused_even_where_all_may_be_bad():
    rejects = Rejects(max_share=1)
    rejects.reject("a:1", "bad")
    with pytest.raises(ReaderError, match="no row is well-formed"):
        rejects.finish()


def test_sift_sets_aside_what_cannot_be_parsed():
    def parse(text):
        if text == "x":
            raise ReaderError("is x")
        return int(text)

    rejects = Rejects()
    assert list(rejects.sift([("a:1", "1"), ("a:2", "x"), ("a:3", "3")], parse)) == [1, 3]
    assert rejects.accepted == 2 and rejects.lines == ["a:2: is x"]
    with pytest.raises(ValueError, match="invalid literal"):  # a mistake of the reader is not one of the list
        list(rejects.sift([("a:4", "y")], parse))


def test_reports_are_short_however_long_the_row():
    rejects = Rejects()
    rejects.reject("a:1", "x" * 10_000)
    assert len(str(rejects)) < 400


@pytest.mark.parametrize(("name", "value"), [("max_share", 1.5), ("max_share", -0.1), ("least", 0), ("keep", 0)])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        Rejects(**{name: value})
