"""Published models give sound as MMAudio's own inference does, recomputed here step by step; many videos as one, several processes too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data_prep.media import ClipError, probe
from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from pipelines.encoding import latent_length
from pipelines.generate import GenerateOptions, GenerationError, Job, _pieces, _sound, _windows, batches, generate_file, generate_files
from pipelines.sounding import PublicFiles
from tests.fixtures.made_encoders import SmallCLIP, small_mmaudio
from tests.fixtures.tiny_chain import REPOSITORY


@pytest.fixture(scope="module")
def model():
    return small_mmaudio()


def video(folder, seconds, seed=0):
    return Path(next(iter(read_rendered(folder, 1, seed=seed, settings=RenderConfig(size=32, seconds=seconds), workers=1))).source)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos: of 8 s, of 8 s, of 9.6 s."""
    folder = tmp_path_factory.mktemp("videos")
    return [video(folder / str(number), seconds, number).rename(folder / f"{number}.mp4") for number, seconds in enumerate((8.0, 8.0, 9.6))]


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    return video(tmp_path_factory.mktemp("long"), 10.4)


def mmaudio(model, path, prompt, negative, seconds, seed, strength, steps):
    """MMAudio's inference in one straight line (facts 1.1 to 1.5): two passes per step, times from linspace."""
    pictures, _ = model.read(path, model.views, 0.0, seconds)
    clip_view, sync_view = model.views
    clip_frames, sync_frames = (pictures[view][None].float() / 255 for view in model.views)
    assert clip_frames.shape[1] == int(8 * seconds) and sync_frames.shape[1] == int(25 * seconds)
    image, sync, text = model.conditioner.parts
    windows = [(sync_frames[:, start:start + 16] - 0.5) / 0.5 for start in range(0, sync_frames.shape[1] - 15, 8)]
    clip, sync = image.encoder.encode_image(clip_frames), sync.encoder(torch.stack(windows, 1)).flatten(1, 2)
    said, unsaid = text.encoder.encode_text([prompt]), text.encoder.encode_text([negative])
    net = model.generator
    length = int(np.ceil(seconds * model.sample_rate / model.vocoder.spec.hop / 2))
    x = torch.randn(1, length, net.config.latent_dim, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(0, 1, steps + 1)
    empty_clip, empty_sync = (net.state_dict()[f"empty_{name}_feat"].expand_as(value) for name, value in (("clip", clip), ("sync", sync)))
    for t, following in zip(times[:-1], times[1:], strict=True):
        now = t.reshape(1)
        flow = strength * net(x, clip, sync, said, now) + (1 - strength) * net(x, empty_clip, empty_sync, unsaid, now)
        x = x + (following - t) * flow
    x = x * net.latent_std + net.latent_mean
    return model.vocoder.vocode(model.vae.decode(x.transpose(1, 2)))[0].clamp(-1, 1).numpy(), (clip, sync, said, length)


@pytest.mark.parametrize(("mel", "seconds", "lengths"), [
    ("mmaudio_16k", 8.0, (64, 192, 77, 250)), ("mmaudio_16k", 4.0, (32, 88, 77, 125)), ("mmaudio_16k", 10.0, (80, 240, 77, 313)),
    ("mmaudio_44k", 8.0, (64, 192, 77, 345)), ("mmaudio_44k", 4.0, (32, 88, 77, 173)), ("mmaudio_44k", 10.0, (80, 240, 77, 431)),
])
def test_the_sound_is_that_of_mmaudios_inference(long_video, tmp_path, mel, seconds, lengths):
    model = small_mmaudio(mel)
    options = GenerateOptions(prompt="rain", negative_prompt="music", duration=seconds, seed=7)
    found = generate_file(model, long_video, tmp_path / "out.mp4", options)
    with torch.no_grad():
        expected, (clip, sync, text, latents) = mmaudio(model, str(long_video), "rain", "music", seconds, 7, 4.5, 3)
    assert (clip.shape[1], sync.shape[1], text.shape[1], latents) == lengths
    assert len(found) == round(seconds * model.sample_rate) <= len(expected)
    assert np.abs(found - expected[:len(found)]).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(found).max() > 1e-4


def test_published_settings_are_the_defaults(model):
    assert (GenerateOptions().steps, GenerateOptions().guidance, model.guidance, type(model)(*[None] * 6).steps) == (None, None, 4.5, 25)
    assert {mel: latent_length(8.0, mel) for mel in ("mmaudio_16k", "mmaudio_44k")} == {"mmaudio_16k": 250, "mmaudio_44k": 345}


def test_prompts_and_masks_change_the_sound(model, videos, tmp_path):
    variants = [{}, {"prompt": "rain"}, {"negative_prompt": "rain"}, {"mask_away_clip": True}, {"guidance": 1.0}, {"steps": 2}, {"seed": 1}]
    sounds = [generate_file(model, videos[0], tmp_path / "out.mp4", GenerateOptions(duration=2.0, **variant)) for variant in variants]
    for number, sound in enumerate(sounds[1:], 1):
        assert not np.allclose(sound, sounds[0], atol=1e-5), variants[number]


def test_a_masked_picture_is_what_the_generator_learned_for_a_missing_one(model, videos):
    (piece,) = _windows(model, Job(videos[0], Path("x"), GenerateOptions(duration=4.0, mask_away_clip=True)), None, None)
    assert piece.conditions.clip is None and piece.conditions.sync.shape[1] == 88


def files(folder):
    return {path.name for path in folder.iterdir()}


def sound_of(path):
    with av.open(str(path)) as media:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in media.decode(audio=0)])


