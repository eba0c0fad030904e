import pytest

from data_prep.filters import DROPPED, FilterConfig, verdict

GOOD = {"loudness": -20.0, "silence": 0.1, "motion": 0.02, "source_side": 360, "source_fps": 25.0, "av_offset": 0.0}
STRICT = FilterConfig(min_loudness=-50, max_silence=0.5, min_motion=0.001, min_side=240, min_fps=10, max_offset=0.2)


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ({}, None),
        ({"loudness": -50.1}, "silent"),
        ({"loudness": -50.0}, None),
        ({"silence": 0.51}, "mostly_silent"),
        ({"silence": 0.5}, None),
        ({"motion": 0.0009}, "still"),
        ({"source_side": 239}, "small"),
        ({"source_fps": 9.9}, "slow"),
        ({"av_offset": 0.21}, "out_of_step"),
        ({"av_offset": -0.21}, "out_of_step"),
        ({"loudness": -80.0, "silence": 1.0, "motion": 0.0}, "silent"),
    ],
)
def test_first_broken_rule_is_the_reason(measured, reason):
    assert verdict(GOOD | measured, STRICT) == reason
    assert reason is None or reason in DROPPED


def test_by_default_silence_stills_and_broken_timestamps_are_dropped():
    assert verdict(GOOD | {"motion": 0.0003, "source_side": 16, "source_fps": 1.0, "av_offset": -0.9}, FilterConfig()) is None
    assert verdict(GOOD | {"motion": 0.0001}, FilterConfig()) == "still"
    assert verdict(GOOD | {"av_offset": 1.1}, FilterConfig()) == "out_of_step"
    assert verdict(GOOD | {"loudness": -120.0, "silence": 1.0}, FilterConfig()) == "silent"
    all_kept = FilterConfig(min_loudness=-121.0, max_silence=1.0, min_motion=0.0, max_offset=None)
    assert verdict(GOOD | {"loudness": -120.0, "silence": 1.0, "motion": 0.0, "av_offset": 9.0}, all_kept) is None


def test_near_duplicates_are_no_matter_of_one_clip():
    assert "near_duplicate" in DROPPED
    assert verdict(GOOD, FilterConfig(max_similarity=0.5)) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_silence", 1.1), ("min_loudness", 1.0), ("min_motion", -1.0), ("max_offset", -0.1),
        ("max_similarity", 0.4), ("max_similarity", 1.1),
    ],
)  # fmt: skip
def test_impossible_bounds_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        FilterConfig(**{field: value})
