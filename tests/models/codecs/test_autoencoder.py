from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from models.codecs.autoencoder import PRESETS, MelVAE, MelVAEConfig
from models.codecs.magnitude_preserving import MPConv1d, mp_silu, mp_sum, normalise
from models.pretrained import export_mmaudio_vae, load_mmaudio_vae
from tests.fixtures.made_weights import PARITY, made_input, made_state, parity_arrays, parity_keys, relative_error

TINY = PRESETS["tiny"]


def published(preset: str) -> dict[str, torch.Tensor]:
    """The public checkpoint with made weights, by the rule of the parity fixtures."""
    state = made_state(parity_keys(f"vae_{preset}"))
    state["encoder.learnable_gain"] = state["decoder.learnable_gain"] = torch.tensor(0.1)
    for name, values in json.loads((PARITY / "vae_data_stats.json").read_text())[preset].items():
        state[name] = torch.tensor(values).view(1, -1, 1)
    return state


def sine_mels(count: int, bands: int = 80, frames: int = 64) -> torch.Tensor:
    """Smooth pictures of a kind that a small autoencoder learns in seconds."""
    random = torch.Generator().manual_seed(0)
    band, time = torch.linspace(0, 1, bands)[:, None], torch.linspace(0, 1, frames)
    rate, slant, phase = torch.rand(3, count, 1, 1, generator=random)
    return torch.sin(6.28 * ((1 + 4 * rate) * time + 2 * slant * band + phase))


@pytest.fixture(scope="module", params=["16k", "44k"])
def public(request):
    """Preset, checkpoint and the model that it gives."""
    state = published(request.param)
    return request.param, state, load_mmaudio_vae(state, request.param).eval()


def test_published_autoencoder_answers_as_the_reference_does(public):
    preset, _, vae = public
    expected = parity_arrays(f"mel_vae_{preset}")
    assert sum(p.numel() for p in vae.parameters()) == {"16k": 171_657_218, "44k": 305_479_682}[preset]
    with torch.no_grad():
        mean, std = vae.encode(expected["mel"])
        decoded = vae.decode(made_input("z", mean.shape))
    assert relative_error(mean, expected["posterior_mean"]) < 1e-4
    assert relative_error(std, expected["posterior_std"]) < 1e-4
    assert relative_error(decoded, expected["decoded"]) < 1e-4


@pytest.mark.parametrize("preset", ["16k", "44k"])
def test_state_dict_is_named_as_published(preset):
    with torch.device("meta"):
        state = MelVAE(PRESETS[preset]).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == parity_keys(f"vae_{preset}")


def test_a_published_autoencoder_goes_back_under_its_names(public):
    preset, state, vae = public
    back = export_mmaudio_vae(vae)
    assert {name: list(value.shape) for name, value in back.items()} == parity_keys(f"vae_{preset}")
    assert all(value.dtype == torch.float32 and torch.equal(value, state[name]) for name, value in back.items())
    again, mel = load_mmaudio_vae(back, preset).eval(), made_input("mel", (1, PRESETS[preset].bands, 8))
    latent = made_input("latent", (1, PRESETS[preset].latent_dim, 4))
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(vae.encode(mel), again.encode(mel), strict=True))
        assert torch.equal(vae.decode(latent), again.decode(latent))


