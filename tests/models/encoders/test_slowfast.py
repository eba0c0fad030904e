from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.encoders.slowfast import PRESETS, BatchNorm, SlowFast, SlowFastConfig
from models.pretrained import load_slowfast_r50
from tests.fixtures.made_weights import made_input, made_state, parity_arrays, parity_keys, relative_error


def sizes_by_stage(model: SlowFast, x: torch.Tensor) -> dict[str, list[tuple[int, ...]]]:
    """(channels, T, ...space) after the stem and after each stage of either pathway."""
    sizes = {"slow": [], "fast": []}
    for path in sizes:
        for module in (getattr(model, f"{path}_stem"), *getattr(model, f"{path}_stages")):
            module.register_forward_hook(lambda _, __, out, path=path: sizes[path].append(tuple(out.shape[1:])))
    with torch.no_grad():
        model.eval()(x)
    return sizes


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


def test_video_sizes_are_those_of_table_b1():
    sizes = sizes_by_stage(SlowFast(PRESETS["video_r50"]), torch.rand(1, 32, 3, 224, 224))
    sides = (56, 56, 28, 14, 7)
    assert sizes["slow"] == [(c, 8, s, s) for c, s in zip((64, 256, 512, 1024, 2048), sides, strict=True)]
    assert sizes["fast"] == [(c, 32, s, s) for c, s in zip((8, 32, 64, 128, 256), sides, strict=True)]


def test_audio_sizes_are_those_of_table_b2():
    sizes = sizes_by_stage(SlowFast(PRESETS["audio_r50"]), torch.randn(1, 128, 128))
    bands = (32, 32, 16, 8, 4)
    assert sizes["slow"] == [(c, 8, f) for c, f in zip((64, 256, 512, 1024, 2048), bands, strict=True)]
    assert sizes["fast"] == [(c, 32, f) for c, f in zip((8, 32, 64, 128, 256), bands, strict=True)]


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


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_torchs(training):
    ours, torchs = (norm.train(training) for norm in (BatchNorm(6), torch.nn.BatchNorm3d(6)))
    x = 2 + 3 * torch.randn(4, 6, 3, 5, 5)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours.running_var, torchs.running_var)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space_axes": 3}, "space_axes is 3: choose 2"),
        ({"fast_kernels": (1, 3)}, "fast_kernels is .* one value per stage"),
        ({"stem_kernel": 4}, "choose odd ones"),
        ({"width": 20}, "width is 20: choose a multiple of beta"),
        ({"batch_norm": "sync"}, "batch_norm is 'sync': choose"),
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
