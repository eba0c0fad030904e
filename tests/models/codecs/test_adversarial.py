"""The VAE and its discriminator in one backward pass: each learns what it would under an optimiser of its own."""

import copy
from dataclasses import replace

import pytest
import torch

from models.codecs.adversarial import AdversarialConfig, AdversarialVAE
from models.codecs.autoencoder import PRESETS, MelVAE
from models.codecs.discriminator import MelDiscriminator, MelDiscriminatorConfig, NormedConv2d
from models.objectives.adversarial import discriminator_loss, feature_matching_loss, generator_loss

VAE = replace(PRESETS["tiny"], hidden=16, multi_resolution_weight=0.5)
CONFIG = AdversarialConfig(weight=0.3, feature_weight=0.2, discriminator=MelDiscriminatorConfig(scales=2, channels=8, layers=2))
BEGUN, NOT_YET = torch.tensor(True), torch.tensor(False)


def made():
    torch.manual_seed(0)
    return AdversarialVAE(MelVAE(VAE), CONFIG)


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 80, 32, generator=generator), torch.randn(2, VAE.latent_dim, 16, generator=generator)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def test_gradients_are_those_of_two_optimisers():
    model = made()
    vae, critic = copy.deepcopy(model.vae), copy.deepcopy(model.discriminator)
    model(*batch(), BEGUN)["loss"].backward()

    losses, target, decoded = vae.reconstruct(*batch())
    critic.requires_grad_(False)
    real, judged = critic(target), critic(decoded)
    fooled, matching = generator_loss(judged.scores), feature_matching_loss(real.features, judged.features)
    (losses["loss"] + CONFIG.weight * fooled + CONFIG.feature_weight * matching).backward()
    critic.requires_grad_(True)
    discriminator_loss(critic(target).scores, critic(decoded.detach()).scores).backward()

    for mine, expected in ((model.vae, vae), (model.discriminator, critic)):
        for name, gradient in gradients(expected).items():
            torch.testing.assert_close(gradients(mine)[name], gradient, rtol=1e-4, atol=1e-7)


def test_before_its_time_the_discriminator_is_not_there():
    model = made()
    found = model(*batch(), NOT_YET)
    torch.testing.assert_close(found, MelVAE.forward(model.vae, *batch()))
    found["loss"].backward()
    assert all(gradient is None for gradient in gradients(model.discriminator).values())


def test_a_frozen_judgement_is_the_same_and_teaches_the_mel_only():
    critic, mel = MelDiscriminator(CONFIG.discriminator), torch.randn(2, 80, 32, requires_grad=True)
    free, frozen = critic(mel), critic(mel, frozen=True)
    torch.testing.assert_close(frozen, free, rtol=0, atol=0)
    sum(scores.sum() for scores in frozen.scores).backward()
    assert mel.grad.abs().sum() > 0
    assert all(gradient is None for gradient in gradients(critic).values())


def test_every_scale_judges_half_as_many_patches_each_way():
    found = MelDiscriminator(MelDiscriminatorConfig(scales=3, channels=4, layers=3))(torch.randn(2, 80, 64))
    assert [tuple(s.shape) for s in found.scores] == [(2, 1, 10, 8), (2, 1, 5, 4), (2, 1, 3, 2)]
    assert len(found.features) == 9


def test_kernels_have_a_direction_and_a_gain():
    conv, x = NormedConv2d(3, 5, 3), torch.randn(1, 3, 8, 8)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(7)
    torch.testing.assert_close(conv(x), before)
    with torch.no_grad():
        conv.gain.mul_(2)
    torch.testing.assert_close(conv(x), 2 * before)


def test_the_discriminator_learns_to_tell_true_from_made():
    torch.manual_seed(0)
    critic = MelDiscriminator(CONFIG.discriminator)
    optimiser = torch.optim.AdamW(critic.parameters(), lr=3e-3)
    for _ in range(40):
        true, made = torch.randn(4, 80, 32).cumsum(dim=2) / 4, torch.randn(4, 80, 32)
        loss = discriminator_loss(critic(true).scores, critic(made).scores)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5


@pytest.mark.parametrize(("make", "message"), [
    (lambda: AdversarialConfig(weight=-1), "AdversarialConfig.weight is -1: give 0 or more"),
    (lambda: MelDiscriminatorConfig(scales=0), "MelDiscriminatorConfig.scales is 0: give 1 or more"),
])
def test_impossible_configs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
