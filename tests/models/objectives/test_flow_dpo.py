"""Equations 3-5 of MultiSoundGen on numbers worked out by hand."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from models.objectives.flow_dpo import (
    AVPRPOLoss,
    RunningScale,
    bottom_quartile_score,
    flow_dpo_loss,
    loss_normalisation,
    segment_score,
)


def losses(*rows):
    return [torch.tensor(row, requires_grad=True) for row in rows]


def test_equal_policy_and_reference_lose_ln_two():
    win, lose = torch.tensor([0.3, 0.8]), torch.tensor([0.5, 0.4])
    result = flow_dpo_loss(win, lose, win, lose, beta=1000)
    assert result.loss.item() == pytest.approx(math.log(2))
    assert (result.margin.item(), result.accuracy.item()) == (0.0, 0.0)


def test_loss_by_hand():
    result = flow_dpo_loss(*losses([0.30, 0.50], [0.45, 0.40], [0.32, 0.45], [0.44, 0.41]), beta=10)
    # Margins: (0.32 - 0.44) - (0.30 - 0.45) = 0.03 and (0.45 - 0.41) - (0.50 - 0.40) = -0.06.
    assert result.margin.item() == pytest.approx(-0.015, rel=1e-5)
    assert result.accuracy.item() == 0.5
    assert result.loss.item() == pytest.approx((math.log1p(math.exp(-0.3)) + math.log1p(math.exp(0.6))) / 2, rel=1e-5)


@given(st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4), st.floats(0.1, 4000))
def test_half_of_tangoflux_beta(values, beta):
    win, lose, ref_win, ref_lose = (torch.tensor([value], dtype=torch.float64) for value in values)
    inside = -0.5 * beta * ((win - lose) - (ref_win - ref_lose))
    tangoflux = -torch.nn.functional.logsigmoid(inside).mean()
    torch.testing.assert_close(flow_dpo_loss(win, lose, ref_win, ref_lose, beta=0.5 * beta).loss, tangoflux)


def test_gradient_lowers_the_winner_and_raises_the_loser():
    win, lose, ref_win, ref_lose = losses([0.3], [0.5], [0.3], [0.5])
    flow_dpo_loss(win, lose, ref_win, ref_lose, beta=10).loss.backward()
    assert win.grad.item() == pytest.approx(5.0) and lose.grad.item() == pytest.approx(-5.0)


def test_log_sigmoid_does_not_overflow():
    result = flow_dpo_loss(*losses([9.0], [0.0], [0.0], [9.0]), beta=4000)
    assert result.loss.item() == pytest.approx(72_000)


@pytest.mark.parametrize(("segments", "count"), [(1, 1), (3, 1), (6, 1), (7, 1), (8, 2), (11, 2), (14, 3)])
def test_bottom_quartile_averages_the_smallest(segments, count):
    similarities = torch.arange(segments, dtype=torch.float32)
    shuffled = similarities[torch.randperm(segments, generator=torch.Generator().manual_seed(0))]
    scores = bottom_quartile_score(torch.stack((shuffled, -shuffled)))
    assert scores.tolist() == pytest.approx([(count - 1) / 2, (count - 1) / 2 - segments + 1])


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=16))
def test_scores_are_ordered(values):
    similarities = torch.tensor([values])
    low, quartile, mean = (segment_score(similarities, kind).item() for kind in ("min", "bottom_quartile", "mean"))
    assert low <= quartile + 1e-6 <= mean + 2e-6
    if len(values) < 8:
        assert quartile == low == min(values)


@pytest.mark.parametrize("kind", ["bottom_quartile", "mean", "min"])
def test_a_segment_that_is_not_a_number_leaves_no_score(kind):
    similarities = torch.rand(3, 8)
    similarities[1, 2] = similarities[2] = torch.nan
    assert segment_score(similarities, kind).isnan().tolist() == [False, True, True]


def test_segment_score_refusals():
    with pytest.raises(ValueError, match='"median" is unknown: choose one of bottom_quartile, mean, min'):
        segment_score(torch.zeros(1, 4), "median")
    with pytest.raises(ValueError, match="no segment to score"):
        segment_score(torch.zeros(2, 0))


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=20))
def test_running_scale_stays_within_one(values):
    scale = RunningScale(decay=0.9)
    assert all(0 <= scale(torch.tensor(value)).item() <= 1 for value in values)


def test_running_scale_divides_by_the_maximum_without_touching_directions():
    scale = RunningScale(decay=1.0)
    assert scale(torch.tensor(4.0)).item() == 1.0
    weights = torch.tensor([1.0, 2.0], requires_grad=True)
    scaled = scale((weights * torch.tensor([0.2, 0.4])).sum())
    scaled.backward()
    assert scaled.item() == pytest.approx(0.25)
    assert weights.grad.tolist() == pytest.approx([0.05, 0.1])
    assert scale.state_dict()["maximum"].item() == 4.0


def test_running_scale_forgets_a_spike():
    scale = RunningScale(decay=0.5)
    outputs = [scale(torch.tensor(value)).item() for value in (8.0, 1.0, 1.0, 1.0)]
    assert outputs == [1.0, 0.25, 0.5, 1.0]


def test_running_scale_survives_a_broken_step_and_leaves_validation_alone():
    scale = RunningScale(decay=1.0)
    scale(torch.tensor(2.0))
    for broken in (math.nan, math.inf):
        assert not scale(torch.tensor(broken)).isfinite()
    scale.eval()
    assert scale(torch.tensor(5.0)).item() == 1.0
    assert scale.maximum.item() == 2.0
    with pytest.raises(ValueError, match="decay is 0"):
        RunningScale(decay=0)


@pytest.mark.parametrize(("kind", "value", "gradient"), [
    ("balanced", 1.0, 0.5), ("running_max", 1.0, 0.5), ("detached", 1.0, 0.5), ("none", 2.0, 1.0),
])
def test_normalisations(kind, value, gradient):
    loss = torch.tensor(2.0, requires_grad=True)
    scaled = loss_normalisation(kind)(loss)
    scaled.backward()
    assert (scaled.item(), loss.grad.item()) == (value, gradient)


def test_a_zero_loss_has_no_infinite_share():
    assert loss_normalisation("running_max")(torch.tensor(0.0)).item() == 0.0
    assert loss_normalisation("detached")(torch.tensor(0.0)).item() == 0.0


def test_unknown_normalisation():
    with pytest.raises(ValueError, match='"minmax" is unknown: choose one of balanced, running_max, detached, none'):
        loss_normalisation("minmax")
    with pytest.raises(ValueError, match='"ppo" is unknown: choose one of avp_rpo, dpo, flow_win'):
        AVPRPOLoss(10, objective="ppo")


def test_avp_rpo_adds_both_terms():
    rows = [0.30, 0.50], [0.45, 0.40], [0.32, 0.45], [0.44, 0.41]
    dpo = flow_dpo_loss(*losses(*rows), beta=10)
    plain = AVPRPOLoss(beta=10, normalisation="none")(*losses(*rows))
    assert plain["loss"].item() == pytest.approx(dpo.loss.item() + 0.4)
    assert plain["flow_win"].item() == pytest.approx(0.4)
    assert (plain["margin"], plain["accuracy"], plain["dpo"]) == (dpo.margin, dpo.accuracy, dpo.loss)
    assert AVPRPOLoss(10, "running_max")(*losses(*rows))["loss"].item() == pytest.approx(2.0)
    balanced = AVPRPOLoss(10)(*losses(*rows))
    assert balanced["scaled_dpo"].item() == pytest.approx(dpo.loss.item() / 10 / 0.4) and balanced["scaled_win"].item() == 1.0
    assert balanced["loss"].item() == pytest.approx(1 + dpo.loss.item() / 4)


def test_each_side_is_logged():
    found = AVPRPOLoss(beta=10)(*losses([0.30, 0.50], [0.45, 0.40], [0.32, 0.45], [0.44, 0.41]))
    wanted = {"flow_win": 0.4, "flow_lose": 0.425, "reference_win": 0.385, "reference_lose": 0.425, "margin_win": -0.015,
              "margin_lose": 0.0}
    assert {name: found[name].item() for name in wanted} == pytest.approx(wanted, abs=1e-7)
    assert found["margin"].item() == pytest.approx((found["margin_win"] + found["margin_lose"]).item(), abs=1e-7)
    assert (found["scaled_dpo"].item(), found["scaled_win"].item()) == (pytest.approx(found["dpo"].item() / 4), 1.0)
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]


def test_without_anchor_it_is_equation_4():
    rows = [0.30, 0.50], [0.45, 0.40], [0.32, 0.45], [0.44, 0.41]
    ours, plain = losses(*rows), losses(*rows)
    objective = AVPRPOLoss(beta=10, objective="dpo")
    found, expected = objective(*ours), flow_dpo_loss(*plain, beta=10)
    found["loss"].backward()
    expected.loss.backward()
    assert torch.equal(found["loss"], expected.loss) and torch.equal(found["dpo"], expected.loss.detach())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], plain[:2], strict=True))
    assert found["flow_win"].item() == pytest.approx(0.4)
    assert not any(name.startswith("scaled") for name in found) and not objective.state_dict()


def test_the_anchor_alone_learns_nothing_from_the_loser():
    """The control: the winner's flow loss as it stands, with all of the log."""
    win, lose, *reference = losses([0.30, 0.50], [0.45, 0.40], [0.32, 0.45], [0.44, 0.41])
    objective = AVPRPOLoss(beta=10, objective="flow_win")
    found = objective(win, lose, *reference)
    found["loss"].backward()
    assert found["loss"].item() == pytest.approx(0.4) and win.grad.tolist() == [0.5, 0.5] and lose.grad is None
    assert found.keys() == AVPRPOLoss(10, objective="dpo")(win, lose, *reference).keys() and not objective.state_dict()
    assert found["flow_win"].item() == pytest.approx(0.4) and not found["flow_win"].requires_grad


