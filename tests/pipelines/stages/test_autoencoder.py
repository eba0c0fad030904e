"""The autoencoder's figure."""

import pytest
import torch

from pipelines.stages.autoencoder import relative_l1


def test_relative_l1_knows_its_ends():
    mel = torch.randn(4, 8, 50) + torch.arange(8.0)[:, None]
    assert relative_l1(mel, mel) == 0
    mean = mel.mean(dim=(0, 2), keepdim=True).expand_as(mel)
    assert relative_l1(mean, mel) == pytest.approx(1.0)
    assert relative_l1(mel + 0.5 * (mean - mel), mel) == pytest.approx(0.5)
