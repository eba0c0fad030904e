from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.encoders.slowfast import PRESETS, SlowFast, SlowFastConfig
from models.pretrained import load_slowfast_r50
from tests.fixtures.made_weights import made_input, made_state, parity_arrays, parity_keys, relative_error


def sizes_by_part(model: SlowFast, x: torch.Tensor) -> dict[str, dict[str, tuple[int, ...]]]:
    """(channels, T, ...space) of either pathway, by the rows of tables B1 and B2."""
    sizes = {"slow": {}, "fast": {}}
    for path, found in sizes.items():
        stem = getattr(model, f"{path}_stem")
        stem.register_forward_pre_hook(lambda _, args, found=found: found.update({"data layer": tuple(args[0].shape[1:])}))
        parts = {"conv1": stem[0], "pool1": stem} | {f"res{n}": stage for n, stage in enumerate(getattr(model, f"{path}_stages"), 2)}
        for part, module in parts.items():
            module.register_forward_hook(lambda _, __, out, part=part, found=found: found.update({part: tuple(out.shape[1:])}))
    with torch.no_grad():
        assert model.eval()(x).shape == (1, 2304)
    return sizes


def blocks(model: SlowFast) -> dict[str, list[tuple[list[tuple[int, ...]], int]]]:
    """Kernels of a stage's bottlenecks, which must be alike, and how many there are."""
    def stage(modules):
        kernels = [[layer.conv.kernel_size for layer in (block.a, block.b, block.c)] for block in modules]
        assert all(other == kernels[0] for other in kernels)
        return kernels[0], len(kernels)

    return {path: [stage(modules) for modules in getattr(model, f"{path}_stages")] for path in ("slow", "fast")}


def test_video_tower_answers_as_pytorchvideo_does():
    expected = parity_arrays("slowfast_r50_video")
    tower = load_slowfast_r50(made_state(parity_keys("slowfast_r50_video"), unit_vectors=True)).eval()
    video = made_input("video", (1, 3, 32, 128, 128)).transpose(1, 2)
    with torch.no_grad():
        slow, fast = tower.pathways(video)
        embedding = tower(video)
    assert relative_error(slow.mean(dim=(3, 4)), expected["slow"]) < 1e-4
    assert relative_error(fast.mean(dim=(3, 4)), expected["fast"]) < 1e-4
    assert relative_error(embedding, expected["embedding"]) < 1e-4


