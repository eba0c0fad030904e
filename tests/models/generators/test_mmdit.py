"""MM-DiT: parity with the public MMAudio model, then its behaviour at a laptop's size."""

import copy
import dataclasses
import math

import pytest
import safetensors.torch
import torch

from models.generators.mmdit import PRESETS, MMDiT, MMDiTConfig, TopBlocks
from models.objectives.flow_matching import flow_loss, interpolate
from models.pretrained import load_mmaudio, load_weights, save_weights
from tests.fixtures.made_weights import made_input, made_state, parity_arrays, parity_keys, relative_error

TINY = PRESETS["tiny"]
EMPTIES = ("empty_clip_feat", "empty_sync_feat", "sync_pos_emb")
STORED = ("empty_string_feat", "latent_mean", "latent_std")


def shapes(model):
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def on_meta(config):
    with torch.device("meta"):
        return MMDiT(config)


def made_model(config=TINY):
    """Model with made weights: unlike a fresh one, none of its gates is closed."""
    model = MMDiT(config)
    model.load_state_dict(made_state(shapes(model)))
    return model


def tiny_inputs(batch=2, latents=120, config=TINY):
    clip, sync = config.condition_lengths(latents)
    return {
        "latent": made_input("latent", (batch, latents, config.latent_dim)),
        "clip": made_input("clip", (batch, clip, config.clip_dim)),
        "sync": made_input("sync", (batch, sync, config.sync_dim)),
        "text": made_input("text", (batch, config.text_len, config.text_dim)),
        "t": torch.linspace(0.2, 0.8, batch),
    }


@pytest.fixture(scope="module")
def small_16k():
    model = on_meta(PRESETS["small_16k"])
    model.load_state_dict(made_state(parity_keys("mmdit_small_16k")), strict=True, assign=True)
    return model


@pytest.fixture(scope="module")
def tiny():
    return made_model().requires_grad_(False)


def test_names_and_shapes_are_those_of_the_public_checkpoint():
    keys = parity_keys("mmdit_small_16k")
    assert len(keys) == 251
    assert shapes(on_meta(PRESETS["small_16k"])) == keys


@pytest.mark.parametrize(
    ("preset", "parameters", "keys"),
    [
        ("small_16k", 157_283_644, 251),
        ("small_44k", 157_409_144, 251),
        ("medium_44k", 621_805_944, 251),
        ("large_44k", 1_030_002_168, 416),
        ("large_44k_v2", 1_030_575_608, 416),
    ],
)
def test_parameter_counts_of_the_public_variants(preset, parameters, keys):
    model = on_meta(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == keys


def public_keys(preset):
    """Names and shapes of the public checkpoint, from those of small_16k: wider layers, more blocks, the indices of the second release."""
    config = PRESETS[preset]
    sizes = {20: config.latent_dim}
    if config.hidden == 896:
        sizes |= {448: 896, 896: 1792, 1280: 2560, 1344: 2688, 2688: 5376}
    keys = {}
    for name, shape in parity_keys("mmdit_small_16k").items():
        shape = [sizes.get(size, size) for size in shape]
        kind, *rest = name.split(".")
        copies = [name]
        if kind == "joint_blocks":
            last = config.depth - config.fused_depth - 1
            number = {0: range(last), 3: [last]}.get(int(rest[0]), ())
            copies = [".".join((kind, str(i), *rest[1:])) for i in number]
        if kind == "fused_blocks":
            copies = [".".join((kind, str(i), *rest[1:])) for i in (range(config.fused_depth) if rest[0] == "0" else ())]
        if config.v2 and kind in ("clip_input_proj", "text_input_proj") and rest[0] == "1":
            copies = [".".join((kind, "2", *rest[1:]))]
        if config.v2 and name == "t_embed.mlp.0.weight":
            shape = [896, 896]
        keys |= dict.fromkeys(copies, shape)
    return keys


@pytest.mark.parametrize("preset", ["small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2"])
def test_every_public_checkpoint_fits_strictly(preset):
    model, keys = on_meta(PRESETS[preset]), public_keys(preset)
    assert shapes(model) == keys
    model.load_state_dict({name: torch.empty(shape, device="meta") for name, shape in keys.items()}, strict=True, assign=True)


@pytest.mark.parametrize("v2", [False, True])
def test_exported_weights_load_under_the_same_names(tmp_path, v2):
    model = made_model(dataclasses.replace(TINY, v2=v2))
    save_weights(model, model.config, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert stored.keys() == model.state_dict().keys()
    again = load_weights(MMDiT, MMDiTConfig, tmp_path)
    assert torch.equal(again(**tiny_inputs()), model(**tiny_inputs()))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small_16k", "small_44k"])
def test_a_public_checkpoint_comes_back_as_it_went_in(tmp_path, preset):
    state = made_state(public_keys(preset))
    save_weights(load_mmaudio(state, preset), PRESETS[preset], tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], value) for name, value in state.items())


