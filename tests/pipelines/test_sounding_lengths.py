"""What is missing is as long as MMAudio has it, for any duration: sound from text alone, and of videos with masked pictures."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from pipelines.encoding import latent_length
from pipelines.generate import GenerateOptions, generate_file, generate_files
from tests.fixtures.made_encoders import small_mmaudio

DURATIONS = [(3.3, (26, 72)), (8.3, (66, 192))]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    settings = RenderConfig(size=32, seconds=9.0)
    return Path(next(iter(read_rendered(tmp_path_factory.mktemp("video"), 1, settings=settings, workers=1))).source)


@torch.no_grad()
def mmaudio(model, sync, lengths, seconds, seed):
    """MMAudio's inference without pictures, and without synchrony where `sync` is None, in one straight line: 25 Euler steps cut to 3."""
    net, (clip_len, sync_len) = model.generator, lengths
    said, unsaid = model.text(["rain"]), model.text(["music"])
    length = int(np.ceil(seconds * model.sample_rate / model.vocoder.spec.hop / 2))
    empty_clip, empty_sync = net.empty_clip_feat[None].expand(1, clip_len, -1), net.empty_sync_feat[None].expand(1, sync_len, -1)
    x = torch.randn(1, length, net.config.latent_dim, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(0, 1, 4)
    for t, following in zip(times[:-1], times[1:], strict=True):
        conditional = net(x, empty_clip, empty_sync if sync is None else sync, said, t[None])
        x = x + (following - t) * (4.5 * conditional - 3.5 * net(x, empty_clip, empty_sync, unsaid, t[None]))
    return model.waveform(x * net.latent_std + net.latent_mean)[0].numpy()


@pytest.mark.parametrize("mel", ["mmaudio_16k", "mmaudio_44k"])
@pytest.mark.parametrize(("seconds", "lengths"), DURATIONS)
def test_a_video_without_its_pictures_sounds_as_mmaudios(video, tmp_path, mel, seconds, lengths):
    model = small_mmaudio(mel)
    options = GenerateOptions(prompt="rain", negative_prompt="music", duration=seconds, seed=7, mask_away_clip=True)
    found = generate_file(model, video, tmp_path / "out.mp4", options)
    pictures, shown = model.read(str(video), model.views, 0.0, seconds)
    sync = model.see(pictures).sync
    assert sync.shape[1] == lengths[1] and seconds - 0.04 <= shown <= seconds, "MMAudio shortens the duration to what it has read"
    found = found[:round(shown * model.sample_rate)]
    expected = mmaudio(model, sync, lengths, shown, 7)[:len(found)]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    other = mmaudio(model, sync, (lengths[0] + 1, lengths[1]), shown, 7)[:len(found)]
    assert np.abs(found - other).max() > 1e-3 * np.abs(other).max(), "it makes a difference"


@pytest.mark.parametrize("mel", ["mmaudio_16k", "mmaudio_44k"])
@pytest.mark.parametrize(("seconds", "lengths"), DURATIONS)
def test_text_alone_sounds_as_mmaudios(tmp_path, mel, seconds, lengths):
    model = small_mmaudio(mel)
    options = GenerateOptions(prompt="rain", negative_prompt="music", duration=seconds, seed=7)
    generate_files(model, [], tmp_path, options, say=lambda line: None)
    with av.open(str(tmp_path / "rain.flac")) as media:
        found = np.concatenate([frame.to_ndarray().reshape(-1) for frame in media.decode(audio=0)]).astype(np.float32)
    found = found / 2**15 if np.abs(found).max() > 1 else found
    expected = mmaudio(model, None, lengths, seconds, 7)[:len(found)]
    assert len(found) == round(seconds * model.sample_rate) and np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("mel", ["mmaudio_16k", "mmaudio_44k"])
def test_lengths_are_mmaudios_for_every_duration(mel):
    model = small_mmaudio(mel)
    for tenths in range(10, 201):
        seconds = tenths / 10
        assert model.condition_lengths(seconds) == (int(8 * seconds), ((int(25 * seconds) - 16) // 8 + 1) * 8), seconds


def test_durations_of_as_many_latents_have_lengths_of_their_own():
    """8.3 s and 8.32 s are 260 latents, and 24 and 25 groups of synchrony."""
    model, told = small_mmaudio(), []
    model.generator.guidance = lambda *given: told.append(given[-1]) or (lambda latent, t: latent)
    for seconds, lengths in ((8.3, (66, 192)), (8.32, (66, 200)), (8.3, (66, 192))):
        noise = torch.cat([model.noise(1, seconds, seed) for seed in (0, 1)])
        assert noise.shape[1] == latent_length(seconds, "mmaudio_16k") == 260
        model.latents(model.conditioner.conditions({}), noise, steps=1, seconds=seconds)
        assert told[-1] == lengths


def test_text_alone_may_be_shorter_than_a_segment_of_pictures(tmp_path):
    model = small_mmaudio()
    assert model.condition_lengths(0.5) == (4, 8)
    generate_files(model, [], tmp_path, GenerateOptions(prompt="rain", duration=0.5), say=lambda line: None)
    assert (tmp_path / "rain.flac").exists()


def test_without_encoders_lengths_follow_the_generator():
    model = small_mmaudio()
    model.conditioner = None
    assert [model.condition_lengths(seconds) for seconds in (3.3, 8.0, 8.3)] == [(26, 72), (64, 192), (66, 192)]
