"""Shared blocks against their definitions, computed another way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import layers
from models.layers import (
    AttentionHeads,
    ChannelLastConv1d,
    SwiGLU,
    TimestepEmbedding,
    TransformerBlock,
    attend,
    attention_kernel,
    inside_forward,
    modulate,
    rotary_angles,
    rotate,
    swiglu_width,
)
from tests.fixtures.made_weights import made_input, made_state


@pytest.mark.parametrize(("sizes", "width"), [((448, 4, 256), 1280), ((896, 4, 256), 2560), ((64, 2, 32), 96), ((96, 2, 32), 128)])
def test_swiglu_width_rounds_two_thirds_up(sizes, width):
    assert swiglu_width(*sizes) == width


@given(st.integers(1, 2048), st.sampled_from([2.0, 4.0]), st.sampled_from([1, 32, 256]))
def test_swiglu_width_is_the_least_sufficient_multiple(dim, ratio, multiple):
    width, least = swiglu_width(dim, ratio, multiple), int(2 * ratio * dim / 3)
    assert width % multiple == 0
    assert least <= width < least + multiple


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_channel_last_convolution_equals_plain_convolution(kernel):
    conv, x = ChannelLastConv1d(6, 5, kernel), made_input("x", (2, 11, 6))
    plain = torch.nn.functional.conv1d(x.transpose(1, 2), conv.weight, conv.bias, padding=kernel // 2)
    torch.testing.assert_close(conv(x), plain.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [1, 3])
def test_swiglu_gates_without_biases(kernel):
    ffn, x = SwiGLU(8, 32, kernel), made_input("x", (2, 5, 8))
    gate = ffn.w1(x)
    assert [name for name, _ in ffn.named_parameters()] == ["w1.weight", "w2.weight", "w3.weight"]
    torch.testing.assert_close(ffn(x), ffn.w2(gate * gate.sigmoid() * ffn.w3(x)))


@pytest.mark.parametrize(("kernel", "reached"), [(1, [4]), (3, [2, 3, 4, 5, 6])])
def test_swiglu_reaches_as_far_as_its_kernels(kernel, reached):
    ffn, x = SwiGLU(8, 32, kernel), made_input("x", (1, 9, 8))
    changed = x.clone()
    changed[:, 4] += 1
    assert (ffn(x) - ffn(changed)).abs().sum(dim=(0, 2)).nonzero().flatten().tolist() == reached


def test_rotation_is_complex_multiplication():
    x, (cos, sin) = made_input("q", (2, 3, 10, 8)), rotary_angles(10, 8)
    positions, frequencies = torch.arange(10.0), 10_000 ** (-torch.arange(4) / 4)
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(10, 4), torch.outer(positions, frequencies))
    torch.testing.assert_close(rotate(x, (cos, sin)), torch.view_as_real(expected).flatten(-2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_rotated_products_depend_on_distance_only(first, second, shift):
    q, k = made_input("q", (1, 1, 1, 16)), made_input("k", (1, 1, 1, 16))
    cos, sin = rotary_angles(100, 16)

    def product(i, j):
        return (rotate(q, (cos[i : i + 1], sin[i : i + 1])) * rotate(k, (cos[j : j + 1], sin[j : j + 1]))).sum().item()

    assert product(first, second) == pytest.approx(product(first + shift, second + shift), abs=1e-4)


def test_stride_aligns_sequences_of_unlike_rates():
    fast, slow = rotary_angles(12, 8), rotary_angles(4, 8, stride=3.0)
    torch.testing.assert_close(slow[0], fast[0][::3])
    torch.testing.assert_close(slow[1], fast[1][::3])


def test_rotation_keeps_the_dtype_and_float32_angles():
    rotation = rotary_angles(300, 8)
    assert rotation[0].dtype == torch.float32
    x = made_input("q", (1, 1, 300, 8))
    rounded = rotate(x.bfloat16(), rotation)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), rotate(x.bfloat16().float(), rotation), rtol=0.01, atol=0.01)


def test_heads_are_packed_channel_first_then_q_k_v():
    attn, x = AttentionHeads(8, 2), made_input("x", (1, 3, 8))
    packed = attn.qkv(x)
    q, k, v = attn(x)
    for head in range(2):
        for channel in range(4):
            assert torch.equal(v[0, head, :, channel], packed[0, :, head * 12 + channel * 3 + 2])
    torch.testing.assert_close(q.square().mean(-1), torch.ones(1, 2, 3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(k.square().mean(-1), torch.ones(1, 2, 3), rtol=1e-4, atol=1e-4)


def test_attend_averages_values_by_softmax():
    q, k, v = (made_input(name, (2, 3, 5, 4)) for name in "qkv")
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(attend(q, k, v), (weights @ v).transpose(1, 2).reshape(2, 5, 12))


@pytest.mark.parametrize(("max_period", "fastest", "slowest"), [(10_000.0, 1.0, 1e-4), (1.0, 10_000.0, 1.0)])
def test_time_frequencies_span_the_period(max_period, fastest, slowest):
    embedding = TimestepEmbedding(4, 256, max_period)
    embedding.mlp = torch.nn.Sequential(torch.nn.Linear(256, 256))
    torch.nn.init.eye_(embedding.mlp[0].weight)
    torch.nn.init.zeros_(embedding.mlp[0].bias)
    out = embedding(torch.tensor([0.3]))[0]
    assert out[0].item() == pytest.approx(math.cos(0.3 * fastest), abs=1e-3)
    assert out[128].item() == pytest.approx(math.sin(0.3 * fastest), abs=1e-3)
    assert out[255].item() == pytest.approx(math.sin(0.3 * slowest * 10_000 ** (2 / 256)), abs=1e-5)


def test_time_is_embedded_in_float32_by_a_bfloat16_model():
    embedding = TimestepEmbedding(8, 16, max_period=1.0).bfloat16()
    near, far = embedding(torch.tensor([0.7])), embedding(torch.tensor([0.7005]))
    assert near.dtype == torch.bfloat16
    assert not torch.equal(near, far)  # 0.7 and 0.7005 are one and the same bfloat16 number


def test_modulate_scales_around_one():
    assert torch.equal(modulate(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([0.5])), torch.tensor([6.0]))


def test_block_with_closed_gates_is_the_identity_and_with_open_gates_is_not():
    block = TransformerBlock(16, 2, 32, kernel_size=3)
    block.load_state_dict(made_state({key: value.shape for key, value in block.state_dict().items()}))
    x, condition = made_input("x", (2, 6, 16)), made_input("c", (2, 1, 16))
    assert not torch.allclose(block(x, condition, rotary_angles(6, 8)), x, atol=0.01)
    torch.nn.init.zeros_(block.adaLN_modulation[1].weight)
    torch.nn.init.zeros_(block.adaLN_modulation[1].bias)
    assert torch.equal(block(x, condition, rotary_angles(6, 8)), x)


def test_attention_only_block_has_nothing_after_attention():
    block = TransformerBlock(16, 2, 32, kernel_size=3, attention_only=True)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"attn", "adaLN_modulation"}
    assert block.adaLN_modulation[1].out_features == 32


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "installed", "kernel"),
    [
        ("cuda", torch.bfloat16, 64, True, "flash_attn"),
        ("cuda", torch.float16, 256, True, "flash_attn"),
        ("cuda", torch.bfloat16, 64, False, "sdpa"),
        ("cuda", torch.float32, 64, True, "sdpa"),
        ("cuda", torch.bfloat16, 264, True, "sdpa"),
        ("cuda", torch.bfloat16, 60, True, "sdpa"),
        ("cpu", torch.bfloat16, 64, True, "sdpa"),
    ],
)
def test_flash_attention_is_taken_where_it_fits(device, dtype, head_dim, installed, kernel):
    assert attention_kernel(device, dtype, head_dim, installed) == kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kernels_attend_alike(monkeypatch, dtype):
    """flash_attn's heads are (B, N, H, head_dim), contiguous or not; a stand-in of its layout answers as the other branch."""
    given = []

    def flash(q, k, v):
        given.append([tuple(x.shape) for x in (q, k, v)])
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    q, k, v = (made_input(name, (2, 3, length, 8)).to(dtype) for name, length in (("q", 5), ("k", 7), ("v", 7)))
    expected = attend(q, k, v)
    monkeypatch.setattr(layers, "flash_attn_func", flash)
    assert torch.equal(attend(q, k, v), expected) and not given, "on a CPU it is not taken"
    monkeypatch.setattr(layers, "attention_kernel", lambda *_, installed: "flash_attn" if installed else "sdpa")
    torch.testing.assert_close(attend(q, k, v), expected)
    assert given == [[(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)]] and expected.shape == (2, 5, 24)


class Hooked(torch.nn.Module):
    """Its weight is there between its hooks only, as under ZeRO-3."""

    def __init__(self):
        super().__init__()
        self.weight = None
        self.register_forward_pre_hook(lambda *_: setattr(self, "weight", 3))
        self.register_forward_hook(lambda *_: setattr(self, "weight", None), always_call=True)

    def forward(self, x):
        return self.weight * x

    @inside_forward
    def shifted(self, x, by=0):
        """The weight and the sum."""
        return self.weight, x + by

    @inside_forward
    def failing(self):
        """Nothing."""
        raise RuntimeError("no")


def test_methods_run_between_the_hooks_and_leave_forward_alone():
    module = Hooked()
    assert module.shifted(4, by=1) == (3, 5)
    assert module(2) == 6 and module.weight is None
    with pytest.raises(RuntimeError, match="no"):
        module.failing()
    assert module(2) == 6
    module.register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)
    with pytest.raises(ZeroDivisionError):
        module.shifted(4)
    assert "forward" not in vars(module)