def shares(beta, kind, win=0.6):
    """Gradients of equation 5 at policy = reference by the winner's and the loser's flow loss: the preference's and the anchor's."""
    policy = losses([win], [0.7])
    AVPRPOLoss(beta, kind)(*policy, torch.tensor([win]), torch.tensor([0.7]))["loss"].backward()
    whole, lose = (side.grad.item() for side in policy)
    anchor = 1.0 if kind == "none" else 1 / win
    return whole - anchor, lose, anchor


@pytest.mark.parametrize("beta", [1, 50, 500])
def test_how_much_of_the_gradient_is_preference(beta):
    """216 to 1 with each term over its own maximum where beta is 500 and the winner's flow loss 0.6: one would hardly see the anchor."""
    win, lose, anchor = shares(beta, "balanced")
    assert anchor == pytest.approx(1 / 0.6) and win / anchor == pytest.approx(0.5, rel=1e-4) and -lose / anchor == pytest.approx(0.5)
    for kind in ("running_max", "detached"):
        win, lose, anchor = shares(beta, kind)
        assert win / anchor == pytest.approx(beta * 0.6 / (2 * math.log(2)), rel=1e-4) and -lose == pytest.approx(win, rel=1e-4)
    assert shares(500, "running_max")[0] / shares(500, "running_max")[2] == pytest.approx(216, abs=1)
    win, lose, anchor = shares(beta, "none")
    assert win / anchor == pytest.approx(beta / 2) == -lose


