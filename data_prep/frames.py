"""Frames: which ones to take, resizing, cropping and normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["centre_crop", "normalise", "resize", "sample_indices", "to_float"]


def sample_indices(count: int, fps: float, source_fps: float, start: float = 0.0, total: int | None = None) -> np.ndarray:
    """Indices (count,) of the frames on show at start + i / fps seconds in a clip of constant `source_fps`.

    With `total`, the clip's number of frames, later indices repeat its last frame.
    """
    if fps <= 0 or source_fps <= 0 or start < 0 or (total is not None and total < 1):
        raise ValueError(f"sample_indices: need positive rates, start >= 0 and total >= 1, got {fps=}, {source_fps=}, {start=}, {total=}")
    # The margin stops 0.28 * 25 = 6.999... from showing frame 6.
    indices = np.floor((start + np.arange(count) / fps) * source_fps + 1e-6).astype(np.int64)
    return indices if total is None else indices.clip(max=total - 1)


def _geometry(source: tuple[int, int], size: int | tuple[int, int], crop: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) to scale to, then to keep of that."""
    if isinstance(size, int):
        size, keep_shape = (size, size), True
    else:
        keep_shape = crop
    if min(size) < 1:
        raise ValueError(f"resize: size is {size}: sides must be at least one pixel")
    if not keep_shape:
        return size, size
    scale = max(size[0] / source[0], size[1] / source[1])
    scaled = tuple(max(wanted, round(side * scale)) for side, wanted in zip(source, size, strict=True))
    return scaled, (size if crop else scaled)


def resize(frames: torch.Tensor, size: int | tuple[int, int], crop: bool = False) -> torch.Tensor:
    """Frames (..., C, H, W), uint8 or float, resized without aliasing by bicubic interpolation; uint8 stays uint8.

    `size` an int: the shorter side, keeping the shape; with `crop` its centre square. `size` (h, w): exactly that, squashed,
    or with `crop` scaled to cover it and cropped about the centre.
    """
    scaled, kept = _geometry(tuple(frames.shape[-2:]), size, crop)
    if scaled != tuple(frames.shape[-2:]):
        # The operator below torchvision's antialiased resizing. Its kernel for bytes rounds between the two directions, as Pillow's.
        flat = torch.ops.aten._upsample_bicubic2d_aa(frames.reshape(-1, *frames.shape[-3:]), scaled, align_corners=False)
        frames = flat.reshape(*frames.shape[:-2], *scaled)
    return centre_crop(frames, *kept)


def centre_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The central (..., height, width) of frames (..., H, W)."""
    h, w = frames.shape[-2:]
    if height > h or width > w:
        raise ValueError(f"centre_crop: frames are {h}x{w}, smaller than {height}x{width}: resize them first")
    top, left = (h - height) // 2, (w - width) // 2
    return frames[..., top : top + height, left : left + width]


def to_float(frames: torch.Tensor) -> torch.Tensor:
    """uint8 frames as float32 in [0, 1]."""
    if frames.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 frames, not {frames.dtype}")
    return frames.float().div_(255.0)


def normalise(frames: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(frames - mean) / std per channel of float frames (..., C, H, W) in [0, 1]; the input is left as it is."""
    if not frames.is_floating_point():
        raise ValueError(f"normalise takes float frames in [0, 1], not {frames.dtype}: call to_float first")
    if not len(mean) == len(std) == frames.shape[-3]:
        raise ValueError(f"normalise: {frames.shape[-3]} channels, but {len(mean)} means and {len(std)} stds")
    mean, std = (frames.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
    return (frames - mean) / std
