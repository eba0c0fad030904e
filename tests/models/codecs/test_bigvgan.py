from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from data_prep.audio import MEL_SPECS, log_mel
from models.codecs.bigvgan import PRESETS, BigVGAN, BigVGANConfig, load_bigvgan
from tests.fixtures.made_weights import made_state, relative_error

pytest.importorskip("bigvgan", reason="needs the extra bigvgan")

TINY = {name: replace(config, channels=128, block_kernels=(3, 7)) for name, config in PRESETS.items()}


def made_network(config: BigVGANConfig) -> torch.nn.Module:
    """The package's generator, its weights made, as it is published: with weight norm."""
    network = BigVGAN(config).network
    made = made_state({name: value.shape for name, value in network.state_dict().items() if not name.endswith("filter")})
    # Sizes of the rows: near one, or the sound would vanish from layer to layer.
    made = {name: value.abs() + 1 if name.endswith("weight_g") else value for name, value in made.items()}
    network.load_state_dict(made, strict=False)
    return network.eval()


@pytest.fixture(scope="module", params=["16k", "44k"])
def preset(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(preset) -> torch.nn.Module:
    return made_network(TINY[preset])


@pytest.fixture(scope="module")
def vocoder(preset, network, tmp_path_factory) -> BigVGAN:
    path = tmp_path_factory.mktemp("weights") / "generator.pt"
    torch.save({"generator": network.state_dict()}, path)
    return load_bigvgan(path, TINY[preset])


def mel(preset: str, batch: int = 2, seconds: float = 0.25) -> torch.Tensor:
    """Log-mels of noise that swells, by the front end that the vocoder names."""
    spec = MEL_SPECS[PRESETS[preset].mel]
    samples = round(seconds * spec.sample_rate)
    noise = torch.randn(batch, samples, generator=torch.Generator().manual_seed(0))
    return log_mel(0.2 * torch.linspace(0, 1, samples) * noise, spec)


PUBLISHED = {
    "16k": {
        "conv_pre.weight_v": (1536, 80, 7),
        "ups.0.0.weight_g": (1536, 1, 1),
        "ups.0.0.weight_v": (1536, 768, 8),
        "resblocks.17.convs2.2.weight_v": (24, 24, 11),
        "resblocks.0.activations.5.act.beta": (768,),
        "resblocks.0.activations.5.upsample.filter": (1, 1, 12),
        "activation_post.downsample.lowpass.filter": (1, 1, 12),
        "conv_post.bias": (1,),
    },
    "44k": {
        "conv_pre.weight_v": (1536, 128, 7),
        "ups.0.0.weight_v": (1536, 768, 16),
        "ups.5.0.weight_v": (48, 24, 4),
        "resblocks.17.activations.0.act.alpha": (24,),
        "conv_post.weight_v": (1, 24, 7),
    },
}


@pytest.mark.parametrize(("name", "names", "parameters"), [("16k", 784, 112_231_250), ("44k", 783, 122_184_529)])
def test_published_checkpoints_have_these_names(name, names, parameters):
    with torch.device("meta"):
        network = BigVGAN(PRESETS[name]).network
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert len(shapes) == names and PUBLISHED[name].items() <= shapes.items()
    assert ("conv_post.bias" in shapes) == (name == "16k")
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_each_takes_the_log_mel_it_was_trained_on(preset):
    config, spec = PRESETS[preset], MEL_SPECS[PRESETS[preset].mel]
    assert (config.bands, config.hop) == (spec.bands, spec.hop) == {"16k": (80, 256), "44k": (128, 512)}[preset]
    assert spec.log == {"16k": "log10", "44k": "ln"}[preset]
    assert config.name == {"16k": "bigvgan_v1_16k", "44k": "bigvgan_v2_44k"}[preset]


def test_waveform_is_that_of_the_network_with_its_weight_norm(preset, network, vocoder):
    log_mels = mel(preset)
    with torch.no_grad():
        expected = network(log_mels)[:, 0]
    waveform = vocoder.vocode(log_mels)
    assert waveform.shape == (2, log_mels.shape[2] * PRESETS[preset].hop) and waveform.dtype == torch.float32
    assert waveform.std() > 1e-3 and waveform.abs().max() <= 1
    assert relative_error(waveform, expected) < 1e-4
    assert vocoder.name == PRESETS[preset].name


def test_weight_norm_is_removed_and_nothing_trains(vocoder):
    assert not any(name.endswith(("weight_g", "weight_v")) for name in vocoder.state_dict())
    assert not vocoder.training and not any(p.requires_grad for p in vocoder.parameters())


def test_the_same_mel_gives_the_same_waveform_alone_or_in_a_batch(preset, vocoder):
    log_mels = mel(preset)
    together = vocoder.vocode(log_mels)
    assert torch.equal(together, vocoder.vocode(log_mels))
    torch.testing.assert_close(vocoder.vocode(log_mels[1:])[0], together[1], rtol=0, atol=1e-5)


def test_a_loud_waveform_stays_within_bounds(preset, network, tmp_path):
    state = {name: 1e3 * value if name == "conv_post.weight_g" else value for name, value in network.state_dict().items()}
    torch.save(state, tmp_path / "loud.pt")
    waveform = load_bigvgan(tmp_path / "loud.pt", TINY[preset]).vocode(mel(preset))
    assert waveform.abs().max() <= 1 and (waveform.abs() > 0.99).float().mean() > 0.1


def test_a_copy_saved_without_weight_norm_loads(preset, vocoder, tmp_path):
    safetensors.torch.save_file(vocoder.network.state_dict(), tmp_path / "vocoder.safetensors")
    again = load_bigvgan(tmp_path / "vocoder.safetensors", TINY[preset])
    assert torch.equal(again.vocode(mel(preset)), vocoder.vocode(mel(preset)))


def test_what_does_not_fit_is_refused(preset, vocoder, network, tmp_path):
    bands = PRESETS[preset].bands
    with pytest.raises(ValueError, match=rf"{vocoder.name} takes log-mels \(B, {bands}, T\) of mmaudio_{preset}, not \(1, 64, 5\)"):
        vocoder.vocode(torch.zeros(1, 64, 5))
    torch.save({"generator": network.state_dict()}, tmp_path / "generator.pt")
    other = {"16k": "44k", "44k": "16k"}[preset]
    with pytest.raises(ValueError, match=r"generator.pt does not fit BigVGAN: .*choose the preset it was made with, of 16k, 44k"):
        load_bigvgan(tmp_path / "generator.pt", TINY[other])
    with pytest.raises(ValueError, match="no BigVGAN preset '22k': choose one of 16k, 44k"):
        load_bigvgan(tmp_path / "generator.pt", "22k")


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"kernels is \(8, 8\): give one per stage of rates"):
        replace(PRESETS["16k"], kernels=(8, 8))
    with pytest.raises(ValueError, match=r"kernels is \(7, 8, 4, 4, 4, 4\): give rates"):
        replace(PRESETS["16k"], kernels=(7, 8, 4, 4, 4, 4))
    with pytest.raises(ValueError, match="channels is 100: stages halve it, choose a multiple of 64"):
        replace(PRESETS["16k"], channels=100)


def test_a_missing_package_is_named(monkeypatch):
    for name in ("bigvgan", "bigvgan.bigvgan"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"^BigVGAN needs the package bigvgan: pip install 'foleyscale\[bigvgan\]'"):
        BigVGAN(TINY["16k"])


def test_the_package_is_imported_when_first_needed():
    code = "import sys, models.codecs.bigvgan; sys.exit(bool({'bigvgan', 'librosa'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
