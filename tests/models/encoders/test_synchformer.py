from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.encoders.synchformer import PRESETS, DividedAttention, SpaceAggregation, Synchformer, SynchformerConfig, video_segments
from models.pretrained import load_synchformer
from tests.fixtures.made_weights import made_input, made_state, parity_arrays, parity_keys, relative_error

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def tiny() -> Synchformer:
    torch.manual_seed(0)
    return Synchformer(TINY).eval().requires_grad_(False)


def test_answers_as_the_public_model_does():
    encoder = load_synchformer(made_state(parity_keys("synchformer_visual"), unit_vectors=True)).eval()
    with torch.no_grad():
        features = encoder(made_input("frames", (1, 1, 16, 3, 224, 224)))
    assert features.shape == (1, 1, 8, 768)
    assert relative_error(features, parity_arrays("synchformer_visual")["features"]) < 5e-6


def test_parameter_count():
    with torch.device("meta"):
        encoder = Synchformer(PRESETS["divided_224_16x4"])
    unused_patch_embedding = 768 * 3 * 16 * 16 + 768
    assert sum(p.numel() for p in encoder.parameters()) == 122_440_704 - unused_patch_embedding


@pytest.mark.parametrize(("frames", "segments"), [(200, 24), (250, 30), (100, 11), (16, 1), (23, 1), (24, 2)])
def test_number_of_segments(tiny, frames, segments):
    """8 s give 24 segments and 192 tokens; 10 s give 240; 4 s give 88."""
    video = torch.rand(1, frames, 3, 32, 32)
    assert video_segments(video, TINY).shape == (1, segments, 16, 3, 32, 32)
    assert tiny.encode_video(video).shape == (1, 8 * segments, 32)


def test_segments_are_normalised_windows_and_the_video_is_left_as_it_is():
    video = torch.rand(2, 40, 3, 32, 32)
    before = video.clone()
    segments = video_segments(video, TINY)
    for number in range(4):
        torch.testing.assert_close(segments[:, number], 2 * video[:, 8 * number : 8 * number + 16] - 1)
    assert torch.equal(video, before)


def test_each_segment_is_encoded_by_itself(tiny):
    segments = torch.randn(2, 3, 16, 3, 32, 32)
    whole = tiny(segments)
    torch.testing.assert_close(whole[1:, 2:], tiny(segments[1:, 2:]), rtol=1e-4, atol=1e-5)
    in_pairs = Synchformer(replace(TINY, segments_at_once=4)).eval()
    in_pairs.load_state_dict(tiny.state_dict())
    torch.testing.assert_close(in_pairs(segments), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("over", ["time", "space"])
def test_divided_attention_is_full_attention_under_its_mask(over):
    attention, frames, patches = DividedAttention(TINY, over), 8, 4
    x = torch.randn(3, 1 + frames * patches, TINY.dim)
    place = torch.arange(frames * patches) % patches if over == "time" else torch.arange(frames * patches) // patches
    mask = torch.ones(len(place) + 1, len(place) + 1, dtype=torch.bool)
    mask[1:, 1:] = place[:, None] == place
    q, k, v = (part.unflatten(-1, (TINY.heads, -1)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    expected = attention.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, frames), expected, rtol=1e-4, atol=1e-6)


def test_space_aggregation_is_torchs_layer_read_at_the_class_token():
    ours = SpaceAggregation(TINY)
    theirs = nn.TransformerEncoderLayer(32, 2, 128, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if name != "cls_token"})
    patches = torch.randn(3, 4, 32)
    expected = theirs(torch.cat((ours.cls_token.expand(3, 1, 32), patches), dim=1))[:, 0]
    torch.testing.assert_close(ours(patches), expected, rtol=1e-4, atol=1e-6)


def test_a_token_tells_when_something_moved(tiny):
    video = torch.full((1, 16, 3, 32, 32), 0.5)
    still = tiny.encode_video(video)
    video[:, 10:12, :, 8:24, 8:24] = 1
    change = (tiny.encode_video(video) - still).norm(dim=-1)[0]
    assert change.argmax() == 5


def test_trains_every_parameter():
    encoder = Synchformer(TINY)
    encoder(torch.randn(2, 2, 16, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_follows_the_type_of_its_weights():
    assert Synchformer(TINY).bfloat16()(torch.randn(1, 1, 16, 3, 32, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth is 0: give a positive value"),
        ({"image_size": 230}, "image_size is 230: give a multiple of patch_size = 16"),
        ({"heads": 7}, "dim is 768: give a multiple of heads = 7"),
        ({"hop_frames": 17}, r"hop_frames is 17: choose 1 to segment_frames \(16\)"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SynchformerConfig(**changes)


def test_the_wrong_input_is_named(tiny):
    with pytest.raises(ValueError, match=r"of \(16, 3, 32, 32\), not \(1, 1, 16, 3, 64, 64\): resize and cut the video"):
        tiny(torch.zeros(1, 1, 16, 3, 64, 64))
    with pytest.raises(ValueError, match="a video of 15 frames is shorter than one segment of 16"):
        tiny.encode_video(torch.zeros(1, 15, 3, 32, 32))
    with pytest.raises(ValueError, match=r"not torch.uint8 \(1, 16, 3, 32, 32\)"):
        tiny.encode_video(torch.zeros(1, 16, 3, 32, 32, dtype=torch.uint8))