def test_second_release_has_an_activation_before_every_mlp():
    names = shapes(on_meta(PRESETS["large_44k_v2"]))
    for projection in ("audio", "clip", "sync", "text"):
        assert f"{projection}_input_proj.2.w1.weight" in names
    assert names["t_embed.mlp.0.weight"] == [896, 896]


def test_preference_training_touches_the_top_only():
    assert sum(p.numel() for p in on_meta(PRESETS["small_16k"]).top_parameters()) == 8_039_060


@torch.no_grad()
def test_agrees_with_the_public_model(small_16k):
    shapes = {"latent": (2, 250, 20), "clip": (2, 64, 1024), "sync": (2, 192, 768), "text": (2, 77, 1024)}
    latent, clip, sync, text = (made_input(name, shape) for name, shape in shapes.items())
    expected = parity_arrays("mmdit_small_16k")
    assert relative_error(small_16k(latent, clip, sync, text, torch.tensor([0.1, 0.7])), expected["flow"]) < 1e-5
    guided = small_16k.guided_flow(latent, torch.full((2,), 0.3), clip, sync, text, strength=4.5)
    assert relative_error(guided, expected["cfg_flow"]) < 1e-5


def test_missing_conditions_are_as_long_as_is_said(tiny):
    inputs = {**tiny_inputs(), "clip": None, "sync": None}
    empty = {"clip": tiny.empty_clip_feat.expand(2, 20, -1), "sync": tiny.empty_sync_feat.expand(2, 64, -1)}
    expected = tiny(**{**inputs, **empty})
    torch.testing.assert_close(tiny(**inputs, lengths=(20, 64)), expected)
    assert not torch.allclose(tiny(**inputs), expected, atol=1e-3)
    # A condition that is there keeps its own length, and so does the empty one of guidance.
    half = {**inputs, "sync": tiny_inputs()["sync"]}
    unconditional = {"clip": empty["clip"], "sync": tiny.empty_sync_feat.expand(2, 96, -1), "text": None}
    expected = 2 * tiny(**{**half, "clip": empty["clip"]}) - tiny(**{**half, **unconditional})
    latent, t = half.pop("latent"), half.pop("t")
    torch.testing.assert_close(tiny.guided_flow(latent, t, **half, strength=2.0, lengths=(20, 64)), expected)


@pytest.mark.parametrize("lengths", [(0, 32), (20, 60), (20, 0)])
def test_impossible_lengths(tiny, lengths):
    with pytest.raises(ValueError, match="give at least one frame token, and a multiple of sync_group = 32"):
        tiny(**{**tiny_inputs(), "clip": None}, lengths=lengths)


@pytest.mark.parametrize(("seconds", "lengths"), [(4, (125, 32, 88)), (8, (250, 64, 192)), (10, (313, 80, 240))])
def test_durations_of_mmaudio(seconds, lengths):
    latents = math.ceil(seconds * 16_000 / 256 / 2)
    assert (latents, *PRESETS["small_16k"].condition_lengths(latents)) == lengths
    config = dataclasses.replace(PRESETS["small_16k"], hidden=32, heads=1, depth=2, fused_depth=1, mlp_multiple=8)
    flow = made_model(config)(**tiny_inputs(1, latents, config))
    assert flow.shape == (1, latents, 20) and flow.isfinite().all()


