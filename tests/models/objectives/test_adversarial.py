"""Adversarial losses against their definitions."""

import pytest
import torch

from models.objectives.adversarial import discriminator_loss, feature_matching_loss, generator_loss


def test_hinge_rests_beyond_one():
    sure = [torch.tensor([1.0, 3.0]), torch.tensor([[2.0]])]
    assert discriminator_loss(sure, [-s for s in sure]) == 0
    undecided = [torch.zeros(4), torch.zeros(1, 2)]
    assert discriminator_loss(undecided, undecided) == 2
    assert discriminator_loss([torch.tensor([0.5])], [torch.tensor([-3.0])]).item() == pytest.approx(0.5)


def test_generator_wants_high_scores_at_every_scale_alike():
    scores = [torch.tensor([1.0, 3.0], requires_grad=True), torch.full((100,), 4.0, requires_grad=True)]
    loss = generator_loss(scores)
    assert loss.item() == -3
    loss.backward()
    assert scores[0].grad.sum() == scores[1].grad.sum() == -0.5


def test_feature_distance_is_relative_and_moves_the_made_side_only():
    real, made = torch.tensor([1.0, -3.0], requires_grad=True), torch.tensor([2.0, -3.0], requires_grad=True)
    loss = feature_matching_loss([real, 10 * real], [made, 10 * made])
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    assert real.grad is None and made.grad[0] > 0
