"""A finished run gives videos their sound, and measures itself."""

import json
import shutil
import sys

import av
import numpy as np
import pytest
import torch

from data_prep.media import probe
from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from pipelines.evaluate import evaluate, table
from pipelines.generate import GenerateOptions, generate_file
from pipelines.report import write_report
from pipelines.sounding import RunError, SoundModel, generator_export
from tests.fixtures.tiny_chain import start


def packets(path, kind):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(**{kind: 0}) if packet.size]


@pytest.fixture(scope="module")
def model(tiny):
    return SoundModel.from_run(tiny.run, torch.device("cpu"))


@pytest.mark.parametrize("seconds", [2.0, 3.84, 9.0])
def test_pictures_are_copied_and_the_sound_is_as_long(model, tmp_path, seconds):
    settings = RenderConfig(size=48, seconds=seconds)
    video = next(iter(read_rendered(tmp_path / "in", 1, seed=3, settings=settings, workers=1))).source
    waveform = generate_file(model, video, tmp_path / "out.mp4")
    assert packets(tmp_path / "out.mp4", "video") == packets(video, "video")
    assert len(waveform) == round(probe(video).duration * 16000)
    assert np.abs(waveform).max() > 1e-4 and np.isfinite(waveform).all()
    with av.open(str(tmp_path / "out.mp4")) as container:
        audio = container.streams.audio[0]
        assert float(audio.duration * audio.time_base) == pytest.approx(seconds, abs=0.1)


def test_a_seed_gives_one_sound(model, tmp_path):
    video = next(iter(read_rendered(tmp_path / "in", 1, settings=RenderConfig(size=32), workers=1))).source
    first, again, other = (generate_file(model, video, tmp_path / "out.mp4", GenerateOptions(seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.slow
def test_a_bad_video_of_one_process_ends_no_other(tiny, tmp_path):
    """Process 0 is done with its share, a file that is no video, long before process 1."""
    (long,) = (row.source for row in read_rendered(tmp_path / "in", 1, settings=RenderConfig(size=32, seconds=30.0), workers=1))
    bad, good = ([tmp_path / f"{kind}{number}.mp4" for number in range(2)] for kind in ("bad", "good"))
    for no_video, video in zip(bad, good, strict=True):
        no_video.write_bytes(b"no video")
        shutil.copy(long, video)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1", "--nproc_per_node=2", "-m", "launch.cli", "--"]
    videos = [bad[0], good[0], bad[1], good[1]]
    arguments = ["generate", "--run", tiny.run, "--out", tmp_path / "out", "--batch-size", 1, "--steps", 4, *videos]
    process = start([sys.executable, "-W", "ignore", *launcher, *map(str, arguments)])
    said, _ = process.communicate(timeout=280)
    assert process.returncode != 0, said
    assert all(f"{path}: " in said for path in bad), said
    assert "2 of 2 videos have got no sound, for the reasons above; the other processes are waited for" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good0.json", "good0.mp4", "good1.json", "good1.mp4"]
    assert [probe(str(tmp_path / "out" / path.name)).duration for path in good] == pytest.approx([30.0, 30.0], abs=0.1)


def test_bfloat16_is_close_and_says_so(tiny, tmp_path):
    """Within 5 % of the sound's norm: two or three digits a step; a run's own encoders under autocast."""
    video = next(iter(read_rendered(tmp_path / "in", 1, settings=RenderConfig(size=32), workers=1))).source
    model = SoundModel.from_run(tiny.run, torch.device("cpu"))
    sounds, kept = [], []
    waveform = model.waveform
    model.waveform = lambda latents: kept.append(latents) or waveform(latents)
    for precision in ("fp32", "bf16"):
        sounds.append(generate_file(model, video, tmp_path / "out.mp4"))
        assert json.loads((tmp_path / "out.json").read_text())["precision"] == precision
        model.generator.bfloat16()
    full, half = kept
    assert half.dtype == torch.float32 and 0 < (half - full).norm() < 0.05 * full.norm()
    assert np.isfinite(sounds[1]).all() and len(sounds[0]) == len(sounds[1])


def test_evaluation_and_report(tiny):
    bars = evaluate(tiny.run, torch.device("cpu"))
    assert [bar.passed for bar in bars].count(False) > 0, "six steps cannot pass"
    found = json.loads((tiny.run / "evaluation.json").read_text())
    names = [figure["name"] for figure in found["figures"]]
    assert {"retrieval R@1", "autoencoder L1, relative", "onset F1, own minus shuffled clip", "right segment of a clip"} <= set(names)
    for figure in found["figures"]:
        assert np.isfinite(figure["value"]) and figure["name"] in table(tiny.run)
    for example in found["examples"]:
        for kind in ("truth", "generated"):
            assert probe(str(tiny.run / example[f"{kind}_video"])).duration == pytest.approx(3.84)
    assert "retrieval" in write_report(tiny.run).read_text()


def test_the_generator_of_a_run_is_the_round_that_was_kept(tmp_path):
    for name in ("generative", "preference/round-1", "preference/round-2", "preference/round-10"):
        (tmp_path / name / "export").mkdir(parents=True)
        (tmp_path / name / "export" / "complete.json").write_text("{}")
    best = tmp_path / "preference" / "best.json"

    def found(stage=None):
        return str(generator_export(tmp_path, stage).parent.relative_to(tmp_path))

    assert found() == "preference/round-10"
    for kept, expected in ((0, "generative"), (2, "preference/round-2")):
        best.write_text(json.dumps({"round": kept}))
        assert (found(), found("preference/round-1"), found("generative")) == (expected, "preference/round-1", "generative")
    best.write_text(json.dumps({"round": 3}))
    with pytest.raises(RunError, match="preference/round-3/export is missing: finish the run"):
        found()
    shutil.rmtree(tmp_path / "preference")
    assert found() == "generative"


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    with pytest.raises(RunError, match="recipe.yaml is missing: finish the run"):
        SoundModel.from_run(tmp_path, torch.device("cpu"))
