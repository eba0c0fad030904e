"""Encoders that judge: loaded from an export, whatever it holds is said in one line."""

import pytest
import torch

from models.codecs.autoencoder import PRESETS as VAES
from models.codecs.autoencoder import MelVAE
from models.encoders.rewards import load_reward
from models.encoders.sf_cavp import PRESETS, SFCAVP
from models.pretrained import save_weights


def test_an_export_judges_as_the_encoder_did(tmp_path):
    encoder = SFCAVP(PRESETS["tiny"]).eval()
    save_weights(encoder, PRESETS["tiny"], tmp_path)
    reward = load_reward(tmp_path).eval()
    assert (reward.config.mel, reward.config.fps) == ("sf_cavp", 25.0)
    frames, mel = torch.rand(2, 64, 3, 32, 32), torch.randn(2, 128, 256)
    with torch.no_grad():
        scores = [each.similarity(each.encode_video(frames).segments, each.encode_audio(mel).segments) for each in (encoder, reward)]
    assert scores[0].shape == (2, 2) and torch.equal(*scores)


def test_an_export_that_cannot_judge_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing: name the export of a contrastive stage"):
        load_reward(tmp_path)
    save_weights(MelVAE(VAES["tiny"]), VAES["tiny"], tmp_path)
    with pytest.raises(ValueError, match="config.json describes no encoder that can judge sounds: name the export of a contrastive stage"):
        load_reward(tmp_path)
