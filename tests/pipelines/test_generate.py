"""Which windows go together and how long they wait, prompts of single videos, precision and compiled blocks."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from models.conditioning import Conditions
from pipelines.generate import _WAITING, GenerateOptions, Piece, batches, generate_file, generate_files
from tests.fixtures.made_encoders import SmallCLIP, small_mmaudio


def made_pieces(lengths, pulled):
    """A window of each length, its number noted as it is read."""
    for number, length in enumerate(lengths):
        pulled.append(number)
        yield Piece(None, number, 0.0, float(length), Conditions(clip=torch.zeros(1, length, 1)), None)


@given(lengths=st.lists(st.integers(1, 40), max_size=120), size=st.integers(1, 5))
def test_every_window_comes_out_once_and_few_wait(lengths, size):
    pulled, out = [], []
    for batch in batches(made_pieces(lengths, pulled), size):
        assert len({piece.seconds for piece in batch}) == 1 and 1 <= len(batch) <= size
        out += [piece.number for piece in batch]
        assert len(pulled) - len(out) <= _WAITING * size or len(pulled) == len(lengths)
    assert sorted(out) == list(range(len(lengths)))


def test_a_hundred_lengths_do_not_pile_up():
    pulled, seen, out = [], [], []
    for batch in batches(made_pieces(range(1, 101), pulled), 4):
        out += [piece.number for piece in batch]
        seen.append(len(pulled) - len(out))
    assert out == list(range(100)), "those that wait longest first"
    assert max(seen) == _WAITING * 4


def rendered(folder, seconds, seed=0):
    return Path(next(iter(read_rendered(folder, 1, seed=seed, settings=RenderConfig(size=32, seconds=seconds), workers=1))).source)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve short videos of as many lengths."""
    folder = tmp_path_factory.mktemp("videos")
    return [rendered(folder / str(n), 1.6 + 0.08 * n, n).rename(folder / f"{n:02}.mp4") for n in range(12)]


def test_the_first_file_comes_before_the_last_video_is_read(videos, tmp_path, monkeypatch):
    model, read, at = small_mmaudio(), [], []
    see = model.read
    monkeypatch.setattr(model, "read", lambda path, *rest: read.append(path) or see(path, *rest))
    generate_files(model, videos, tmp_path, GenerateOptions(batch_size=1, steps=1), say=lambda line: at.append(len(read)))
    assert at == list(range(1, 13)), "batches of one wait for nobody"
    read.clear(), at.clear()
    monkeypatch.setattr("pipelines.generate._WAITING", 2)
    generate_files(model, videos, tmp_path, GenerateOptions(batch_size=2, steps=1, overwrite=True), say=lambda line: at.append(len(read)))
    assert at == [*range(5, 13), *[12] * 4]


def test_prompts_of_single_videos(videos, tmp_path):
    model = small_mmaudio()
    clip = next(module for module in model.conditioner.modules() if isinstance(module, SmallCLIP))
    options = GenerateOptions(prompt="rain", negative_prompt="music", duration=0.8, steps=1)
    own = {videos[0]: {"prompt": "a bell"}, videos[1]: {"prompt": "a bell", "negative_prompt": "wind"}}
    clip.read.clear()
    generate_files(model, videos[:4], tmp_path, options, say=lambda line: None, prompts=own)
    assert sorted(clip.read) == ["a bell", "music", "rain", "wind"], "each once"
    told = [json.loads((tmp_path / f"{n:02}.json").read_text())["options"] for n in range(3)]
    assert [(one["prompt"], one["negative_prompt"]) for one in told] == [("a bell", "music"), ("a bell", "wind"), ("rain", "music")]
    lines = []
    generate_files(model, videos[:4], tmp_path, options, say=lines.append, prompts=own)
    assert all(line.endswith("there already, skipped") for line in lines), lines
    for number, changed in ((0, {"prompt": "a bell"}), (1, {"prompt": "a bell", "negative_prompt": "wind"}), (2, {})):
        alone = GenerateOptions(**({"prompt": "rain", "negative_prompt": "music"} | changed), duration=0.8, steps=1)
        generate_file(model, videos[number], tmp_path / "alone.mp4", alone)
        assert sound_of(tmp_path / "alone.mp4") == pytest.approx(sound_of(tmp_path / f"{number:02}.mp4"), abs=1e-3)


def sound_of(path):
    import av

    with av.open(str(path)) as media:
        return [float(value) for frame in media.decode(audio=0) for value in frame.to_ndarray().reshape(-1)]


def latents_of(model, video, out):
    """Latents of a video as they reach the autoencoder."""
    kept, waveform = [], model.waveform
    model.waveform = lambda latents: kept.append(latents) or waveform(latents)
    generate_file(model, video, out, GenerateOptions(prompt="rain", negative_prompt="music"))
    del model.waveform
    return kept[0]


def test_bfloat16_is_close(videos, tmp_path):
    """Within 5 % of the norm of the latents, after three steps with guidance 4.5; the autoencoder gets them in float32."""
    model = small_mmaudio()
    full = latents_of(model, videos[0], tmp_path / "full.mp4")
    model.generator.bfloat16()
    half = latents_of(model, videos[0], tmp_path / "half.mp4")
    assert half.dtype == torch.float32 and 0 < (half - full).norm() < 0.05 * full.norm()
    assert {next(part.parameters()).dtype for part in (model.vae, model.conditioner)} == {torch.float32}
    assert [json.loads((tmp_path / f"{name}.json").read_text())["precision"] for name in ("full", "half")] == ["fp32", "bf16"]


def test_another_precision_is_told(videos, tmp_path):
    model, lines = small_mmaudio(), []
    generate_files(model, videos[:1], tmp_path, GenerateOptions(steps=1), say=lambda line: None)
    record = json.loads((tmp_path / "00.json").read_text())
    del record["precision"]
    (tmp_path / "00.json").write_text(json.dumps(record))
    for _ in range(2):
        generate_files(model, videos[:1], tmp_path, GenerateOptions(steps=1), say=lines.append)
        model.generator.bfloat16()
    assert lines[0].endswith("skipped") and "made with other settings or weights" in lines[1]


def test_compiled_blocks_give_the_same(videos, tmp_path):
    model = small_mmaudio()
    plain = latents_of(model, videos[0], tmp_path / "plain.mp4")
    model.generator.compile_blocks(backend="eager")
    assert torch.allclose(latents_of(model, videos[0], tmp_path / "compiled.mp4"), plain, rtol=1e-4, atol=1e-5)
