from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.reports.chart import write_chart
from data_prep.reports.statistics import Distribution, Statistics, count_text, size_text, statistics, text_tables
from data_prep.shards import ShardWriter
from data_prep.sidecar import ShardError
from tests.fixtures.known_shards import write_shards


def distribution(kept, dropped=(), step=0.01):
    found = Distribution(step)
    found.add("ok", np.array(kept, float))
    found.add("dropped", np.array(dropped, float))
    return found


def test_clips_reasons_splits_and_labels_are_counted(tmp_path):
    write_shards(tmp_path, missing=("clip-0-1",), splits={2: "test"})
    steps = []
    found = statistics(tmp_path, lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (found.shards, found.rows, found.clips) == (3, 22, 10)
    assert found.statuses == {"ok": 10, "dropped": 11, "failed": 1}
    assert found.reasons == {"dropped": {"silent": 11}, "failed": {"no_audio": 1}}
    assert found.splits == {"test": 7, "train": 3} and found.labels == {"dog": 10, "rain": 6} and found.datasets == {}
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert found.kept_bytes == 2 * sum(300 + 7 * i for i in (0, 2, 3, *range(7)))
    assert found.seconds == pytest.approx(10 * 1.8) and found.measures["duration"].kept == {180: 10}


def test_measurements_of_dropped_clips_are_kept_apart_and_bounds_are_those_of_the_settings(tmp_path):
    with ShardWriter(tmp_path, 0) as writer:
        writer.add("a", {"mp4": b"1"}, dataset="vggsound", loudness=-20.04, silence=0.25, motion=0.01, av_offset=-0.02, duration=10.0)
        writer.skip(
            "b", "dropped", "silent", dataset="vggsound", loudness=-120.0, silence=1.0, motion=float("nan"), av_offset=0.0, duration=9.0
        )
        writer.skip("c", "failed", "missing", dataset="vggsound")
    (tmp_path / "settings.json").write_text(json.dumps({"filters": {"min_loudness": -60.0}}))
    found = statistics(tmp_path)
    assert found.filters == {"min_loudness": -60.0} and found.datasets == {"vggsound": 1}
    assert {name: (dict(each.kept), dict(each.dropped)) for name, each in found.measures.items()} == {
        "duration": ({1000: 1}, {900: 1}), "loudness": ({-200: 1}, {-1200: 1}), "silence": ({250: 1}, {1000: 1}),
        "motion": ({100: 1}, {}), "av_offset": ({-20: 1}, {0: 1}),
    }  # fmt: skip
    summary = json.loads(json.dumps(found.summary()))
    assert summary["measures"]["loudness"]["quantiles"]["median"] == -20.0
    assert sum(summary["measures"]["loudness"]["histogram"]["dropped"]) == 1


@given(st.lists(st.integers(-500, 500), min_size=1, max_size=200))
def test_quantiles_are_those_of_the_sorted_values(steps):
    found = distribution([step / 10 for step in steps], step=0.1).quantiles()
    for name, share in (("min", 0.0), ("25%", 0.25), ("median", 0.5), ("95%", 0.95), ("max", 1.0)):
        assert found[name] == pytest.approx(np.quantile(np.array(steps) / 10, share, method="inverted_cdf"))


@given(
    st.lists(st.integers(-500, 500), max_size=100),
    st.lists(st.integers(-500, 500), max_size=100),
    st.integers(1, 50),
    st.sampled_from([0, 0.1]),
)
def test_a_histogram_counts_each_value_once_and_holds_what_it_must_include(kept, dropped, bins, outliers):
    found = distribution([step / 100 for step in kept], [step / 100 for step in dropped])
    edges, *counts = found.histogram(bins, include=[1.5], outliers=outliers)
    assert [count.sum() for count in counts] == [len(kept), len(dropped)]
    assert len(edges) - 1 == len(counts[0]) <= bins + 1 and edges[0] < 1.5 < edges[-1]
    assert np.diff(edges) == pytest.approx(edges[1] - edges[0])


def test_one_outlier_does_not_squeeze_the_others():
    found = distribution([1.0] * 500 + [2.0] * 499 + [3600.0])
    assert found.histogram(40)[0][-1] > 3600 and found.histogram(40, outliers=0.005)[0][-1] < 2.1
    assert found.histogram(40, outliers=0.005)[1].sum() == 1000 and found.quantiles()["max"] == 3600


def test_the_tables_say_how_many_and_what_share(tmp_path):
    write_shards(tmp_path, missing=("clip-0-1",))
    clips, measures, splits, labels = text_tables(statistics(tmp_path), labels=1)
    assert clips.title.startswith("10 of 22 clips kept (45.5%), 0.3 min, ") and clips.title.endswith(" in 3 shards")
    assert clips.rows == [("kept", "10", "45.5%"), ("dropped silent", "11", "50.0%"), ("failed no_audio", "1", "4.5%")]
    assert measures.rows == [("Length, s", *["1.8"] * 7)] and splits.rows == [("train", "10", "100.0%")]
    assert labels.title == "Labels: 2, the first 1" and labels.rows == [("dog", "10", "100.0%")]
    for table in (clips, measures, splits, labels):
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_numbers_are_told_in_units():
    assert [size_text(count) for count in (0, 999, 1234567, 5e11, 7.4e13)] == ["0 B", "999 B", "1.23 MB", "500 GB", "74 TB"]
    assert [count_text(count) for count in (0, 950, 1200, 3e6)] == ["0", "950", "1.2k", "3M"]


@pytest.mark.parametrize("labels", [1, 500])
def test_a_chart_is_drawn_for_any_number_of_labels(tmp_path, labels):
    found = Statistics(url="/data/set", filters={"min_loudness": -60.0, "max_offset": 0.1})
    found.statuses.update(ok=1000, dropped=50)
    found.reasons["dropped"]["silent"] = 50
    found.labels.update({rf"label number {number} with $\no$ _": 1000 - number for number in range(labels)})
    found.measures["loudness"].add("ok", np.linspace(-50, -5, 1000))
    found.measures["av_offset"].add("ok", np.zeros(1000))
    write_chart(found, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert ("label number 13 with" in drawn) == (labels == 500) and ("and 486 more" in drawn) == (labels == 500)
    assert "min_loudness -60" in drawn and "1,000 of 1,050 clips kept (95.2%)" in drawn


def test_a_chart_of_nothing_is_drawn_and_other_files_are_refused(tmp_path):
    with pytest.raises(ShardError, match="no shards here"):
        statistics(tmp_path)
    empty = Statistics(url="nowhere", filters={})
    assert (empty.rows, list(text_tables(empty))[0].rows) == (0, [("kept", "0", "0.0%")])
    for name, head in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        write_chart(empty, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)
    with pytest.raises(ValueError, match="a.jpeg: a chart is a .png, .svg or .pdf file"):
        write_chart(empty, tmp_path / "a.jpeg")


def test_statistics_need_no_drawing_library():
    code = "import data_prep.reports.statistics, data_prep.reports.chart, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
