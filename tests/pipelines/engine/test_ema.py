"""Averages: their profiles, and what snapshots of them give after training."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config.ema import EMAConfig
from pipelines.engine.ema import decays
from pipelines.engine.profiles import combine, gamma_of, power_decay, sigma_rel_of
from pipelines.engine.snapshots import Snapshots


def averaged(values, gamma):
    """The power average of values[1:] step by step, at each step."""
    average, found = 0.0, [0.0]
    for step, value in enumerate(values[1:], 1):
        decay = power_decay(gamma, step)
        average = decay * average + (1 - decay) * value
        found.append(average)
    return np.array(found)


def walk(steps):
    """A weight that drifts and jitters."""
    jitter = np.random.default_rng(0).normal(size=steps + 1).cumsum()
    return 0.05 * jitter + np.sin(np.arange(steps + 1) / 300)


def test_exponents_are_those_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.25) == pytest.approx(0.7203, abs=1e-3)


@given(st.floats(0.01, 0.28))
def test_width_and_exponent_belong_together(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel)


def test_the_profile_has_the_width_it_is_named_after():
    steps, gamma = 20_000, gamma_of(0.1)
    decay = np.array([power_decay(gamma, step) for step in range(1, steps + 1)])
    shares = (1 - decay) * np.append(np.cumprod(decay[:0:-1])[::-1], 1)
    times = np.arange(1, steps + 1) / steps
    assert shares.sum() == pytest.approx(1)
    assert (mean := (shares * times).sum()) == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-4)
    assert np.sqrt((shares * (times - mean) ** 2).sum()) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(("wanted", "error"), [(0.05, 1e-9), (0.06, 2e-4), (0.07, 2e-4), (0.1, 1e-9), (0.15, 1e-3), (0.2, 1e-3)])
def test_snapshots_of_two_widths_give_any_other(wanted, error):
    values, gammas, times = walk(2000), [gamma_of(0.05), gamma_of(0.1)], range(125, 2001, 125)
    tracks = {gamma: averaged(values, gamma) for gamma in gammas}
    kept = [(time, gamma) for time in times for gamma in gammas]
    factors = combine([time for time, _ in kept], [gamma for _, gamma in kept], 2000, gamma_of(wanted))
    found = sum(factor * tracks[gamma][time] for factor, (time, gamma) in zip(factors, kept, strict=True))
    assert found == pytest.approx(averaged(values, gamma_of(wanted))[-1], abs=error)
    assert factors.sum() == pytest.approx(1, abs=5e-3)


def test_snapshots_on_disk_give_the_same(tmp_path):
    values, snapshots = torch.tensor(walk(800), dtype=torch.float32), Snapshots(tmp_path)
    for width in (0.05, 0.1):
        track = averaged(values.numpy(), gamma_of(width))
        for step in range(100, 801, 100):
            snapshots.store(step, width, {"a.weight": torch.full((2, 3), float(track[step])), "gain": torch.tensor(float(track[step]))})
    assert len(list(tmp_path.iterdir())) == 16
    found, wanted = snapshots.synthesise(0.08, 800), averaged(values.numpy(), gamma_of(0.08))[-1]
    assert found["a.weight"].shape == (2, 3) and found["gain"].shape == () and found["gain"].dtype == torch.float32
    assert float(found["a.weight"][1, 2]) == float(found["gain"]) == pytest.approx(wanted, abs=2e-3)
    earlier = averaged(values.numpy()[:501], gamma_of(0.08))[-1]
    assert float(snapshots.synthesise(0.08, 500)["gain"]) == pytest.approx(earlier, abs=2e-3)
    with pytest.raises(FileNotFoundError, match=r"no snapshot of step 750 among \[100, 200"):
        snapshots.synthesise(0.08, 750)


def test_snapshots_of_steps_that_were_given_up_go(tmp_path):
    snapshots = Snapshots(tmp_path / "averages")
    snapshots.forget(after=0)
    for step in (2, 4, 6):
        for width in (0.05, 0.1):
            snapshots.store(step, width, {"a": torch.full((2,), float(step))})
    snapshots.forget(after=4)
    assert sorted(path.name[5:13] for path in (tmp_path / "averages").iterdir()) == ["00000002"] * 2 + ["00000004"] * 2


def test_the_recipe_says_which_averages():
    assert decays(EMAConfig.of_decay(0)) == {} and list(decays(EMAConfig.of_decay(0.999))) == [0.999]
    assert list(decays(EMAConfig(kind="power"))) == [0.05, 0.1]
    half = decays(EMAConfig(half_lives=(500.0, 2000.0)))
    assert half[500.0](10**9) == pytest.approx(0.5 ** (1 / 500)) and half[2000.0](0) == pytest.approx(0.1)


@pytest.mark.parametrize(("fields", "message"), [
    ({"kind": "power", "sigma_rels": (0.3,)}, "sigma_rels .* below 0.2887"),
    ({"kind": "power", "export": 0.07}, r"export 0.07 is none of the averages kept, \(0.05, 0.1\): name one of them, or set"),
    ({"snapshot_every": 10}, "snapshot_every needs kind power"),
    ({"half_lives": (5.0, 5.0)}, "names an average twice"),
    ({"decay": 1.0}, "decay 1.0 must be in"),
])  # fmt: skip
def test_impossible_averages_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EMAConfig(**fields)
