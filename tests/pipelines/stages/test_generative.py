"""The flow model's loss, and its control with shuffled videos."""

import dataclasses

import pytest
import torch

from models.generators.mmdit import PRESETS, MMDiT
from models.objectives.flow_matching import flow_loss
from pipelines.stages.generative import FlowModel, flow_losses

CONFIG = dataclasses.replace(PRESETS["tiny"], latent_dim=4, hidden=32, clip_dim=8, sync_dim=8, latent_len=12, clip_len=6, sync_len=32)
CPU, PARTNERS = torch.device("cpu"), torch.arange(6).roll(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    generator = MMDiT(CONFIG)
    for parameter in generator.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    generator.set_latent_stats(torch.tensor([1.0, 2, 3, 4]), torch.tensor([2.0, 1, 1, 0.5]))
    return FlowModel(generator).eval()


def clips(count=6):
    generator = torch.Generator().manual_seed(2)
    return {"latent_mean": torch.randn(count, 12, 4, generator=generator), "clip": torch.randn(count, 6, 8, generator=generator),
            "sync": torch.randn(count, 32, 8, generator=generator)}


def test_loss_is_that_of_the_definition(model):
    batch, noise, t = clips(), torch.randn(6, 12, 4), torch.rand(6)
    data = (batch["latent_mean"] - model.generator.latent_mean) / model.generator.latent_std
    x_t = t[:, None, None] * data + (1 - t[:, None, None]) * noise
    expected = flow_loss(model.generator(x_t, batch["clip"], batch["sync"], None, t), data - noise)
    arguments = {"latent": batch["latent_mean"], "noise": noise, "t": t, "clip": batch["clip"], "sync": batch["sync"]}
    torch.testing.assert_close(model.per_clip(**arguments), expected)
    torch.testing.assert_close(model(**arguments)["loss"], expected.mean())


def test_shuffling_is_the_only_difference(model):
    batch = clips()
    right, wrong = (flow_losses(model, batch, CPU, batch_size=3, videos=videos) for videos in (None, PARTNERS))
    assert right.shape == wrong.shape == (6,) and not torch.equal(right, wrong)
    same = batch | {name: batch[name][:1].expand(6, -1, -1) for name in ("clip", "sync")}
    right, wrong = (flow_losses(model, same, CPU, batch_size=3, videos=videos) for videos in (None, PARTNERS))
    torch.testing.assert_close(right, wrong)


def test_a_clip_keeps_its_noise_and_times_without_another(model):
    """Of its position, when that is told; by row alone they are those of other clips."""
    batch, kept = clips(4), torch.tensor([0, 2, 3])
    left = {name: values[kept] for name, values in batch.items()}
    whole = flow_losses(model, batch, CPU, batch_size=2, positions=torch.arange(20, 24))
    found = flow_losses(model, left, CPU, batch_size=2, positions=kept + 20)
    torch.testing.assert_close(found, whole[kept], rtol=1e-6, atol=1e-6)
    by_row = flow_losses(model, left, CPU, batch_size=2)
    of_all = flow_losses(model, batch, CPU, batch_size=2)
    assert not torch.isclose(by_row[1:], of_all[kept[1:]], rtol=1e-3).any() and torch.isclose(by_row[0], of_all[0], rtol=1e-6)


def test_latent_statistics_are_not_saved_twice(model):
    assert all(name.startswith("generator.") for name in model.state_dict())
