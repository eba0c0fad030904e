"""Sizes of the MM-DiT: condition tokens of a duration as MMAudio counts them, and values that are impossible."""

import dataclasses
import math

import pytest

from models.generators.mmdit_config import PRESETS

TINY = PRESETS["tiny"]


@pytest.mark.parametrize(("preset", "rate", "hop"), [("small_16k", 16_000, 256), ("small_44k", 44_100, 512)])
@pytest.mark.parametrize("seconds", range(2, 21))
def test_condition_lengths_are_those_of_mmaudio(preset, rate, hop, seconds):
    windows = (25 * seconds - 16) // 8 + 1
    assert PRESETS[preset].condition_lengths(math.ceil(seconds * rate / hop / 2)) == (8 * seconds, 8 * windows)


@pytest.mark.parametrize("preset", ["small_16k", "small_44k", "large_44k_v2"])
def test_lengths_at_any_duration_are_those_of_mmaudio(preset):
    for tenths in range(10, 201):
        seconds = tenths / 10
        assert PRESETS[preset].lengths_at(seconds / 8) == (int(8 * seconds), ((int(25 * seconds) - 16) // 8 + 1) * 8), seconds
    assert PRESETS[preset].lengths_at(0.05) == (3, 8) and TINY.lengths_at(0.1) == (2, 32)


def test_eight_seconds_at_44_kilohertz_take_480_samples_more():
    """345 latents are 690 mel frames of 512 samples; 8 s are 689 frames and a half latent."""
    assert math.ceil(8 * 44_100 / 512 / 2) == PRESETS["small_44k"].latent_len == 345
    assert 345 * 2 * 512 == 353_280 and 352_800 // 512 == 689
    assert PRESETS["small_44k"].condition_lengths(345) == (64, 192)


@pytest.mark.parametrize(("latents", "lengths"), [(120, (24, 96)), (80, (16, 64)), (1, (1, 32))])
def test_condition_lengths_without_overlapping_windows(latents, lengths):
    assert TINY.condition_lengths(latents) == lengths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_dim": 0}, "MMDiTConfig.clip_dim is 0: give a positive value"),
        ({"heads": 3}, "MMDiTConfig.hidden is 64: give a multiple of 2 x heads = 6"),
        ({"depth": 2}, "MMDiTConfig.depth is 2: give more than fused_depth = 2"),
        ({"sync_len": 90}, "MMDiTConfig.sync_len is 90: give a multiple of sync_group = 32"),
        ({"sync_margin": -1}, "MMDiTConfig.sync_margin is -1: give 0 or more groups"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
