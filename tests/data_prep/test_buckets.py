import pytest

from data_prep.buckets import Buckets


@pytest.mark.parametrize("in_memory", [4, 1 << 20])
def test_records_come_back_by_bucket_in_the_order_they_went_in(monkeypatch, in_memory):
    monkeypatch.setattr("data_prep.buckets._IN_MEMORY", in_memory)
    buckets = Buckets(3)
    for number in range(10):
        buckets.add(number, b"%d" % number)
    assert list(buckets) == list(buckets) == [b"0369", b"147", b"258"]
    buckets.close()
    with pytest.raises(ValueError, match="closed"):
        list(buckets)
