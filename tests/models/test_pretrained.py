from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

from models.codecs.autoencoder import PRESETS as VAE_PRESETS
from models.codecs.autoencoder import MelVAE, MelVAEConfig
from models.encoders.sf_cavp import PRESETS as CAVP_PRESETS
from models.encoders.sf_cavp import SFCAVP, SFCAVPConfig
from models.generators.mmdit import PRESETS as MMDIT_PRESETS
from models.generators.mmdit import MMDiT
from models.pretrained import (
    MMAUDIO_VAES,
    MMAUDIO_VARIANTS,
    export_mmaudio,
    export_mmaudio_vae,
    load_mmaudio,
    load_mmaudio_vae,
    load_slowfast_r50,
    load_synchformer,
    load_weights,
    mmaudio_vae_preset,
    mmaudio_variant,
    save_weights,
)
from tests.fixtures.made_weights import made_state, parity_keys


def zeros(keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A checkpoint of the right names and shapes that takes no time to draw."""
    return {name: torch.zeros(shape) for name, shape in keys.items()}


@pytest.fixture(scope="module")
def vae() -> MelVAE:
    torch.manual_seed(0)
    model = MelVAE(VAE_PRESETS["tiny"])
    model.set_data_stats(torch.randn(80), torch.rand(80) + 0.5)
    return model


def test_mmaudio_loads_and_its_old_tables_are_dropped():
    state = zeros(parity_keys("mmdit_small_16k"))
    state["empty_clip_feat"] += 3
    tables = {"t_embed.freqs": torch.zeros(128), "latent_rot": torch.zeros(1, 250, 32, 2, 2), "clip_rot": torch.zeros(1, 64, 32, 2, 2)}
    model = load_mmaudio(state | tables, "small_16k")
    assert isinstance(model, MMDiT) and sum(p.numel() for p in model.parameters()) >= 157_000_000
    assert (model.empty_clip_feat == 3).all()


def test_mmaudio_goes_back_under_the_names_it_came_with():
    state = zeros(parity_keys("mmdit_small_16k"))
    state["latent_std"] += 2
    longer = replace(MMDIT_PRESETS["small_16k"], latent_len=313, clip_len=80, sync_len=240)
    model = load_mmaudio(state, longer)
    back = export_mmaudio(model)
    assert mmaudio_variant(model) == "small_16k" and back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize("variant", MMAUDIO_VARIANTS)
def test_every_variant_is_known_by_its_sizes(variant):
    with torch.device("meta"):
        model = MMDiT(MMDIT_PRESETS[variant])
    assert mmaudio_variant(model) == variant and len(model.state_dict()) == (416 if "large" in variant else 251)


def test_another_generator_is_no_mmaudio():
    with torch.device("meta"):
        other = MMDiT(replace(MMDIT_PRESETS["tiny"], final_layer_extended_condition=True))
    with pytest.raises(ValueError, match="has the sizes of none of MMAudio's variants"):
        export_mmaudio(other)


@pytest.mark.parametrize("preset", MMAUDIO_VAES)
def test_an_autoencoder_is_known_however_it_was_trained(preset):
    config = replace(VAE_PRESETS[preset], kl_weight=1e-6, multi_resolution_weight=0.0, forced_weight_norm=False)
    assert mmaudio_vae_preset(config) == mmaudio_vae_preset(VAE_PRESETS[preset]) == preset


@pytest.mark.parametrize("change", [{"hidden": 32}, {"latent_dim": 40}, {"residual_share": 0.5}, {"activation_limit": 64.0}])
def test_another_autoencoder_is_no_mmaudio(change):
    """The last two have MMAudio's names and shapes: its code would load them, and answer otherwise."""
    with torch.device("meta"):
        other = MelVAE(replace(VAE_PRESETS["16k"], **change))
    with pytest.raises(ValueError, match=r"has the sizes of none of MMAudio's \(16k, 44k\): its code cannot load it$"):
        export_mmaudio_vae(other)


def test_slowfast_takes_every_public_weight_but_the_classifier():
    state = made_state(parity_keys("slowfast_r50_video"), unit_vectors=True)
    ours = load_slowfast_r50({"model_state": state}).state_dict()
    theirs = {name: value for name, value in state.items() if not name.startswith("blocks.6.")}
    assert len(ours) == len(theirs) == 660
    pairs = {
        "slow_stem.0.conv.weight": "blocks.0.multipathway_blocks.0.conv.weight",
        "fast_stem.0.norm.running_var": "blocks.0.multipathway_blocks.1.norm.running_var",
        "laterals.3.0.conv.weight": "blocks.3.multipathway_fusion.conv_fast_to_slow.weight",
        "slow_stages.2.0.shortcut.norm.bias": "blocks.3.multipathway_blocks.0.res_blocks.0.branch1_norm.bias",
        "fast_stages.3.2.c.conv.weight": "blocks.4.multipathway_blocks.1.res_blocks.2.branch2.conv_c.weight",
    }
    assert all(torch.equal(ours[a], theirs[b]) for a, b in pairs.items())


def test_synchformers_eyes_are_taken_out_of_the_whole_model():
    state = zeros(parity_keys("synchformer_visual"))
    state["vfeat_extractor.blocks.11.timeattn.qkv.bias"] += 2
    others = zeros({"afeat_extractor.ast.layernorm.bias": [768], "vproj.weight": [768, 768], "transformer.OFF_tok": [1, 1, 768]})
    ours = load_synchformer({"model": state | others}).state_dict()
    unused = ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert sorted(ours) == sorted({name.removeprefix("vfeat_extractor.") for name in state} - set(unused))
    assert (ours["blocks.11.timeattn.qkv.bias"] == 2).all() and (ours["blocks.10.timeattn.qkv.bias"] == 0).all()


def test_a_synchformer_that_does_not_fit_is_explained():
    state = zeros(parity_keys("synchformer_visual"))
    del state["vfeat_extractor.spatial_attn_agg.cls_token"]
    state["vfeat_extractor.temp_embed"] = torch.zeros(1, 4, 768)
    state["vfeat_extractor.temporal_attn_agg.cls_token"] = torch.zeros(1, 1, 768)
    with pytest.raises(ValueError) as error:
        load_synchformer(state)
    assert str(error.value) == (
        "Synchformer checkpoint does not fit Synchformer: 1 missing (spatial_attn_agg.cls_token), 1 not known "
        "(temporal_attn_agg.cls_token), 1 of another shape (temp_embed); take the file published with Synchformer or with MMAudio"
    )
    with pytest.raises(ValueError, match=r"none of its 1 names starts with vfeat_extractor\. \(audio\.weight\)"):
        load_synchformer({"audio.weight": torch.zeros(1)})


def test_a_checkpoint_that_does_not_fit_is_explained():
    state = zeros(parity_keys("slowfast_r50_video"))
    del state["blocks.0.multipathway_blocks.0.conv.weight"]
    state["blocks.9.extra"] = torch.zeros(1)
    state["blocks.0.multipathway_fusion.norm.bias"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:
        load_slowfast_r50(state)
    assert str(error.value) == (
        "PyTorchVideo slowfast_r50 checkpoint does not fit SlowFast: 1 missing (slow_stem.0.conv.weight), 1 not known (blocks.9.extra), "
        "1 of another shape (laterals.0.0.norm.bias); choose the preset it was made with"
    )


def test_a_wrong_preset_is_named():
    with pytest.raises(ValueError, match="no preset '48k': choose one of 16k, 44k, tiny"):
        load_mmaudio_vae({}, "48k")
    with pytest.raises(ValueError, match=r"MelVAE: 31 missing \(.*, \.\.\.\)"):
        load_mmaudio_vae({}, "tiny")


def test_weights_come_back_as_they_were_saved(tmp_path, vae):
    save_weights(vae, vae.config, tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["config.json", "weights.safetensors"]
    again = load_weights(MelVAE, MelVAEConfig, tmp_path / "export")
    assert again.config == vae.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), vae.state_dict().values(), strict=True))


