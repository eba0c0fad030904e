"""AVP-RPO's model: a shared trunk, a trained top, a reference that stays; and the pairs that it sees."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from data_prep.index import build_index
from data_prep.shards import ShardWriter
from models.generators.mmdit import PRESETS, MMDiT, MMDiTConfig
from models.objectives.flow_dpo import flow_dpo_loss
from models.objectives.flow_matching import flow_loss, interpolate
from models.pretrained import load_weights, save_weights
from pipelines.engine.draws import Draws
from pipelines.recipes import load_recipe
from pipelines.stages.preference import PreferenceModel, PreferenceStage
from tests.fixtures.made_shards import npy
from tests.fixtures.two_ranks import run_on_two_ranks
from tests.pipelines.stages.test_generative import CONFIG

CPU = torch.device("cpu")


def made(seed=0):
    torch.manual_seed(seed)
    generator = MMDiT(CONFIG)
    for parameter in generator.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return generator


def model(tuning="top", **options):
    return PreferenceModel(made(), **{"beta": 3.0, "normalise": "none", **options}, whole_reference=made() if tuning == "full" else None)


def batch(dtype=torch.float32):
    shapes = {"winner": (3, 12, 4), "loser": (3, 12, 4), "noise": (3, 12, 4), "clip": (3, 6, 8), "sync": (3, 32, 8)}
    generator = torch.Generator().manual_seed(1)
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {"t": torch.rand(3, generator=generator)}
    return {name: tensor.to(dtype) for name, tensor in given.items()}


def four_passes(policy, reference, given):
    """Flow losses the usual way: both models, winner and loser, each from end to end."""
    losses = []
    for generator in (policy, reference):
        for side in ("winner", "loser"):
            x_t, target = interpolate(given["noise"], given[side], given["t"])
            losses.append(flow_loss(generator(x_t, given["clip"], given["sync"], None, given["t"]), target))
    return losses


@pytest.mark.parametrize("tuning", ["top", "full"])
def test_it_equals_two_full_models(tuning):
    """Loss, what is logged, and every gradient. In float64: batches of six and of three are summed in another order."""
    policy, found_model, given = made().double(), model(tuning).double(), batch(torch.float64)
    for generator in (policy, found_model.generator):
        with torch.no_grad():
            for parameter in generator.top_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    found, losses = found_model(**given), four_passes(policy, made().double(), given)
    expected = flow_dpo_loss(*losses, beta=3.0)
    torch.testing.assert_close(found["dpo"], expected.loss.detach())
    torch.testing.assert_close(found["margin"], expected.margin, rtol=1e-4, atol=0)
    total = expected.loss + losses[0].mean()
    torch.testing.assert_close(found["loss"], total)
    found["loss"].backward()
    total.backward()
    theirs = dict(policy.named_parameters())
    ours = {name: p.grad for name, p in found_model.generator.named_parameters() if p.requires_grad}
    assert len(ours) > 10
    worst = max(float((gradient - theirs[name].grad).norm() / theirs[name].grad.norm()) for name, gradient in ours.items())
    assert worst < 1e-5


@pytest.mark.parametrize("tuning", ["top", "full"])
def test_it_starts_at_its_reference(tuning):
    found = model(tuning, beta=1000.0, normalise="running_max").double()(**batch(torch.float64))
    assert found["margin"] == found["margin_win"] == found["margin_lose"] == 0
    torch.testing.assert_close(found["dpo"], torch.tensor(2.0).log())
    torch.testing.assert_close(found["loss"].detach(), torch.tensor(2.0))


def test_only_the_top_trains():
    aligned = model()
    aligned(**batch())["loss"].backward()
    trained = {name for name, parameter in aligned.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in aligned.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"fused_blocks", "final_layer"}
    with torch.device("meta"):
        published = PreferenceModel(MMDiT(dataclasses.replace(PRESETS["small_16k"])), beta=1.0)
    assert sum(parameter.numel() for parameter in published.parameters() if parameter.requires_grad) == 8_039_060


def test_full_trains_all_that_a_pair_reads():
    aligned, generative = model("full"), made()
    aligned(**batch())["loss"].backward()
    trained = {name for name, parameter in aligned.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in aligned.named_parameters() if parameter.requires_grad}
    missing_video = {"empty_clip_feat", "empty_sync_feat"}
    wanted = {name for name, parameter in generative.named_parameters() if parameter.requires_grad} - missing_video
    assert {name.removeprefix("generator.") for name in trained} == wanted


@pytest.mark.parametrize("tuning", ["top", "full"])
def test_frozen_weights_are_exported_as_they_were(tuning, tmp_path):
    """Whatever the engine makes of them: here all come back changed."""
    save_weights(made(), CONFIG, tmp_path / "start")
    stage = made_stage(tmp_path / "start", f"tuning={tuning}")
    weights = {name: value + 1 for name, value in stage.build().state_dict().items()}
    stage.export(weights, tmp_path / "export")
    before, after = (load_weights(MMDiT, MMDiTConfig, tmp_path / name).state_dict() for name in ("start", "export"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name.removeprefix("generator.") for name, p in stage.build().named_parameters() if p.requires_grad}
    assert changed == trained and all(torch.equal(after[name], before[name] + 1) for name in changed)
    assert (len(changed) < len(before) / 4) == (tuning == "top")


def test_objective_by_the_recipe(tmp_path):
    save_weights(made(), CONFIG, tmp_path)
    found = {name: made_stage(tmp_path, f"objective={name}").build()(**batch()) for name in ("avp_rpo", "dpo", "flow_win")}
    assert torch.equal(found["dpo"]["loss"].detach(), found["dpo"]["dpo"])
    assert torch.equal(found["flow_win"]["loss"].detach(), found["flow_win"]["flow_win"])
    balanced, beta = found["avp_rpo"], made_stage(tmp_path).config.beta
    assert balanced["loss"].item() == pytest.approx(1 + math.log(2) / beta / balanced["flow_win"].item())
    assert made_stage(tmp_path, "normalise=running_max").build()(**batch())["loss"].item() == pytest.approx(2.0)


def made_stage(start, *overrides):
    values = ("train.steps=10", "train.batch_size=4", *overrides)
    return PreferenceStage(load_recipe("demo", [f"preference.{value}" for value in values]), "", "", start, 1)


def pairs(position, **layers):
    """Latents that say what they are: true sounds are 0 with a deviation of 0.1, candidates 1 and 2, the distorted ones 10 and on."""
    count = len(position)
    rows = 10 + torch.arange(12.0)[None, :, None, None].expand(count, 12, 6, 4)
    found = {"latent_mean": torch.zeros(count, 6, 4), "latent_std": torch.full((count, 6, 4), 0.1), "distorted": rows,
             "loser": torch.ones(count, 6, 4), "winner": torch.full((count, 6, 4), 2.0), "clip": torch.ones(count, 3, 8),
             "sync": torch.ones(count, 3, 8)}
    return found | {"position": torch.as_tensor(position)} | layers


def test_variants_of_a_round_share_their_noise(tmp_path):
    batches, positions = pairs(range(40)), torch.arange(40)
    variants = [(), ("losers=mixed",), ("losers=distorted",), ("winner=best_of_n",)]
    found = [made_stage(tmp_path, *options).inputs(batches, Draws(7, positions), CPU) for options in variants]
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in ("noise", "t"))
    assert all(torch.equal(found[0]["winner"], other["winner"]) for other in found[1:3])
    assert found[0]["winner"].std().item() == pytest.approx(0.1, rel=0.1)
    assert (found[0]["loser"] == 1).all() and (found[2]["loser"] >= 10).all()
    assert (found[3]["winner"] == 2).all() and (found[3]["loser"] == 1).all()
    assert found[0].keys() == {"winner", "loser", "noise", "t", "clip", "sync"}


def test_mixed_losers_come_in_their_share_and_lose_to_the_truth(tmp_path):
    positions = torch.arange(400)
    stage = made_stage(tmp_path, "losers=mixed", "winner=best_of_n", "distorted_share=0.25")
    found = stage.inputs(pairs(range(400)), Draws(7, positions), CPU)
    distorted = found["loser"].amin(dim=(1, 2)) >= 10
    assert 0.18 < distorted.float().mean() < 0.32
    assert (found["loser"][~distorted] == 1).all() and (found["winner"][~distorted] == 2).all()
    assert (found["winner"][distorted].abs() < 1).all()


def test_pairs_do_not_depend_on_how_the_batch_is_shared(tmp_path):
    stage, positions = made_stage(tmp_path, "losers=mixed"), torch.arange(8)
    whole = stage.inputs(pairs(range(8)), Draws(7, positions), CPU)
    parts = [stage.inputs(pairs(part.tolist()), Draws(7, part), CPU) for part in positions.chunk(4)]
    assert all(torch.equal(whole[name], torch.cat([part[name] for part in parts])) for name in whole)


def test_videos_without_features_or_candidates_are_no_pairs(tmp_path):
    """Of clips 0 to 3, the picture of 1 cannot be read, and 2 has no candidates; the features hold a held-out shard too."""
    layers = {"features": ("latent_mean.npy", (0, 2, 3)), "candidates": ("loser.npy", (0, 3)), "distorted": ("distorted.npy", (0, 1, 2, 3))}
    for name, (member, clips) in layers.items():
        with ShardWriter(tmp_path / name, 0) as writer:
            for clip in clips:
                writer.add(f"clip-{clip}", {member: npy(np.zeros(2, np.float32))})
    with ShardWriter(tmp_path / "features", 1) as writer:
        writer.add("clip-4", {"latent_mean.npy": npy(np.zeros(2, np.float32))})
    for name in layers:
        build_index(tmp_path / name, {})
    for losers, clips in {"candidates": (0, 3), "distorted": (0, 2, 3), "mixed": (0, 3)}.items():
        stage = made_stage(tmp_path, f"losers={losers}")
        stage.features, stage.candidates, stage.distorted = (str(tmp_path / name) for name in ("features", "candidates", "distorted"))
        found = stage._pairs()
        entries = [found.entry(shard, row) for shard, count in enumerate(found.counts) for row in range(count)]
        assert [entry.key for entry in entries] == [f"clip-{clip}" for clip in clips] and not any(entry.absent for entry in entries)


def test_distortion_goes_from_coarse_to_subtle(tmp_path):
    """4 levels of 3 kinds over the 40 pairs of training; a level is taken from one below to one above the progress."""
    stage, levels = made_stage(tmp_path, "losers=distorted"), {}
    for position in (0, 15, 39, 41):
        draws = Draws(7, torch.arange(300))
        rows = stage.inputs(pairs([position] * 300), draws, CPU)["loser"][:, 0, 0].long() - 10
        assert (rows // 4).bincount().min() > 70
        levels[position] = set((rows % 4).tolist())
    assert levels == {0: {0, 1}, 15: {0, 1, 2}, 39: {2, 3}, 41: {2, 3}}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """What preference_steps.py finds in two processes."""
    return run_on_two_ranks(__file__, "preference_steps.py", tmp_path_factory.mktemp("preference"), "found.json")


@pytest.mark.slow
def test_two_processes_under_every_zero_stage_equal_one(on_two_ranks):
    worst = on_two_ranks["worst"]
    assert len(worst) == 8 and min(case["moved"] for case in worst.values()) > 1e-3
    assert all(case["weights"] < 1e-6 and not case["kept"] for case in worst.values()), worst
    assert all(case["losses"] < 1e-4 and case["maxima"] < 1e-4 for case in worst.values()), worst


@pytest.mark.slow
def test_the_papers_rate_moves_bf16_weights_and_leaves_frozen_ones(on_two_ranks):
    assert len(on_two_ranks["bf16"]) == 4
    for case, found in on_two_ranks["bf16"].items():
        assert found["moved"] == found["trained"] and not found["changed"], (case, found)


@pytest.mark.slow
def test_a_round_goes_on_with_its_own_reference(tmp_path):
    """Full tuning under ZeRO-3: an interrupted round must not take the policy that it finds for its reference."""
    found = run_on_two_ranks(__file__, "preference_lives.py", tmp_path, "found.json")
    assert found["interrupted"] == found["undisturbed"]
    assert found["undisturbed"]["weights"] != found["start"]
    first, *later = found["undisturbed"]["lines"]
    assert abs(first["margin"]) < 1e-5 < max(abs(line.get("margin", 0)) for line in later)
    assert later[-1]["validation/distance"] > 0