@pytest.mark.parametrize(("preset", "millions"), [("video_r50", 33.64), ("video_r50_kinetics", 33.64), ("audio_r50", 25.97)])
def test_parameter_counts(preset, millions):
    with torch.device("meta"):
        tower = SlowFast(PRESETS[preset])
    assert sum(p.numel() for p in tower.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert (tower.config.slow_dim, tower.config.fast_dim, tower.config.out_dim) == (2048, 256, 2304)


def test_video_tower_is_table_b1():
    """Kernels, strides and all printed sizes; the data layer has strides 4 and 1, as the text says."""
    tower = SlowFast(PRESETS["video_r50"])
    sizes = sizes_by_part(tower, torch.rand(1, 32, 3, 224, 224))
    sides = {"data layer": 224, "conv1": 112, "pool1": 56, "res2": 56, "res3": 28, "res4": 14, "res5": 7}
    channels = dict(zip(sides, (3, 64, 64, 256, 512, 1024, 2048), strict=True))
    assert sizes["slow"] == {part: (channels[part], 8, side, side) for part, side in sides.items()}
    assert sizes["fast"] == {part: (3 if channels[part] == 3 else channels[part] // 8, 32, side, side) for part, side in sides.items()}
    assert blocks(tower) == {
        "slow": [([(1, 1, 1), (1, 3, 3), (1, 1, 1)], 3), ([(1, 1, 1), (1, 3, 3), (1, 1, 1)], 4),
                 ([(3, 1, 1), (1, 3, 3), (1, 1, 1)], 6), ([(3, 1, 1), (1, 3, 3), (1, 1, 1)], 3)],
        "fast": [([(1, 1, 1), (1, 3, 3), (1, 1, 1)], 3), ([(3, 1, 1), (1, 3, 3), (1, 1, 1)], 4),
                 ([(3, 1, 1), (1, 3, 3), (1, 1, 1)], 6), ([(3, 1, 1), (1, 3, 3), (1, 1, 1)], 3)],
    }
    assert [stem[0].conv.kernel_size for stem in (tower.slow_stem, tower.fast_stem)] == [(1, 7, 7), (5, 7, 7)]


def test_audio_tower_is_table_b2():
    """Kernels, strides and all printed sizes in frequency; in time those from pool1 on.

    The rows above print 8 and 32 steps as well, but with the printed strides (4 or 1, then 2, then 2) only pool1 can have them.
    """
    tower = SlowFast(PRESETS["audio_r50"])
    sizes = sizes_by_part(tower, torch.randn(1, 128, 128))
    bands = {"data layer": 128, "conv1": 64, "pool1": 32, "res2": 32, "res3": 16, "res4": 8, "res5": 4}
    channels = dict(zip(bands, (1, 64, 64, 256, 512, 1024, 2048), strict=True))
    longer = {"data layer": 4, "conv1": 2}
    assert sizes["slow"] == {part: (channels[part], 8 * longer.get(part, 1), band) for part, band in bands.items()}
    assert sizes["fast"] == {part: (max(channels[part] // 8, 1), 32 * longer.get(part, 1), band) for part, band in bands.items()}
    assert blocks(tower) == {
        "slow": [([(1, 1), (1, 3), (1, 1)], 3), ([(1, 1), (1, 3), (1, 1)], 4),
                 ([(3, 1), (1, 3), (1, 1)], 6), ([(3, 1), (1, 3), (1, 1)], 3)],
        "fast": [([(1, 1), (1, 3), (1, 1)], 3), ([(3, 1), (1, 3), (1, 1)], 4),
                 ([(3, 1), (1, 3), (1, 1)], 6), ([(3, 1), (1, 3), (1, 1)], 3)],
    }
    for stem, kernel in ((tower.slow_stem, (1, 7)), (tower.fast_stem, (5, 7))):
        conv, _, pool = stem[0].conv, *stem[1:]
        assert (conv.kernel_size, conv.stride, pool.kernel_size, pool.stride) == (kernel, (2, 2), (3, 3), (2, 2))


@pytest.mark.parametrize("preset", ["video_r50", "audio_r50"])
def test_lateral_connections_feed_every_stage_by_time_strided_convolution(preset):
    with torch.device("meta"):
        tower = SlowFast(PRESETS[preset])
    space = (1,) * tower.config.space_axes
    found = [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in (lateral[0].conv for lateral in tower.laterals)]
    assert found == [(dim, 2 * dim, (7, *space), (4, *space)) for dim in (8, 32, 64, 128)]
    assert [stage[0].a.conv.in_channels for stage in tower.slow_stages] == [64 + 16, 256 + 64, 512 + 128, 1024 + 256]


def test_fast_res2_has_the_kernel_of_the_table_unless_switched():
    def kernel(preset):
        with torch.device("meta"):
            return SlowFast(PRESETS[preset]).fast_stages[0][0].a.conv.kernel_size

    assert kernel("video_r50") == (1, 1, 1)
    assert kernel("video_r50_kinetics") == (3, 1, 1)


@pytest.mark.parametrize("size", [32, 48])
def test_tiny_video_tower_trains_every_parameter(size):
    tower = SlowFast(replace(PRESETS["video_tiny"], zero_init=False))
    embedding = tower(torch.rand(2, 32, 3, size, size))
    assert embedding.shape == (2, tower.config.out_dim)
    embedding.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())


def test_embedding_is_the_global_mean_slow_first():
    tower = SlowFast(PRESETS["audio_tiny"]).eval()
    mel = torch.randn(2, 128, 128)
    slow, fast = tower.pathways(mel)
    assert slow.shape == (2, 512, 8, 4) and fast.shape == (2, 128, 32, 4)
    torch.testing.assert_close(tower(mel), torch.cat([slow.mean(dim=(2, 3)), fast.mean(dim=(2, 3))], dim=1))


@pytest.mark.parametrize("frames", [1, 5, 31, 33])
def test_any_length_keeps_the_pathways_aligned(frames):
    slow, fast = SlowFast(PRESETS["video_tiny"]).eval().pathways(torch.rand(1, frames, 3, 32, 32))
    assert (slow.shape[2], fast.shape[2]) == (-(-frames // 4), frames)


def test_zero_init_starts_each_bottleneck_as_its_shortcut():
    block = SlowFast(PRESETS["audio_tiny"]).slow_stages[1][0].eval()
    x = torch.randn(2, 96, 8, 32)
    torch.testing.assert_close(block(x), block.shortcut(x).relu())


def test_frozen_batch_norm_keeps_its_statistics_and_trains_the_rest():
    tower = SlowFast(replace(PRESETS["audio_tiny"], batch_norm="frozen")).train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower(torch.randn(2, 128, 128)).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    assert tower.fast_stem[0].norm.weight.grad.abs().sum() > 0


def test_batch_norm_follows_the_batch_by_default():
    tower = SlowFast(PRESETS["audio_tiny"]).train()
    tower(5 + torch.randn(2, 128, 128))
    assert tower.fast_stem[0].norm.running_mean.abs().sum() > 0


TRAINED = pytest.mark.parametrize("preset", ["video_tiny", "audio_tiny"])


def trained(config: SlowFastConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Embedding, gradients and statistics of one training pass of a fixed tower on a fixed batch."""
    torch.manual_seed(0)
    tower = SlowFast(config).double().train()
    x = torch.randn((2, 8, 3, 32, 32) if config.space_axes == 2 else (2, 128, 32), dtype=torch.float64)
    embedding = tower(x)
    embedding.square().sum().backward()
    return embedding.detach(), {name: p.grad for name, p in tower.named_parameters()}, dict(tower.named_buffers())


@TRAINED
@pytest.mark.parametrize("parts", [("stem",), ("res2", "res4"), ("stem", "res2", "res3", "res4", "res5")])
def test_activation_checkpointing_changes_nothing_but_memory(preset, parts):
    config = replace(PRESETS[preset], zero_init=False)
    for found, wanted in zip(trained(replace(config, activation_checkpointing=parts)), trained(config), strict=True):
        torch.testing.assert_close(found, wanted)


def test_activation_checkpointing_keeps_fewer_activations():
    def kept(*parts):
        torch.manual_seed(0)
        tower, held = SlowFast(replace(PRESETS["audio_tiny"], activation_checkpointing=parts)).train(), []
        parameters = {p.data_ptr() for p in tower.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
            tower(torch.randn(2, 128, 32))
        return sum(x.numel() for x in held if x.data_ptr() not in parameters)

    everything = kept()
    assert kept("res2") < 0.9 * everything
    assert kept("stem", "res2", "res3", "res4", "res5") < 0.15 * everything  # the inputs of the parts


@TRAINED
def test_channels_last_changes_the_layout_alone(preset):
    config = replace(PRESETS[preset], zero_init=False)
    for found, wanted in zip(trained(replace(config, channels_last=True)), trained(config), strict=True):
        torch.testing.assert_close(found, wanted)
    tower, layouts = SlowFast(replace(config, channels_last=True)), []
    layout = torch.channels_last_3d if config.space_axes == 2 else torch.channels_last
    for stem in (tower.slow_stem, tower.fast_stem):  # later, a 1 x 1 x 1 convolution of few values on a CPU gives it up
        for module in stem:
            module.register_forward_hook(lambda _, __, out: layouts.append(out.is_contiguous(memory_format=layout)))
    tower(torch.randn((2, 8, 3, 32, 32) if config.space_axes == 2 else (2, 128, 32)))
    assert layouts == [True] * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space_axes": 3}, "space_axes is 3: choose 2"),
        ({"fast_kernels": (1, 3)}, "fast_kernels is .* one value per stage"),
        ({"stem_kernel": 4}, "choose odd ones"),
        ({"width": 20}, "width is 20: choose a multiple of beta"),
        ({"batch_norm": "batch"}, "batch_norm is 'batch': choose one of local, sync, frozen"),
        ({"activation_checkpointing": ("res6",)}, "has res6: choose from stem, res2, res3, res4, res5"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SlowFastConfig(**changes)


def test_the_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"frames \(B, T, C, H, W\), not \(2, 128, 128\)"):
        SlowFast(PRESETS["video_tiny"])(torch.zeros(2, 128, 128))
    with pytest.raises(ValueError, match="takes 3 channels, not 32"):
        SlowFast(PRESETS["video_tiny"])(torch.zeros(2, 3, 32, 16, 16))
