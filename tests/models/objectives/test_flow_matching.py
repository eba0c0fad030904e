"""Flow matching: t = 0 is noise, t = 1 is data."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.objectives.flow_matching import flow_loss, flow_time, integrate, interpolate
from tests.fixtures.made_weights import made_input

NOISE, DATA = made_input("noise", (2, 5, 3)), made_input("data", (2, 5, 3))


def test_path_starts_at_noise_and_ends_at_data():
    assert torch.equal(interpolate(NOISE, DATA, torch.zeros(2))[0], NOISE)
    assert torch.equal(interpolate(NOISE, DATA, torch.ones(2))[0], DATA)


def test_each_sample_has_its_own_time():
    x, _ = interpolate(NOISE, DATA, torch.tensor([0.0, 1.0]))
    assert torch.equal(x, torch.stack((NOISE[0], DATA[1])))


@given(st.floats(0, 1))
def test_target_leads_from_any_point_to_data(t):
    x, target = interpolate(NOISE, DATA, torch.full((2,), t))
    torch.testing.assert_close(x + (1 - t) * target, DATA, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x - t * target, NOISE, rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_square_of_each_sample():
    predicted = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    assert flow_loss(predicted, torch.zeros(2, 1, 2)).tolist() == [2.5, 0.0]
    assert flow_loss(predicted.bfloat16(), torch.zeros(2, 1, 2).bfloat16()).dtype == torch.float32


QUANTILES = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])


def test_logit_normal_times():
    # Quantiles of a logistic transform are the transformed quantiles of the normal.
    normal = [-1.2816, -0.6745, 0.0, 0.6745, 1.2816]
    assert flow_time(QUANTILES).tolist() == pytest.approx([1 / (1 + math.exp(-z)) for z in normal], abs=1e-4)


def test_uniform_times():
    assert flow_time(QUANTILES, "uniform").tolist() == pytest.approx(QUANTILES.tolist())


@pytest.mark.parametrize("kind", ["logit_normal", "uniform"])
def test_times_stay_inside(kind):
    times = flow_time(torch.tensor([0.0, 1.0]), kind)
    assert 0 < times[0] < 0.01 and 0.99 < times[1] < 1


def test_unknown_time_distribution():
    with pytest.raises(ValueError, match='"cosine" is unknown: choose "logit_normal" or "uniform"'):
        flow_time(QUANTILES, "cosine")


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_integration_of_the_true_field_reaches_data(steps):
    torch.testing.assert_close(integrate(lambda x, t: DATA - NOISE, NOISE, steps), DATA, rtol=1e-4, atol=1e-5)
    pull = integrate(lambda x, t: (DATA - x) / (1 - t)[:, None, None], NOISE, steps)
    torch.testing.assert_close(pull, DATA, rtol=1e-4, atol=1e-5)


def test_integration_is_euler():
    x = torch.ones(3, 2)
    torch.testing.assert_close(integrate(lambda x, t: -x, x, 10), 0.9**10 * x)
    torch.testing.assert_close(integrate(lambda x, t: t[:, None].expand_as(x), x, 10), x + 0.45)


def test_integration_visits_times_upwards_from_noise():
    times = []
    integrate(lambda x, t: times.append(t) or x, torch.ones(2, 1), 4)
    assert torch.stack(times).tolist() == [[0.0, 0.0], [0.25, 0.25], [0.5, 0.5], [0.75, 0.75]]


def test_integration_needs_a_step():
    with pytest.raises(ValueError, match="steps is 0"):
        integrate(lambda x, t: x, NOISE, 0)
