import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.metrics.statistics import Bar, paired, shuffled_partner


def test_paired_known_answer():
    found = paired(np.array([2.0, 3.0, 7.0]), np.array([1.0, 1.0, 4.0]))
    assert (found.difference, found.n) == (2.0, 3)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert found.sigmas == pytest.approx(2 * math.sqrt(3))


def test_paired_takes_out_what_clips_share():
    hardness = 100 * np.random.default_rng(0).standard_normal(50)
    gain = np.random.default_rng(1).normal(1.0, 0.1, 50)
    assert paired(hardness + gain, hardness).sigmas > 50


def test_paired_without_spread():
    assert paired(np.array([1.0, 2.0]), np.array([0.0, 1.0])).sigmas == math.inf
    assert paired(np.array([0.0, 1.0]), np.array([1.0, 2.0])).sigmas == -math.inf
    assert paired(np.ones(3), np.ones(3)).sigmas == 0.0


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=30))
def test_paired_is_antisymmetric(pairs):
    a, b = np.array(pairs).T
    there, back = paired(a, b), paired(b, a)
    assert there.difference == pytest.approx(-back.difference)
    assert there.standard_error == pytest.approx(back.standard_error)


@pytest.mark.parametrize(("a", "b", "message"), [
    (np.ones(3), np.ones(4), "one shape"), (np.ones(1), np.ones(1), "N >= 2"), (np.array([1.0, np.nan]), np.ones(2), "NaN"),
])
def test_paired_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired(a, b)


@pytest.mark.parametrize(("value", "comparison", "passed"), [
    (1.0, ">=", True), (0.9, ">=", False), (1.0, "<=", True), (1.1, "<=", False), (math.nan, ">=", False), (math.nan, "<=", False),
    (np.float32(2.0), ">=", True),
])
def test_bar(value, comparison, passed):
    bar = Bar(name="retrieval", value=value, comparison=comparison, bound=1.0, explanation="why")
    assert bar.passed is passed
    assert str(bar).startswith("passed: retrieval" if passed else "MISSED: retrieval") and str(bar).endswith("why")


def test_bar_goes_to_json():
    record = json.loads(json.dumps(dataclasses.asdict(Bar(name="x", value=2.0, comparison=">=", bound=1.0))))
    assert record == {"name": "x", "value": 2.0, "comparison": ">=", "bound": 1.0, "explanation": "", "passed": True}


def test_bar_with_another_comparison():
    with pytest.raises(ValueError, match="choose '>=' or '<='"):
        Bar(name="x", value=1.0, comparison=">", bound=1.0)


@given(st.integers(2, 200), st.integers(0, 2**32))
def test_no_clip_is_its_own_partner(n, seed):
    partner = shuffled_partner(n, seed)
    assert sorted(partner) == list(range(n))
    assert (partner != np.arange(n)).all()
    assert (partner == shuffled_partner(n, seed)).all()


def test_one_clip_has_no_partner():
    with pytest.raises(ValueError, match="at least two"):
        shuffled_partner(1, 0)