@pytest.mark.parametrize("v2", [False, True])
def test_both_releases_train(v2):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, v2=v2, depth=3, fused_depth=1)
    model, inputs = MMDiT(config), tiny_inputs(4, 40, config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x_t, target = interpolate(made_input("noise", (4, 40, 16)), inputs.pop("latent"), inputs["t"])
    drop, losses = torch.tensor([True, False, False, False]), []
    for _ in range(20):
        loss = flow_loss(model(x_t, **inputs, drop_video=drop, drop_text=drop.flip(0)), target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # Nobody reads what frames and text attend to in the last joint block.
    assert trainable - reached == {f"joint_blocks.1.{stream}_block.attn.q_norm.weight" for stream in ("clip", "text")}


def test_first_flow_is_exactly_zero_and_trains_the_output_first():
    model = MMDiT(TINY)
    flow = model(**tiny_inputs())
    assert torch.equal(flow, torch.zeros(2, 120, 16))
    (flow - 1).square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"final_layer.conv.weight", "final_layer.conv.bias"}


def test_one_trunk_serves_two_tops_exactly(tiny):
    reference = TopBlocks.copy_of(tiny)
    policy = copy.deepcopy(tiny)
    for parameter in policy.top_parameters():
        parameter.data.mul_(1.1)
    flow, state = policy(**tiny_inputs(), return_state=True)
    assert torch.equal(flow, policy(**tiny_inputs()))
    assert torch.equal(reference(state), tiny(**tiny_inputs()))
    assert not torch.allclose(flow, reference(state), atol=1e-3)


def test_preference_gradients_stop_at_the_trunk():
    model = made_model().requires_grad_(False)
    reference = TopBlocks.copy_of(model)
    for parameter in model.top_parameters():
        parameter.requires_grad_(True)
    flow, state = model(**tiny_inputs(), return_state=True)
    assert not state.latent.requires_grad
    assert not reference(state).requires_grad
    flow.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("fused_blocks.1.", "final_layer."))}


def test_dropped_conditions_equal_missing_ones_sample_by_sample(tiny):
    inputs = tiny_inputs()
    kept, no_video, no_text = tiny(**inputs), tiny(**{**inputs, "clip": None, "sync": None}), tiny(**{**inputs, "text": None})
    first = torch.tensor([True, False])
    torch.testing.assert_close(tiny(**inputs, drop_video=first), torch.stack((no_video[0], kept[1])))
    torch.testing.assert_close(tiny(**inputs, drop_text=~first), torch.stack((kept[0], no_text[1])))
    assert relative_error(no_video, kept) > 0.1
    assert relative_error(no_text, kept) > 0.01


def test_masks_without_their_condition_change_nothing(tiny):
    inputs = {**tiny_inputs(), "clip": None, "sync": None, "text": None}
    drop = torch.tensor([True, False])
    assert torch.equal(tiny(**inputs, drop_video=drop, drop_text=drop), tiny(**inputs))


def test_dropped_samples_send_gradients_to_the_empties_only():
    model, inputs = made_model(), tiny_inputs()
    conditions = [inputs[name].requires_grad_() for name in ("clip", "sync", "text")]
    drop = torch.tensor([True, False])
    model(**inputs, drop_video=drop, drop_text=drop).square().mean().backward()
    for condition in conditions:
        assert condition.grad[0].abs().sum() == 0
        assert condition.grad[1].abs().sum() > 0
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradients.pop(name) is None for name in STORED)
    # Nobody reads what frames and text attend to in the last joint block.
    idle = {f"joint_blocks.1.{stream}_block.attn.q_norm.weight" for stream in ("clip", "text")}
    assert {name for name, gradient in gradients.items() if gradient is None or gradient.abs().sum() == 0} == idle


def test_keeping_every_sample_still_holds_the_empties_in_the_graph():
    """Otherwise a data-parallel step whose masks differ between ranks would wait for gradients that never come."""
    model = made_model()
    model(**tiny_inputs(), drop_video=torch.zeros(2, dtype=torch.bool)).mean().backward()
    for name in EMPTIES[:2]:
        assert model.get_parameter(name).grad.abs().sum() == 0


