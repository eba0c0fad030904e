"""A finished run gives videos their sound, and measures itself."""

import json
import shutil

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
