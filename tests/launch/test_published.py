"""Files of the sizes that MMAudio publishes, with made weights: through `generate`, through a run that adopts them, and back out."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
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
from models.encoders.clip import CLIPConfig
from models.encoders.synchformer import Synchformer
from models.generators import mmdit
from models.generators.mmdit import MMDiT
from models.pretrained import load_mmaudio, load_mmaudio_vae
from pipelines.generate import GenerateOptions, generate_file
from pipelines.sounding import PublicFiles, SoundModel
from tests.fixtures.made_encoders import small_open_clip
from tests.fixtures.made_weights import made_state

MISSING = [name for name in ("open_clip", "bigvgan") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by option. All have the published sizes but CLIP, which is one layer deep."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    generator, vae = made_generator("small_16k"), MelVAE(autoencoder.PRESETS["16k"])
    visual = Synchformer(synchformer.PRESETS["divided_224_16x4"]).state_dict()
    encoder = {f"vfeat_extractor.{name}": value for name, value in visual.items()}
    vocoder = {"generator": bigvgan.BigVGAN(bigvgan.PRESETS["16k"]).network.state_dict()}
    clip, config = small_open_clip(folder / "clip", embed_dim=1024, text_width=1024)
    found = {"clip": clip, "clip-architecture": config.architecture, "clip-size": config.picture_size}
    for option, name, state in (("checkpoint", "mmaudio_small_16k.pth", generator), ("vae", "v1-16.pth", vae.state_dict()),
                                ("synchformer", "synchformer_state_dict.pth", encoder), ("vocoder", "best_netG.pt", vocoder)):
        torch.save(state, folder / name)
        found[option] = folder / name
    return found


def made_generator(preset):
    """A checkpoint whose every part counts: the gates and the output of a fresh generator are zero, and most of it could not train."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MMDiT(mmdit.PRESETS[preset]).state_dict().items()}
    dim = mmdit.PRESETS[preset].latent_dim
    return made_state(shapes) | {"latent_mean": torch.zeros(1, 1, dim), "latent_std": torch.ones(1, 1, dim)}


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


def prepared(folder):
    """Shards of two clips to train on and two held-out ones, 1.6 s each."""
    rows = read_rendered(folder / "clips", 2, heldout=2, settings=RenderConfig(size=48, seconds=1.6), workers=1)
    write_manifest(rows, folder / "manifest.parquet")
    settings = PrepareConfig(format=ClipFormat(short_side=48, max_seconds=1.6), rows_per_shard=2)
    prepare_shards(str(folder / "manifest.parquet"), str(folder / "shards"), settings, workers=1)
    return folder / "shards"


def finetune(files, folder, *more):
    """Run the recipe for published weights on `prepared` clips, in `folder`/run."""
    run("run", "mmaudio_finetune", f"data={prepared(folder)}", f"out={folder}", "name=run", "heldout_split=heldout",
        "clip.seconds=1.28", "contrastive.segments=1", "generative.sampling_steps=2", "evaluation.clips=2", "evaluation.examples=1",
        f"autoencoder.weights={files['vae']}", f"generative.weights={files['checkpoint']}", f"vocoder.weights={files['vocoder']}",
        f"conditioning.clip_weights={files['clip']}", f"conditioning.synchformer_weights={files['synchformer']}",
        f"conditioning.clip_model.architecture={files['clip-architecture']}", f"conditioning.clip_model.picture_size={files['clip-size']}",
        *more)


def changed(one, other):
    """Names whose values differ; both must have the same names."""
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_a_run_adopts_them_and_gives_them_back(files, tmp_path):
    finetune(files, tmp_path, "generative.fine_tune=false")
    run("evaluate", "--run", tmp_path / "run")
    figures = {figure["name"] for figure in json.loads((tmp_path / "run" / "evaluation.json").read_text())["figures"]}
    assert "flow loss, right video" in figures and not any("reward" in name or "retrieval" in name for name in figures)
    run("generate", "--run", tmp_path / "run", "--out", tmp_path / "out", "--prompt", "a bell", *videos(tmp_path / "in", 1))
    run("export", "--run", tmp_path / "run", "--out", tmp_path / "back.pth", "--vae-out", tmp_path / "v1-16.pth")
    for option, name in (("checkpoint", "back.pth"), ("vae", "v1-16.pth")):
        given, back = (torch.load(path, weights_only=True) for path in (files[option], tmp_path / name))
        assert not changed(given, back)
        assert np.isfinite(sum(float(value.abs().mean()) for value in back.values()))


