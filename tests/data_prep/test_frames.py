"""Frame choice, resizing, cropping, normalisation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.frames import centre_crop, normalise, resize, sample_indices, to_float


def test_sample_indices_at_lower_rate():
    assert sample_indices(5, 8, 25).tolist() == [0, 3, 6, 9, 12]
    assert sample_indices(4, 25, 25, start=0.28).tolist() == [7, 8, 9, 10]
    assert sample_indices(4, 25, 25, start=0.28, total=9).tolist() == [7, 8, 8, 8]


@given(count=st.integers(1, 100), start=st.integers(0, 500), fps=st.sampled_from([8.0, 12.5, 25.0, 30.0, 29.97]))
def test_equal_rates_take_every_frame(count, start, fps):
    assert sample_indices(count, fps, fps, start / fps).tolist() == list(range(start, start + count))


def test_sample_indices_refuses_nonsense():
    with pytest.raises(ValueError, match="positive rates"):
        sample_indices(3, 0, 25)


def picture(height, width, seed=0):
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(("source", "size"), [((48, 64), (24, 32)), ((30, 47), (64, 33)), ((64, 64), (10, 50))])
def test_bicubic_is_the_field_standard(source, size):
    frames = picture(*source)
    reference = torch.nn.functional.interpolate(frames.float(), size=size, mode="bicubic", antialias=True)
    assert torch.allclose(resize(frames.float(), size), reference, atol=1e-3)
    # Bytes are rounded after each direction, as Pillow does; its weights have more digits, which noise shows the most.
    pictures = [Image.fromarray(frame).resize(size[::-1], Image.BICUBIC) for frame in frames.permute(0, 2, 3, 1).numpy()]
    difference = np.abs(resize(frames, size).permute(0, 2, 3, 1).numpy().astype(int) - np.stack(pictures))
    assert difference.max() <= 3 and difference.mean() < 0.5


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(8, 70), width=st.integers(8, 70), size=st.integers(4, 80), crop=st.booleans(), value=st.integers(0, 255),
)
def test_resize_keeps_flat_colour_and_shape(height, width, size, crop, value):
    frames = torch.full((1, 3, height, width), value, dtype=torch.uint8)
    out = resize(frames, size, crop)
    assert out.dtype == torch.uint8 and (out == value).all()
    if crop:
        assert out.shape[-2:] == (size, size)
    else:
        assert min(out.shape[-2:]) == size
        assert abs(out.shape[-1] / out.shape[-2] - width / height) <= 0.5 / size * max(1, width / height) + 1e-6


def test_crop_is_the_centre_of_the_resized_picture():
    frames = picture(40, 80)
    assert torch.equal(resize(frames, 20, crop=True), centre_crop(resize(frames, 20), 20, 20))
    assert resize(frames, (30, 20), crop=True).shape == (2, 3, 30, 20)
    assert torch.equal(resize(frames, 40), frames)


def test_a_frame_is_resized_the_same_in_any_company():
    frames = torch.randint(0, 256, (70, 3, 200, 200), dtype=torch.uint8)
    assert torch.equal(resize(frames, 20)[-1:], resize(frames[-1:], 20))


def test_crop_refuses_small_frames():
    with pytest.raises(ValueError, match="8x8, smaller than 9x8"):
        centre_crop(torch.zeros(1, 3, 8, 8), 9, 8)


def test_normalise_does_not_touch_its_input():
    frames = to_float(picture(4, 4))
    before = frames.clone()
    out = normalise(frames, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert torch.equal(frames, before) and frames.min() >= 0 and frames.max() <= 1
    assert np.allclose(out[0, 1, 2, 3], (before[0, 1, 2, 3] - 0.4) / 0.2, atol=1e-6)


def test_types_are_checked():
    with pytest.raises(ValueError, match="call to_float first"):
        normalise(picture(4, 4), (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="3 channels, but 1 means"):
        normalise(torch.zeros(1, 3, 4, 4), (0,), (1,))
    with pytest.raises(ValueError, match="uint8"):
        to_float(torch.zeros(1, 3, 4, 4))