def test_nested_configs_come_back_equal(tmp_path):
    config = replace(CAVP_PRESETS["tiny"], hop_frames=16, video_mean=(0.1, 0.2, 0.3))
    save_weights(SFCAVP(config), config, tmp_path)
    assert load_weights(SFCAVP, SFCAVPConfig, tmp_path).config == config


def test_what_cannot_be_loaded_is_explained(tmp_path, vae):
    with pytest.raises(FileNotFoundError, match="config.json is missing: name a folder written by save_weights"):
        load_weights(MelVAE, MelVAEConfig, tmp_path)
    save_weights(vae, vae.config, tmp_path)
    with pytest.raises(ValueError, match="config.json is no SFCAVPConfig: unknown field activation_limit, bands, decoder_blocks, ..."):
        load_weights(SFCAVP, SFCAVPConfig, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden": 32}))
    with pytest.raises(ValueError, match="weights.safetensors does not fit MelVAE: 2[0-9] of another shape"):
        load_weights(MelVAE, MelVAEConfig, tmp_path)
    del config["bands"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json is no MelVAEConfig: missing field bands"):
        load_weights(MelVAE, MelVAEConfig, tmp_path)


@dataclass
class NotATensor:
    """What a foreign checkpoint may hold beside tensors."""

    epoch: int = 3

