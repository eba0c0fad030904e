from collections import Counter
from itertools import pairwise

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data_prep.digests import ContentHash, KeyLedger, key_digest, keys_digest

keys = st.lists(st.text("ab\0é", max_size=3), max_size=40)


@given(keys, st.randoms())
def test_digest_tells_multisets_apart_and_forgets_the_order(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert keys_digest(texts) == keys_digest(iter(shuffled))
    assert keys_digest([*texts, "more"]) != keys_digest(texts)
    if texts:
        assert keys_digest([*texts, texts[0]]) != keys_digest(texts)


@given(keys)
def test_ledger_knows_exactly_the_repeated_keys(texts):
    with KeyLedger() as ledger:
        for text in texts:
            ledger.add(text)
        assert ledger.repeated() == {key_digest(text) for text, count in Counter(texts).items() if count > 1}
        assert (len(ledger), ledger.digest) == (len(texts), keys_digest(texts))


def test_ledger_spills_to_files_and_still_knows(monkeypatch):
    monkeypatch.setattr("data_prep.buckets._IN_MEMORY", 64)
    with KeyLedger() as ledger:
        for number in range(5000):
            ledger.add(f"clip_{number % 4997}")
        assert ledger.repeated() == {key_digest(f"clip_{number}") for number in range(3)}


TABLE = pa.table({
    "text": ["a", "bc", "", None, "é"],
    "list": pa.array([["x"], [], ["y", "zz"], [""], ["x", ""]], pa.list_(pa.string())),
    "number": [1.0, None, 2.5, 0.0, -1.0],
})  # fmt: skip


def hashed(*tables):
    contents = ContentHash()
    for table in tables:
        contents.update(table)
    return contents.hexdigest()


@given(st.lists(st.integers(0, 5), max_size=4).map(sorted))
def test_content_hash_does_not_depend_on_the_cuts(cuts):
    bounds = [0, *cuts, 5]
    pieces = [TABLE.slice(start, stop - start) for start, stop in pairwise(bounds)]
    assert hashed(*pieces) == hashed(TABLE) == hashed(pa.concat_tables(pieces))


def test_content_hash_sees_every_change():
    moved = {"text": ["ab", "c", "", None, "é"], "list": [["x"], ["y"], ["zz"], [""], ["x", ""]], "number": [1.0, None, 2.5, 0.0, 0.0]}
    changed = [TABLE.set_column(i, name, [pa.array(moved[name], TABLE[name].type)]) for i, name in enumerate(moved)]
    assert len({hashed(table) for table in (TABLE, *changed, TABLE.take([1, 0, 2, 3, 4]), TABLE.slice(0, 4))}) == 6
