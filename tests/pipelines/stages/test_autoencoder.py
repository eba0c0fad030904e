"""The autoencoder's figure, and its training against a discriminator."""

import json
from dataclasses import replace

import pytest
import torch

from models.codecs.adversarial import AdversarialConfig, AdversarialVAE
from models.codecs.autoencoder import PRESETS, MelVAE, MelVAEConfig
from models.codecs.discriminator import MelDiscriminatorConfig
from models.codecs.magnitude_preserving import MPConv1d
from models.pretrained import load_weights
from pipelines.config import AutoencoderConfig, Recipe, TrainConfig
from pipelines.engine.draws import Draws
from pipelines.recipes import load_recipe
from pipelines.stages.autoencoder import AutoencoderStage, relative_l1
from tests.fixtures.tiny_chain import tiny_shards
from tests.fixtures.two_ranks import run_on_two_ranks

ADVERSARIAL = AdversarialConfig(weight=0.1, start=3, discriminator=MelDiscriminatorConfig(scales=1, channels=4, layers=2))
VAE = replace(PRESETS["tiny"], hidden=8)


def stage():
    return AutoencoderStage(Recipe(autoencoder=AutoencoderConfig(model=VAE, adversarial=ADVERSARIAL, train=TrainConfig(batch_size=4))))


def test_relative_l1_knows_its_ends():
    mel = torch.randn(4, 8, 50) + torch.arange(8.0)[:, None]
    assert relative_l1(mel, mel) == 0
    mean = mel.mean(dim=(0, 2), keepdim=True).expand_as(mel)
    assert relative_l1(mean, mel) == pytest.approx(1.0)
    assert relative_l1(mel + 0.5 * (mean - mel), mel) == pytest.approx(0.5)


@pytest.mark.parametrize(("position", "begun"), [(8, False), (11, False), (12, True), (400, True)])
def test_the_discriminator_begins_at_its_step_on_every_rank(position, begun):
    """Position 12 is the first of step 3, the second rank's slice of step 2 ends at 11."""
    batch = {"position": torch.tensor([position]), "waveform": torch.randn(1, 8192)}
    found = stage().inputs(batch, Draws(0, batch["position"]), torch.device("cpu"))
    assert bool(found["adversarial"]) is begun and found["adversarial"].device.type == "cpu"


def test_the_export_is_the_autoencoder_alone(tmp_path):
    module = AdversarialVAE(MelVAE(VAE), ADVERSARIAL)
    stage().export(module.state_dict(), tmp_path)
    exported = load_weights(MelVAE, MelVAEConfig, tmp_path).state_dict()
    assert exported.keys() == module.vae.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in module.vae.state_dict().items())


def test_vggsound_trains_as_issue_5_asks():
    """Reconstruction at several sizes, divergence, kernels at unit norm; and still the sizes that a published checkpoint has."""
    config = load_recipe("vggsound").autoencoder
    assert config.model == PRESETS["16k"] and config.mel == "mmaudio_16k" and not config.weights
    assert config.model.kl_weight > 0 and config.model.multi_resolution_weight > 0 and config.model.forced_weight_norm


@pytest.mark.slow
def test_kernels_have_unit_norm_after_every_step(tmp_path):
    tiny_shards(tmp_path, clips=4, heldout=2)
    seen = run_on_two_ranks(__file__, "forced_norm_steps.py", tmp_path, "seen.json")
    assert len(seen) == 2
    for step in seen:
        assert step["before"] > 1e-3, "the optimiser's step alone leaves them longer"
        assert step["after"] < 1e-6
    vae = load_weights(MelVAE, MelVAEConfig, tmp_path / "autoencoder" / "export")
    kernels = [module.weight.flatten(1) for module in vae.modules() if isinstance(module, MPConv1d)]
    assert kernels and all((kernel.norm(dim=1) - 1).abs().max() < 1e-6 for kernel in kernels)
    lines = [json.loads(line) for line in (tmp_path / "autoencoder" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 2 and all(line["loss"] > line["reconstruction"] > 0 and line["kl"] > 0 for line in trained)


@pytest.mark.slow
def test_adversarial_steps_equal_plain_torch_under_zero(tmp_path):
    worst = run_on_two_ranks(__file__, "adversarial_steps.py", tmp_path, "worst.json")
    assert worst.keys() == {"0", "1", "2", "3"} and max(worst.values()) < 1e-5, worst
