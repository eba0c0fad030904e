"""Files of the sizes that MMAudio publishes, with made weights: through `generate`, through a run that adopts them, and back out."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from data_prep.manifest import write_manifest
from data_prep.media import ClipFormat, probe
from data_prep.prepare import prepare_shards
from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from data_prep.settings import PrepareConfig
from launch.cli import app
from models.codecs import autoencoder, bigvgan
from models.codecs.autoencoder import MelVAE
from models.encoders import synchformer
from models.encoders.synchformer import Synchformer
from models.generators import mmdit
from models.generators.mmdit import MMDiT
from tests.fixtures.made_encoders import small_open_clip

MISSING = [name for name in ("open_clip", "bigvgan") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by option. All have the published sizes but CLIP, which is one layer deep."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    generator, vae = MMDiT(mmdit.PRESETS["small_16k"]), MelVAE(autoencoder.PRESETS["16k"])
    torch.nn.init.normal_(generator.final_layer.conv.weight, std=0.02)  # its zeros would give every video the same sound
    visual = Synchformer(synchformer.PRESETS["divided_224_16x4"]).state_dict()
    encoder = {f"vfeat_extractor.{name}": value for name, value in visual.items()}
    vocoder = {"generator": bigvgan.BigVGAN(bigvgan.PRESETS["16k"]).network.state_dict()}
    clip, config = small_open_clip(folder / "clip", embed_dim=1024, text_width=1024)
    found = {"clip": clip, "clip-architecture": config.architecture, "clip-size": config.picture_size}
    for option, name, state in (("checkpoint", "mmaudio_small_16k.pth", generator.state_dict()), ("vae", "v1-16.pth", vae.state_dict()),
                                ("synchformer", "synchformer_state_dict.pth", encoder), ("vocoder", "best_netG.pt", vocoder)):
        torch.save(state, folder / name)
        found[option] = folder / name
    return found


def run(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


def videos(folder, count=2):
    settings = RenderConfig(size=48, seconds=1.6)
    return [row.source for row in read_rendered(folder, count, settings=settings, workers=1)]


def test_generate_reads_them_and_says_so(files, tmp_path):
    options = [part for name, value in files.items() for part in (f"--{name}", value)]
    run("generate", *options, "--out", tmp_path / "out", "--prompt", "rain", "--negative-prompt", "music", "--steps", 2, "--duration", 0.8,
        *videos(tmp_path))
    results = sorted((tmp_path / "out").glob("*.mp4"))
    assert len(results) == 2
    for result in results:
        record = json.loads(result.with_suffix(".json").read_text())
        assert (record["vocoder"], record["steps"], record["guidance"], record["sample_rate"]) == ("bigvgan_v1_16k", 2, 4.5, 16000)
        assert set(record["weights"]) == {"checkpoint", "vae", "vocoder", "clip", "synchformer"}
        assert record["seconds"] == 0.8 and probe(str(result)).duration == pytest.approx(1.6, abs=0.1)


def test_a_run_adopts_them_and_gives_them_back(files, tmp_path):
    rows = read_rendered(tmp_path / "clips", 2, heldout=2, settings=RenderConfig(size=48, seconds=1.6), workers=1)
    write_manifest(rows, tmp_path / "manifest.parquet")
    settings = PrepareConfig(format=ClipFormat(short_side=48, max_seconds=1.6), rows_per_shard=2)
    prepare_shards(str(tmp_path / "manifest.parquet"), str(tmp_path / "shards"), settings, workers=1)
    run("run", "mmaudio_finetune", f"data={tmp_path / 'shards'}", f"out={tmp_path}", "name=run", "heldout_split=heldout",
        "clip.seconds=1.28", "contrastive.segments=1", "generative.fine_tune=false", "generative.sampling_steps=2",
        "evaluation.clips=2", "evaluation.examples=1",
        f"autoencoder.weights={files['vae']}", f"generative.weights={files['checkpoint']}", f"vocoder.weights={files['vocoder']}",
        f"conditioning.clip_weights={files['clip']}", f"conditioning.synchformer_weights={files['synchformer']}",
        f"conditioning.clip_model.architecture={files['clip-architecture']}", f"conditioning.clip_model.picture_size={files['clip-size']}")
    run("evaluate", "--run", tmp_path / "run")
    figures = {figure["name"] for figure in json.loads((tmp_path / "run" / "evaluation.json").read_text())["figures"]}
    assert "flow loss, right video" in figures and not any("reward" in name or "retrieval" in name for name in figures)
    run("generate", "--run", tmp_path / "run", "--out", tmp_path / "out", "--prompt", "a bell", *videos(tmp_path / "in", 1))
    run("export", "--run", tmp_path / "run", "--out", tmp_path / "back.pth")
    given, back = (torch.load(path, weights_only=True) for path in (files["checkpoint"], tmp_path / "back.pth"))
    assert given.keys() == back.keys() and all(torch.equal(given[name], back[name]) for name in given)
    assert np.isfinite(sum(float(value.abs().mean()) for value in back.values()))
