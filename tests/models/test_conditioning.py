"""A contrastive encoder as conditioner."""

import pytest
import torch

from models.conditioning import EncoderConditioner
from models.encoders.sf_cavp import PRESETS, SFCAVP


@pytest.fixture(scope="module")
def conditioner():
    torch.manual_seed(0)
    return EncoderConditioner(SFCAVP(PRESETS["tiny"]).eval())


def test_tokens_follow_the_segments(conditioner):
    config = conditioner.encoder.config
    conditions, segments = conditioner(torch.rand(2, 70, 3, 32, 32))
    assert segments.shape == (2, 2, config.video.out_dim)
    assert conditions.clip.shape == (2, 2 * 32 // config.video.alpha, conditioner.encoder.semantic_dim)
    assert conditions.sync.shape == (2, 64, conditioner.encoder.sync_dim)
    assert conditions.text is None


def test_fit_standardises_each_channel_that_moves(conditioner):
    batches = [torch.rand(4, 32, 3, 32, 32) * torch.rand(4, 1, 1, 1, 1) for _ in range(3)]
    conditioner.fit(batches)
    tokens = torch.cat([conditioner(frames)[0].sync for frames in batches]).flatten(0, 1)
    floor = 0.1 * conditioner.sync_std.square().mean().sqrt()
    moving = conditioner.sync_std > 1.5 * floor
    assert moving.sum() > 10
    torch.testing.assert_close(tokens.mean(0), torch.zeros_like(tokens[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(0)[moving], torch.ones(int(moving.sum())), atol=1e-3, rtol=0)
    assert tokens.std(0).max() < 1.001