@pytest.mark.parametrize("frames", [2, 64, 240])
def test_shapes(frames):
    vae = MelVAE(TINY)
    mean, std = vae.encode(torch.randn(3, 80, frames))
    assert mean.shape == std.shape == (3, TINY.latent_dim, frames // 2) and (std > 0).all()
    assert vae.decode(mean).shape == (3, 80, frames)


def test_any_level_may_halve_time():
    vae = MelVAE(replace(TINY, multipliers=(1, 1, 2), halved_level=1))
    mean, _ = vae.encode(torch.randn(1, 80, 32))
    assert mean.shape == (1, 16, 16) and vae.decode(mean).shape == (1, 80, 32)


def test_it_learns():
    torch.manual_seed(0)
    mels = -5 + 2 * sine_mels(16)
    vae = MelVAE(replace(TINY, multi_resolution_weight=0.5))
    std, mean = torch.std_mean(mels.transpose(0, 1).flatten(1), dim=1)
    vae.set_data_stats(mean, std)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    losses = []
    for _ in range(40):
        out = vae(mels, torch.randn(16, TINY.latent_dim, 32))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        losses.append(out["reconstruction"].item())
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        decoded = vae.eval().decode(vae.encode(mels)[0])
    assert (decoded - mels).abs().mean() < 0.35 * (mels - mels.mean(dim=(0, 2), keepdim=True)).abs().mean()


def test_loss_is_reconstruction_and_divergence():
    vae = MelVAE(replace(TINY, kl_weight=0.5)).eval()
    mel, noise = sine_mels(2), torch.randn(2, TINY.latent_dim, 32)
    out = vae(mel, noise)
    mean, std = vae.encode(mel)
    posterior, prior = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(posterior, prior).mean()
    reconstruction = (vae.decode(mean + std * noise) - mel).abs().mean()
    torch.testing.assert_close(out["kl"], kl)
    torch.testing.assert_close(out["reconstruction"], reconstruction)
    torch.testing.assert_close(out["loss"], reconstruction + 0.5 * kl)
    with_patches = MelVAE(replace(TINY, kl_weight=0.5, multi_resolution_weight=1.0)).eval()
    with_patches.load_state_dict(vae.state_dict())
    assert out["loss"] < with_patches(mel, noise)["loss"] <= out["loss"] + reconstruction


def test_data_statistics_standardise_inside():
    vae = MelVAE(TINY).eval()
    mel = sine_mels(2)
    plain = vae.encode(mel)[0]
    vae.set_data_stats(torch.full((80,), -5.0), torch.full((80,), 2.0))
    torch.testing.assert_close(vae.encode(2 * mel - 5)[0], plain, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="need 80, one per band"):
        vae.set_data_stats(torch.zeros(40), torch.ones(40))
    with pytest.raises(ValueError, match="std must be above 0"):
        vae.set_data_stats(torch.zeros(80), torch.zeros(80))


def test_only_the_direction_of_a_kernel_counts():
    conv = MPConv1d(8, 4, 3)
    x = torch.randn(2, 8, 16)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(7.0)
    torch.testing.assert_close(conv(x), before, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(conv(x, gain=2.0), 2 * conv(x))


def test_no_gradient_points_along_a_kernel():
    """Growing it changes nothing. So a step only ever lengthens kernels, until forced normalisation brings them back."""
    conv = MPConv1d(8, 4, 3)
    conv(torch.randn(1, 8, 4)).sum().backward()
    torch.testing.assert_close(conv.weight.flatten(1).norm(dim=1), torch.ones(4), rtol=1e-2, atol=0)
    assert (conv.weight * conv.weight.grad).sum(dim=(1, 2)).abs().max() < 1e-2 * conv.weight.grad.norm()


def test_layers_preserve_magnitude():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 64, 500, generator=random)
    for y in (mp_silu(a), mp_sum(a, b, 0.3), MPConv1d(64, 64, 3)(a), normalise(3 * a + 1, dim=1)):
        assert y.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)


def test_parameters_in_bfloat16_train_and_the_posterior_stays_in_float32():
    vae = MelVAE(TINY)
    for parameter in vae.parameters():
        parameter.data = parameter.data.bfloat16().reshape(parameter.shape or 1)
    mel, noise = sine_mels(2), torch.randn(2, TINY.latent_dim, 32)
    vae(mel, noise)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    mean, std = vae.encode(mel)
    assert mean.dtype == std.dtype == vae.decode(mean).dtype == torch.float32


def test_mels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 80, T\) with T even, not \(1, 80, 33\)"):
        MelVAE(TINY).encode(torch.zeros(1, 80, 33))
    with pytest.raises(ValueError, match=r"not \(1, 64, 32\)"):
        MelVAE(TINY).encode(torch.zeros(1, 64, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 0}, "hidden is 0: give a positive value"),
        ({"halved_level": 2}, "halved_level is 2: choose 0 to 1"),
        ({"residual_share": 1.0}, "residual_share is 1.0"),
        ({"kl_weight": -1.0}, "kl_weight, multi_resolution_weight"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MelVAEConfig(**{"bands": 80, "latent_dim": 16, "hidden": 64} | changes)