@given(st.sampled_from([1.0, 50.0, 500.0]), st.tuples(*[st.floats(0.01, 2)] * 4))
def test_balanced_preference_never_outweighs_the_anchor(beta, values):
    """Nor is a term above 1 where beta is ln 2 / s or more and the margin is not below ln 2 / beta - s."""
    policy_win, policy_lose, *reference = losses(*([value] for value in values))
    found = AVPRPOLoss(beta)(policy_win, policy_lose, *reference)
    found["loss"].backward()
    anchor = 1 / values[0]
    assert 0 <= -policy_lose.grad.item() <= anchor * (1 + 1e-5) and anchor <= policy_win.grad.item() * (1 + 1e-5) <= 2.001 * anchor
    assert found["scaled_win"].item() == 1.0
    if beta >= math.log(2) / values[0] and found["margin"].item() >= math.log(2) / beta - values[0]:
        assert 0 <= found["scaled_dpo"].item() <= 1 + 1e-5


@pytest.mark.parametrize(("kind", "lets_go"), [("balanced", True), ("running_max", True), ("none", True), ("detached", False)])
@pytest.mark.parametrize("beta", [1, 50, 500])
def test_a_decided_pair_is_let_go(kind, lets_go, beta):
    """Once beta times its margin is 10 the loser is pushed by less than a hundredth of what it was; by one scale it is pushed harder."""
    objective, pushed = AVPRPOLoss(beta, kind), []
    for margin in (0, 10 / beta):
        win, lose = losses([0.6], [0.7 + margin])
        objective(win, lose, torch.tensor([0.6]), torch.tensor([0.7]))["loss"].backward()
        pushed.append(-lose.grad.item())
    assert pushed[0] > 0
    if lets_go:
        assert pushed[1] < 0.01 * pushed[0]
    else:
        assert pushed[1] / pushed[0] == pytest.approx(2 * math.log(2), rel=1e-3)


