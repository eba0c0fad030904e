import numpy as np
import pytest

from pipelines.metrics.distribution import frechet_distance

RANDOM = np.random.default_rng(0)


def test_a_set_has_no_distance_from_itself():
    features = RANDOM.standard_normal((500, 12))
    assert frechet_distance(features, features[::-1]) == pytest.approx(0.0, abs=1e-9)


def test_a_shift_counts_squared():
    features = RANDOM.standard_normal((300, 4))
    assert frechet_distance(features, features + np.array([3.0, 0.0, 4.0, 0.0])) == pytest.approx(25.0)


def test_scaled_gaussians():
    # Same shape, deviations 1 and 3 in each of D dimensions: the sum of (3 - 1)^2 times the sample variances.
    features = RANDOM.standard_normal((400, 5))
    centred = features - features.mean(axis=0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * centred.var(axis=0, ddof=1).sum())


def test_against_the_definition_by_the_eigenvalues_of_the_product():
    first, second = RANDOM.standard_normal((100, 6)), RANDOM.standard_normal((80, 6)) @ RANDOM.standard_normal((6, 6)) + 1
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    trace = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
    shift = first.mean(axis=0) - second.mean(axis=0)
    expected = shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * trace
    assert frechet_distance(first, second) == pytest.approx(expected)
    assert frechet_distance(second, first) == pytest.approx(expected)


def test_fewer_samples_than_dimensions():
    first, second = RANDOM.standard_normal((2, 10, 50))
    assert np.isfinite(frechet_distance(first, second))
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)


def test_one_dimension():
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]])) == pytest.approx(1.0)


@pytest.mark.parametrize(("first", "second", "message"), [
    (np.ones((1, 3)), np.ones((5, 3)), "N, M >= 2"), (np.ones((5, 3)), np.ones((5, 4)), r"\(N, D\)"),
    (np.full((5, 3), np.inf), np.ones((5, 3)), "NaN or infinity"),
])
def test_bad_sets(first, second, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(first, second)
