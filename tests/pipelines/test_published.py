"""A run's autoencoder for MMAudio's own code; runs with the published sizes are in tests/launch/test_published.py."""

from dataclasses import replace

import pytest
import torch

from models.codecs import autoencoder
from models.codecs.autoencoder import PRESETS, MelVAE
from models.pretrained import load_mmaudio_vae, save_weights
from pipelines.published import export_public_vae
from pipelines.recipes import dump_recipe, load_recipe
from pipelines.sounding import RunError

SMALL = replace(PRESETS["tiny"], hidden=8)


def trained(folder, config, *overrides):
    """A run in which no more than an autoencoder is complete."""
    torch.manual_seed(0)
    vae = MelVAE(config)
    vae.set_data_stats(torch.randn(config.bands), torch.rand(config.bands) + 0.5)
    save_weights(vae, config, folder / "autoencoder" / "export")
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("demo", overrides)))
    return vae


def test_a_trained_autoencoder_goes_to_mmaudio(tmp_path, monkeypatch):
    """Of another size than the published ones, for the time being; how it was trained does not matter."""
    monkeypatch.setitem(autoencoder.PRESETS, "16k", SMALL)
    vae = trained(tmp_path, replace(SMALL, kl_weight=1e-6, forced_weight_norm=True, multi_resolution_weight=0.1))
    assert export_public_vae(tmp_path, tmp_path / "new" / "v1-16.pth") == "16k"
    back = torch.load(tmp_path / "new" / "v1-16.pth", weights_only=True)
    again = load_mmaudio_vae(back, "16k")
    assert again.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in vae.state_dict().items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["v1-16.pth"]


def test_one_that_mmaudio_would_not_understand_is_refused(tmp_path, monkeypatch):
    trained(tmp_path, SMALL)
    with pytest.raises(ValueError, match=r"^this autoencoder has the sizes of none of MMAudio's \(16k, 44k\): its code cannot load it$"):
        export_public_vae(tmp_path, tmp_path / "v1-16.pth")
    monkeypatch.setitem(autoencoder.PRESETS, "44k", SMALL)
    with pytest.raises(ValueError, match="codes the log-mels mmaudio_16k; MMAudio's code would give it those of mmaudio_44k$"):
        export_public_vae(tmp_path, tmp_path / "v1-16.pth")
    assert not (tmp_path / "v1-16.pth").exists()


def test_a_run_without_one_says_so(tmp_path):
    with pytest.raises(RunError, match="autoencoder/export is missing: finish the run"):
        export_public_vae(tmp_path, tmp_path / "v1-16.pth")
