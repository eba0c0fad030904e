"""The controls of a finished run: each is measured on the clips of the run's own figures, and changes nothing of the run."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.sidecar import ShardError
from models.conditioning import CombinedConditioner, EncoderConditioner, SynchformerConditioner
from models.encoders.sf_cavp import PRESETS as ENCODERS
from models.encoders.sf_cavp import SFCAVP
from models.encoders.synchformer import PRESETS, Synchformer
from pipelines.controls import Controls, token_seconds
from pipelines.heldout import HeldOut, sound_heldout
from pipelines.metrics.onsets import detect_onsets
from pipelines.metrics.statistics import shuffled_partner
from pipelines.sounding import SoundModel

ONSETS = ("true log-mels through the autoencoder", "true log-mels through autoencoder and vocoder", "generated",
          "generated from frozen videos", "generated from black videos", "generated, against another clip", "silence")
PROBES = ("linear probe", "linear probe, untrained encoder")
NAMES = {
    "autoencoder L1, relative: linear code", "untrained encoder: retrieval R@1", "untrained encoder: right segment of a clip",
    "untrained encoder: true sound over itself 0.3 s out of time", *(f"onset F1: {name}" for name in ONSETS),
    *(f"{probe}: {what}" for probe in PROBES for what in ("onset F1", "correlation with the onsets")),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tiny):
    """The controls of the tiny run, its sounds, and the figures by name."""
    model = SoundModel.from_run(tiny.run, torch.device("cpu"))
    recipe = replace(model.recipe, evaluation=replace(model.recipe.evaluation, probe_clips=16))
    held = HeldOut.encode(model, recipe, range(8))
    partner = shuffled_partner(len(held), 0)
    sounded = sound_heldout(model, recipe, held, partner)
    controls, state = Controls(model, model, recipe, held), torch.get_rng_state()
    figures = controls.figures(sounded, partner)
    assert torch.equal(torch.get_rng_state(), state), "controls must not move the dice of what comes after"
    return controls, sounded, {figure.name: figure for figure in figures}


def test_every_control_has_its_error_and_its_count(measured):
    _, _, figures = measured
    assert set(figures) == NAMES
    for figure in figures.values():
        assert -1 <= figure.value <= 1 and np.isfinite(figure.value)
        if figure.name.endswith("R@1"):
            assert "error over 3 galleries of 8" in figure.note
        if not figure.name.endswith(("R@1", "linear code")):
            assert figure.standard_error >= 0 and figure.note.endswith("8 clips")


def test_sounds_between_silence_and_truth(measured):
    controls, sounded, figures = measured
    quiet = [len(detect_onsets(mel, "mmaudio_16k")) == 0 for mel in controls.held.mel.numpy()]
    assert figures["onset F1: silence"].value == pytest.approx(np.mean(quiet))
    assert figures["onset F1: generated"].value == pytest.approx(sounded.onset_f1.mean())
    assert re.match(r"generated minus this 0.000 ± 0.000", figures["onset F1: generated"].note)
    assert figures["onset F1: generated, against another clip"].value == pytest.approx(sounded.onset_f1_shuffled.mean())


def test_rows_are_those_of_the_clips_that_were_measured(measured):
    """Also where a clip can be read now that could not be then; one that cannot be read again is told."""
    controls, _, _ = measured
    every = torch.cat([batch["position"] for batch in controls._held()]).tolist()
    fewer = Controls(controls.seeing, controls.sounding, controls.recipe, replace(controls.held, positions=torch.tensor([0, 2, 5])))
    assert every == list(range(8)) and torch.cat([batch["position"] for batch in fewer._held()]).tolist() == [0, 2, 5]
    more = Controls(controls.seeing, controls.sounding, controls.recipe, replace(controls.held, positions=torch.arange(9)))
    with pytest.raises(ShardError, match="1 held-out clips could not be read again: give the command again"):
        list(more._held())


def test_frozen_and_black_videos_are_the_same_all_along(measured):
    controls, _, _ = measured
    (still, black), segments = controls._sightless(), 3
    shapes = {name: controls.held.features[name].shape for name in ("clip", "sync")}
    for conditions in (still, black):
        assert {name: values.shape for name, values in conditions.items()} == shapes
        for values in conditions.values():
            first, *others = values.unflatten(1, (segments, -1)).unbind(dim=1)
            assert all(torch.allclose(first, other, atol=1e-5) for other in others)
    alike = {name: torch.allclose(values[:1].expand_as(values), values, atol=1e-5) for name, values in black.items()}
    assert all(alike.values()), "nothing tells black clips apart"


def test_the_untrained_encoder_is_another_of_the_same_kind(measured):
    controls, _, _ = measured
    trained, untrained = controls.seeing.reward, controls._untrained()
    assert untrained.config == trained.config and not untrained.training
    assert not torch.equal(next(untrained.parameters()), next(trained.parameters()))
    # Its embeddings are standardised: without statistics of its own they would all point one way.
    frames = controls._frames(next(controls._training(8)))
    embeddings = untrained.encode_video(frames).segments.flatten(0, 1)
    assert float(embeddings.mean(dim=0).abs().mean()) < 0.5 * float(embeddings.std())


def test_times_of_tokens():
    own = CombinedConditioner(sync=EncoderConditioner(SFCAVP(ENCODERS["tiny"])))
    assert token_seconds(own, 96, 32, 3.84) == pytest.approx((np.arange(96) + 0.5) / 25)
    assert token_seconds(own, 192, 32, 8.0) == pytest.approx((np.arange(192) + 0.5) / 24), "7.68 s of tokens lie over 8 s of pictures"
    overlapping = CombinedConditioner(sync=SynchformerConditioner(Synchformer(PRESETS["tiny"])))
    group = overlapping.parts[0].encoder.config.segment_tokens
    seconds = token_seconds(overlapping, 2 * group, group, 5.12)
    assert seconds[group] - seconds[0] == pytest.approx(8 / 25) and seconds[1] - seconds[0] == pytest.approx(16 / group / 25)
