"""The contrastive stage: steps on two real processes, weights to start from, and what it reads and validates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.encoders.sf_cavp import PRESETS, SFCAVP, SFCAVPConfig
from models.pretrained import load_weights
from pipelines.config import ContrastiveConfig, Recipe, TrainConfig
from pipelines.recipes import load_recipe
from pipelines.stages.contrastive import ContrastiveStage, load_video_tower
from pipelines.stages.data import clips
from tests.fixtures.made_weights import made_state, parity_keys
from tests.fixtures.tiny_chain import overrides
from tests.fixtures.two_ranks import run_on_two_ranks


def furthest_from_plain_torch(folder: Path, cases: str) -> dict[str, float]:
    """Case -> largest difference of a weight."""
    return run_on_two_ranks(__file__, "contrastive_steps.py", folder, "worst.json", cases, seconds=560)


def test_cached_gradients_on_two_ranks_are_a_plain_torch_step_on_the_full_batch(tmp_path):
    ((_, distance),) = furthest_from_plain_torch(tmp_path, "one").items()
    assert distance < 1e-6


@pytest.mark.slow
def test_steps_on_two_ranks_are_plain_torch_steps_on_the_full_batch(tmp_path):
    """ZeRO 0 to 3, clipping on and off, whole and by chunks, with and without activation checkpointing."""
    worst = furthest_from_plain_torch(tmp_path, "all")
    assert len(worst) == 4 * 4 + 1
    assert all(distance < 1e-6 for distance in worst.values()), worst


def test_chunks_and_accumulation_together_are_refused():
    with pytest.raises(ValueError, match=r"contrastive.chunk is 2 and contrastive.train.accumulation 4: set accumulation to 1"):
        ContrastiveConfig(chunk=2, train=TrainConfig(batch_size=8, accumulation=4))
    with pytest.raises(ValueError, match="contrastive.chunk is -1"):
        ContrastiveConfig(chunk=-1)
    with pytest.raises(ValueError, match="contrastive.segments is 0"):
        ContrastiveConfig(segments=0)


@pytest.mark.parametrize(("hop", "seconds"), [(32, 3.84), (16, 2.56)])
def test_clips_are_as_long_as_their_segments(hop, seconds):
    assert ContrastiveConfig(model=replace(PRESETS["tiny"], hop_frames=hop), segments=3).seconds == seconds


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> str:
    """A file as PyTorchVideo publishes it."""
    path = tmp_path_factory.mktemp("weights") / "SLOWFAST_8x8_R50.pyth"
    torch.save({"model_state": made_state(parity_keys("slowfast_r50_video"), unit_vectors=True)}, path)
    return str(path)


def test_the_video_tower_starts_from_published_weights(published):
    recipe = Recipe(contrastive=ContrastiveConfig(model=PRESETS["r50_kinetics"], video_weights=published))
    state, found = made_state(parity_keys("slowfast_r50_video"), unit_vectors=True), ContrastiveStage(recipe).build().video.state_dict()
    pairs = {"slow_stem.0.conv.weight": "blocks.0.multipathway_blocks.0.conv.weight",
             "fast_stages.3.2.c.norm.weight": "blocks.4.multipathway_blocks.1.res_blocks.2.branch2.norm_c.weight"}
    assert all(torch.equal(found[ours], state[theirs]) for ours, theirs in pairs.items())


def test_published_weights_that_do_not_fit_are_refused(published, tmp_path):
    with torch.device("meta"):
        encoder = SFCAVP(PRESETS["r50"])
    with pytest.raises(ValueError, match=f"contrastive.video_weights {published} does not fit.*choose contrastive.model=r50_kinetics"):
        load_video_tower(encoder, published)
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pyth")
    with pytest.raises(ValueError, match="PyTorchVideo slowfast_r50 checkpoint does not fit"):
        load_video_tower(encoder, str(tmp_path / "other.pyth"))
    with pytest.raises(FileNotFoundError, match="contrastive.video_weights names .*missing.pyth, which is not there"):
        load_video_tower(encoder, str(tmp_path / "missing.pyth"))


def test_validation_asks_what_and_when(tiny):
    """Retrieval of whole clips, and the picture that a segment's sound is nearest to among the three of its clip."""
    recipe = load_recipe("demo", overrides(tiny.folder, tiny.shards))
    stage, encoder = ContrastiveStage(recipe), load_weights(SFCAVP, SFCAVPConfig, tiny.run / "contrastive" / "export").eval()
    found = stage.validate(encoder, torch.device("cpu")).scalars
    assert 0 <= found["r@1"] <= found["r@5"] <= 1 and "r@10" not in found, "there are eight clips"
    hits = []
    for batch in clips(recipe, "heldout", 8):
        with torch.no_grad():
            inputs = stage.inputs(batch, None, torch.device("cpu"))
            video, audio = encoder.encode_video(inputs["frames"]).segments, encoder.encode_audio(inputs["mel"]).segments
        nearest = torch.cosine_similarity(audio[:, :, None], video[:, None], dim=-1).argmax(dim=2)
        hits.append((nearest == torch.arange(3)).float())
    assert found["right_segment"] == pytest.approx(torch.cat(hits).mean().item())