def test_a_batch_gives_what_single_videos_give(model, videos):
    options = GenerateOptions(duration=4.0, prompt="rain")
    jobs = [Job(path, Path(f"{number}.mp4"), options) for number, path in enumerate(videos)]
    together, alone = (list(_pieces(model, jobs, None)) for _ in range(2))
    (batch,) = batches(together, 3)
    _sound(model, batch, options)
    for piece in alone:
        _sound(model, [piece], options)
    for one, other in zip(together, alone, strict=True):
        (start, sound), (_, expected) = one.sounding.pieces[0], other.sounding.pieces[0]
        assert start == 0 and np.abs(sound - expected).max() < 1e-4 * np.abs(expected).max()
        assert not np.allclose(sound, together[0].sounding.pieces[0][1]) or one is together[0]


def test_what_is_not_to_be_heard_is_read_once(model, videos, tmp_path):
    clip = next(module for module in model.conditioner.modules() if isinstance(module, SmallCLIP))
    clip.read.clear()
    generate_files(model, videos, tmp_path, GenerateOptions(negative_prompt="music", batch_size=1, steps=1), say=lambda line: None)
    assert sorted(clip.read) == ["", "music"], "four windows in as many batches"


def test_windows_of_several_videos_share_batches(model, videos, tmp_path, monkeypatch):
    sizes, latents = [], model.latents
    monkeypatch.setattr(model, "latents", lambda conditions, noise, *rest: sizes.append(len(noise)) or latents(conditions, noise, *rest))
    generate_files(model, videos, tmp_path, GenerateOptions(batch_size=3), say=lambda line: None)
    assert sizes == [2, 2], "two whole videos, and the two windows of the longer one: of exactly 8 s, MMAudio's clock reaches 7.96 s"
    assert files(tmp_path) == {f"{number}.{kind}" for number in range(3) for kind in ("mp4", "json")}
    assert [probe(str(tmp_path / f"{number}.mp4")).audio_start for number in range(3)] == pytest.approx([0, 0, 0], abs=0.05)


