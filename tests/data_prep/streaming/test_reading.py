from __future__ import annotations

import time
import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.decoding import DecodedCache, TensorDecoder
from data_prep.order import Place
from data_prep.stream import ClipStream, _PassBatches, one_pass
from data_prep.streaming.reading import BadClip, ClipReader, Name, Note
from tests.fixtures.made_shards import DECODE, values, write


class Distant(MemoryFileSystem):
    """A store that counts what is asked of it."""

    protocol, asked = "distant", 0

    def cat_file(self, path, start=None, end=None, **options):
        Distant.asked += 1
        return super().cat_file(path, start, end, **options)


fsspec.register_implementation("distant", Distant, clobber=True)


@pytest.fixture(scope="module")
def shards():
    return write(f"distant://{uuid.uuid4().hex}")


def test_the_clips_of_a_batch_come_from_afar_in_as_few_requests_as_there_are_tars(shards):
    stream = ClipStream(shards, DECODE, batch_size=16)
    batches = stream.batches()
    next(batches)  # the sidecars as well
    Distant.asked = 0
    rest = values([next(batches), next(batches)])
    assert 0 < Distant.asked <= 3 * 6 and len(set(rest)) == 32 and stream.bad == 0
    assert values(one_pass(shards, DECODE, 16)) == list(range(48))


def test_a_clip_in_the_cache_is_not_fetched_and_a_bad_one_keeps_its_place(shards):
    reader = ClipReader([shards], DECODE, cache=DecodedCache(1e6))
    places = [Place(0, 0, row) for row in range(4)]
    reader.fetch(places)
    assert [int(reader.read(place, 0)["value"]) for place in places] == [0, 1, 2, 3]
    before = Distant.asked
    reader.fetch(places)
    assert [int(reader.read(place, 0)["value"]) for place in places] == [0, 1, 2, 3] and Distant.asked == before
    missing = ClipReader([shards], TensorDecoder(("nothing",)))
    missing.fetch(places)
    bad = [missing.read(place, 7) for place in places]
    assert [(clip.key, clip.reason, clip.position) for clip in bad] == [(f"clip-{row}", "missing_member", 7) for row in range(4)]


def test_what_comes_next_is_read_meanwhile(shards, tmp_path):
    """From a store; local clips are not."""
    first, then = [Place(0, 0, row) for row in range(4)], [Place(0, 0, row) for row in range(4, 8)]
    reader, local = ClipReader([shards], DECODE), ClipReader([write(tmp_path)], DECODE)
    reader.fetch(first)
    reader.fetch_ahead(then)
    reader._ahead[1].result()
    before = Distant.asked
    assert [int(reader.read(place, 0)["value"]) for place in first] == [0, 1, 2, 3]
    reader.fetch(then)
    assert [int(reader.read(place, 0)["value"]) for place in then] == [4, 5, 6, 7] and Distant.asked == before
    for each in (reader, local):
        _PassBatches(each, [9], [range(4), range(4, 8)])(0, 1)
    assert reader._ahead[0] == then and local._ahead is None


def test_another_step_than_the_expected_one_is_read_as_ever(shards):
    reader, places = ClipReader([shards], DECODE), [Place(0, 3, row) for row in range(12)]
    reader.fetch(places[:4])
    reader.fetch_ahead(places[4:8])
    reader.fetch(places[8:])
    assert [int(reader.read(place, 0)["value"]) for place in places[8:]] == [21, 22, 23, 24]


def test_a_condemned_clip_is_never_decoded(shards):
    class Never(TensorDecoder):
        def __call__(self, raw, entry, random):
            raise AssertionError

    reader = ClipReader([shards], Never(("value",)), condemned={Name(shards.url, "shard-000001", "clip-9"): ("timeout", "it hung")})
    assert reader.read(Place(0, 1, 0), 3) == BadClip(shards.url, "shard-000001", "clip-9", "timeout", 3, "it hung")
    assert reader.note.place is None


def test_a_note_tells_what_is_in_work_and_since_when():
    note, before = Note(), time.monotonic()
    assert note.place is None and note.reading == note.decoding == 0
    note.begin(Place(1, 200_000, 35))
    assert note.place == Place(1, 200_000, 35) and before <= note.reading <= time.monotonic() and note.decoding == 0
    note.decode()
    assert note.reading <= note.decoding <= time.monotonic()
    note.end()
    assert note.place is None and note.decoding == 0