@pytest.mark.parametrize("latents", [40, 80, 120, 157])
def test_any_duration(tiny, latents):
    flow = tiny(**tiny_inputs(latents=latents))
    assert flow.shape == (2, latents, 16)
    assert flow.isfinite().all()
    lonely = tiny(made_input("latent", (2, latents, 16)), None, None, None, torch.tensor([0.1, 0.2]))
    assert lonely.shape == (2, latents, 16)


def test_synchrony_reaches_its_own_moment(tiny):
    inputs = tiny_inputs()
    _, state = tiny(**inputs, return_state=True)
    inputs["sync"][:, 64:] += 1
    _, later = tiny(**inputs, return_state=True)
    changed = (state.condition - later.condition).abs().sum(dim=(0, 2)) > 0
    # 96 tokens over 120 latents; convolutions of 7, 3 and 3 look five tokens back from token 64.
    assert changed.nonzero().min().item() == pytest.approx((64 - 5) * 120 / 96, abs=1)
    assert changed[80:].all()


def test_position_embedding_repeats_in_every_group(tiny):
    model, inputs = copy.deepcopy(tiny), tiny_inputs()
    model.sync_pos_emb.data.normal_(generator=torch.Generator().manual_seed(0))
    shifted = copy.deepcopy(model)
    shifted.sync_pos_emb.data.zero_()
    added = inputs["sync"] + model.sync_pos_emb.flatten(0, 2).repeat(3, 1)
    torch.testing.assert_close(model(**inputs), shifted(**{**inputs, "sync": added}))


def test_final_layer_takes_the_global_condition_unless_told(tiny):
    extended = MMDiT(dataclasses.replace(TINY, final_layer_extended_condition=True))
    extended.load_state_dict(tiny.state_dict())
    flow, state = tiny(**tiny_inputs(), return_state=True)
    other_flow, other = extended(**tiny_inputs(), return_state=True)
    assert state.final_condition.shape == (2, 1, 64)
    assert torch.equal(other.final_condition, state.condition)
    assert not torch.allclose(flow, other_flow, atol=1e-3)


def test_latent_statistics():
    model, latent = MMDiT(TINY), made_input("latent", (2, 5, 16))
    mean, std = torch.arange(16.0), torch.arange(16.0) + 1
    model.set_latent_stats(mean, std)
    torch.testing.assert_close(model.normalise(latent), (latent - mean) / std)
    torch.testing.assert_close(model.unnormalise(model.normalise(latent)), latent)
    assert not model.latent_mean.requires_grad and not model.latent_std.requires_grad


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(8), torch.ones(16), r"latent mean has shape \(8,\): give one finite value for each of 16 channels"),
        (torch.zeros(16), torch.full((16,), torch.nan), "latent std has shape"),
        (torch.zeros(16), torch.zeros(16), "minimum of 0: every channel must vary"),
    ],
)
def test_unusable_latent_statistics(mean, std, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(TINY).set_latent_stats(mean, std)


def test_bfloat16_stays_close(tiny):
    inputs = {name: value if name == "t" else value.bfloat16() for name, value in tiny_inputs().items()}
    flow = copy.deepcopy(tiny).bfloat16()(**inputs)
    assert flow.dtype == torch.bfloat16
    assert relative_error(flow.float(), tiny(**tiny_inputs())) < 0.05
    # Float32 buffers and paths meet bfloat16 weights: DeepSpeed casts parameters only.
    assert torch.equal(copy.deepcopy(tiny).bfloat16()(**tiny_inputs()), flow)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("latent", (2, 120, 20), r"latent has shape \(2, 120, 20\): give \(2, length, 16\)"),
        ("clip", (3, 24, 512), r"clip has shape \(3, 24, 512\): give \(2, length, 512\)"),
        ("sync", (2, 90, 128), "sync has 90 tokens: give a multiple of sync_group = 32"),
        ("text", (2, 5, 16), "text has 5 tokens: pad or cut it to text_len = 1"),
        ("t", (3,), r"t has shape \(3,\): give \(2,\), a time for each sample"),
    ],
)
def test_inputs_of_a_wrong_shape(tiny, name, shape, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{**tiny_inputs(), name: torch.zeros(shape)})