def test_the_record_says_how_it_was_made_and_done_is_done(model, videos, tmp_path):
    lines = []
    generate_files(model, videos[:1], tmp_path, GenerateOptions(seed=3), say=lines.append)
    record = json.loads((tmp_path / "0.json").read_text())
    assert record["vocoder"] == "griffin_lim" and record["weights"] == {"checkpoint": "made"} and record["options"]["seed"] == 3
    assert (record["steps"], record["guidance"], record["seconds"], record["windows"]) == (3, 4.5, 8.0, 1)
    made = (tmp_path / "0.mp4").stat().st_mtime_ns
    generate_files(model, videos[:1], tmp_path, GenerateOptions(seed=3), say=lines.append)
    generate_files(model, videos[:1], tmp_path, GenerateOptions(seed=4), say=lines.append)
    assert (tmp_path / "0.mp4").stat().st_mtime_ns == made
    generate_files(model, videos[:1], tmp_path, GenerateOptions(seed=4, overwrite=True), say=lines.append)
    assert (tmp_path / "0.mp4").stat().st_mtime_ns > made and json.loads((tmp_path / "0.json").read_text())["options"]["seed"] == 4
    name = str(tmp_path / "0.mp4")
    assert lines == [f"{name} (griffin_lim)", f"{name}: there already, skipped",
                     f"{name}: there already, skipped; it was made with other settings or weights, --overwrite makes it again",
                     f"{name} (griffin_lim)"]


def test_text_alone_gives_sound(model, tmp_path):
    generate_files(model, [], tmp_path, GenerateOptions(prompt="Rain on a tin roof!", duration=2.0), say=lambda line: None)
    assert files(tmp_path) == {"rain-on-a-tin-roof.flac", "rain-on-a-tin-roof.json"}
    assert len(sound_of(tmp_path / "rain-on-a-tin-roof.flac")) == 32000


def test_one_bad_video_does_not_stop_the_others(model, videos, tmp_path):
    bad, lines = tmp_path / "bad.mp4", []
    bad.write_bytes(b"no video")
    with pytest.raises(GenerationError, match="1 of 2 videos have got no sound"):
        generate_files(model, [bad, videos[0]], tmp_path / "out", GenerateOptions(), say=lines.append)
    assert files(tmp_path / "out") == {"0.mp4", "0.json"} and lines[0].startswith(f"{bad}: ")
    with pytest.raises(ClipError):
        generate_file(model, bad, tmp_path / "out.mp4")


def test_what_cannot_be_made_is_said_before(model, videos, tmp_path):
    with pytest.raises(ValueError, match="name videos, or a --prompt"):
        generate_files(model, [], tmp_path, GenerateOptions())
    with pytest.raises(ValueError, match="would be replaced by its result: choose another --out"):
        generate_files(model, videos[:1], videos[0].parent, GenerateOptions())
    with pytest.raises(ValueError, match="duration is -1: give a value above 0"):
        GenerateOptions(duration=-1)
    (tmp_path / "own.pth").touch()
    with pytest.raises(ValueError, match="own.pth: say which variant it is, --variant small_16k"):
        PublicFiles(checkpoint=tmp_path / "own.pth", vae=tmp_path / "own.pth")
    with pytest.raises(ValueError, match=re.escape(f"--vae {tmp_path / 'no.pth'}: no such file")):
        PublicFiles(checkpoint=tmp_path / "own.pth", vae=tmp_path / "no.pth", variant="small_16k")


def test_two_processes_make_the_files_of_one(model, videos, tmp_path):
    """With batches of one the bits are the same, whoever makes which video."""
    script = [sys.executable, "-W", "ignore", "-m", "tests.pipelines.generate_share", str(tmp_path / "two"), *map(str, videos)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    processes = [subprocess.Popen(script, cwd=REPOSITORY, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
                 for rank in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [len(lines) for lines in said] == [2, 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generate_files(model, videos, tmp_path / "one", GenerateOptions(batch_size=1), say=lambda line: None)
    torch.set_num_threads(threads)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_lengths_of_sequences_follow_any_duration():
    for seconds in (0.7, 3.3, 5.04, 12.0):
        model, t = small_mmaudio(), torch.tensor([0.5])
        latents = latent_length(seconds, "mmaudio_16k")
        flow = model.generator(torch.zeros(1, latents, 16), None, None, None, t)
        assert flow.shape[1] == latents == int(np.ceil(seconds * 16000 / 512))
