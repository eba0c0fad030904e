from hypothesis import given
from hypothesis import strategies as st

from data_prep.remote.ranges import Range, cut, merged

FILES = {"a": bytes(range(200)), "b": bytes(range(100, 150)), "c": b""}
RANGES = st.builds(
    lambda name, start, size: Range(name, start, start + size), st.sampled_from("abc"), st.integers(0, 250), st.integers(0, 90)
)


@given(st.lists(RANGES, max_size=12), st.integers(0, 40), st.integers(1, 64))
def test_requests_bring_exactly_what_is_wanted(ranges, gap, largest):
    requests = merged(ranges, gap, largest)
    contents = {request: FILES[request.name][request.start : request.stop] for request in requests}
    assert cut(ranges, contents, largest) == [FILES[name][start:stop] for name, start, stop in ranges]
    assert all(0 < request.size <= largest for request in requests) and len(set(requests)) == len(requests)
    wanted = {(each.name, place) for each in ranges for place in range(each.start, each.stop)}
    for request in requests:
        held = [place for place in range(request.start, request.stop) if (request.name, place) in wanted]
        assert {request.start, request.stop - 1} <= set(held)
        assert all(after - before <= gap + 1 for before, after in zip(held, held[1:], strict=False))


def test_neighbours_share_a_request_and_long_ranges_are_split():
    ranges = [Range("a", 40, 50), Range("a", 0, 10), Range("b", 0, 10), Range("a", 12, 30), Range("c", 0, 25), Range("a", 5, 5)]
    assert merged(ranges, gap=2, largest=30) == [Range("a", 0, 30), Range("a", 40, 50), Range("b", 0, 10), Range("c", 0, 25)]
    assert merged(ranges, gap=10, largest=10) == [
        Range("a", 0, 10), Range("a", 12, 22), Range("a", 22, 30), Range("a", 40, 50), Range("b", 0, 10),
        Range("c", 0, 10), Range("c", 10, 20), Range("c", 20, 25)]  # fmt: skip