@given(st.sampled_from(["running_max", "detached"]), st.floats(1e-4, 1e4), st.floats(1e-4, 1e4))
def test_neither_term_dominates_whatever_its_size(kind, dpo_size, win_size):
    """Parameters that scale each loss: what a relative change of one is worth lies between 0 and 1 for both, from the first pass on."""
    dpo_scale, win_scale = loss_normalisation(kind), loss_normalisation(kind)
    for share in (1.0, 0.5, 0.9):
        gains = torch.zeros(2, requires_grad=True)
        dpo, win = (size * share * gain.exp() for size, gain in zip((dpo_size, win_size), gains, strict=True))
        (dpo_scale(dpo) + win_scale(win)).backward()
        assert (gains.grad > 0).all() and gains.grad.max().item() <= 1 + 1e-6
        assert gains.grad[0].item() == pytest.approx(gains.grad[1].item(), rel=1e-4)


@pytest.mark.parametrize(("kind", "names"), [("balanced", {"scale_win.maximum"}),
                                             ("running_max", {"scale_dpo.maximum", "scale_win.maximum"})])
def test_avp_rpo_resumes_its_scales(kind, names):
    first, second = AVPRPOLoss(10, kind), AVPRPOLoss(10, kind)
    first(*losses([0.3], [0.4], [0.3], [0.5]))
    assert first.state_dict().keys() == names
    second.load_state_dict(first.state_dict())
    later = [0.2], [0.5], [0.3], [0.5]
    assert torch.equal(first(*losses(*later))["loss"], second(*losses(*later))["loss"])
    with pytest.raises(ValueError, match="beta is 0"):
        AVPRPOLoss(beta=0)


def _scale_on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    scale = RunningScale()
    scaled = scale(torch.tensor(1.0 if rank == 0 else 4.0))
    torch.save((scaled, scale.maximum), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_loss_of_all_ranks_is_scaled(tmp_path):
    """As one rank with the whole batch would: its mean of 1 and 4 is the maximum, and the mean of both ranks' terms is 1."""
    mp.spawn(_scale_on_rank, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [[value.item() for value in values] for values in results] == [[pytest.approx(0.4), 2.5], [pytest.approx(1.6), 2.5]]