def test_training_goes_on_from_them_and_back_under_their_names(files, tmp_path):
    """Two steps of the flow loss and a preference round of two; where nothing trains, the published bits are still there."""
    short = [f"{stage}.train.{option}" for stage in ("contrastive", "generative", "preference") for option in (
        "steps=2", "batch_size=2", "precision=fp32", "ema_decay=0", "log_every=1", "validation_clips=2", "stream.workers=0",
        "keep_checkpoints=1", "optimiser.lr=1e-4", "optimiser.warmup_steps=0")]
    finetune(files, tmp_path, *short, "clip.size=48", "contrastive.model=tiny", "generative.drop_video=0.5", "generative.drop_text=0.5",
             "features.batch_size=2", "features.statistics_clips=2", "vocoder.kind=griffin_lim", "vocoder.iterations=2",
             "vocoder.inversion_steps=2", "preference.rounds=1", "preference.candidates=2", "preference.videos=2",
             "preference.train.accumulation=1")
    run("export", "--run", tmp_path / "run", "--out", tmp_path / "mmaudio_small_16k.pth", "--vae-out", tmp_path / "v1-16.pth")

    given, back = (torch.load(path, weights_only=True) for path in (files["checkpoint"], tmp_path / "mmaudio_small_16k.pth"))
    tuned = safetensors.torch.load_file(tmp_path / "run" / "generative" / "export" / "weights.safetensors")
    stored = {"empty_string_feat", "latent_mean", "latent_std"}
    # Queries of frames and text have no use in the last joint block, which updates the latents only.
    idle = {f"joint_blocks.3.{part}_block.attn.q_norm.weight" for part in ("clip", "text")}
    assert changed(given, tuned) == given.keys() - stored - idle
    top = {name for name in given if name.startswith(("fused_blocks.7.", "final_layer."))}
    assert changed(tuned, back) == top
    assert all(value.isfinite().all() for value in back.values())
    assert max(float((given[name] - back[name]).abs().max()) for name in given) < 1e-3, "four steps at a rate of 1e-4"

    load_mmaudio(back, "small_16k")
    vae = torch.load(tmp_path / "v1-16.pth", weights_only=True)
    assert not changed(torch.load(files["vae"], weights_only=True), vae)
    load_mmaudio_vae(vae, "16k")


def test_published_weights_at_44_khz_give_sound(files, tmp_path):
    """The smallest of them: 345 latents are 8 s of its training, of which MMAudio makes 353,280 samples."""
    torch.save(made_generator("small_44k"), tmp_path / "mmaudio_small_44k.pth")
    torch.save(MelVAE(autoencoder.PRESETS["44k"]).state_dict(), tmp_path / "v1-44.pth")
    clip = CLIPConfig(architecture=files["clip-architecture"], picture_size=files["clip-size"])
    model = SoundModel.from_public(
        PublicFiles(checkpoint=tmp_path / "mmaudio_small_44k.pth", vae=tmp_path / "v1-44.pth", clip=files["clip"],
                    synchformer=files["synchformer"], clip_model=clip), torch.device("cpu"))
    assert (model.sample_rate, model.front_end, model.steps, model.guidance, model.seconds) == (44100, "mmaudio_44k", 25, 4.5, 8.0)
    assert model.generator.config == mmdit.PRESETS["small_44k"] and model.vae.config == autoencoder.PRESETS["44k"]
    noise = model.noise(1, 8.0, seed=0)
    assert noise.shape == (1, 345, 40) and 2 * 345 * model.vocoder.spec.hop == 353_280
    options = GenerateOptions(duration=0.8, steps=2, prompt="rain")
    sound = generate_file(model, Path(videos(tmp_path / "in", 1)[0]), tmp_path / "out.mp4", options)
    assert len(sound) == 35_280 and np.isfinite(sound).all() and np.abs(sound).max() > 1e-4
    (tmp_path / "v1-44.pth").unlink()  # 1.2 GB
