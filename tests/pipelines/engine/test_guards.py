"""Harmful steps: judged, left out alike on all ranks under every ZeRO stage, and in the end taken back."""

import math

import pydantic
import pytest
import torch
from safetensors.torch import load_file

from models.encoders.batch_norm import BatchNorm
from pipelines.config import TrainConfig
from pipelines.config.training import GuardConfig
from pipelines.engine.draws import Draws
from pipelines.engine.guards import Guard, KeptBuffers, TrainingError, spike_score
from pipelines.engine.schedule import learning_rate
from pipelines.engine.world import World
from tests.pipelines.engine.toy import ToyStage, finish_ranks, metrics, start_ranks

OPTIMISER = {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 2}
TRAIN = {"steps": 6, "batch_size": 8, "ema_decay": 0.5, "log_every": 1, "checkpoint_every": 100, "optimiser": OPTIMISER}


def test_only_what_is_far_above_the_recent_losses_is_a_spike():
    guard = Guard(GuardConfig(spike_score=10, window=8, max_skips=8))
    for step in range(8):
        assert not guard.judge(step, 1 + 0.01 * (step % 3), 1.0)
    assert guard.judge(8, 2.0, 1.0).startswith("loss 2 is ")
    assert not guard.judge(9, 1.05, 1.0) and not guard.judge(10, 0.1, 1.0), "a low loss is no harm"
    assert guard.judge(11, math.nan, 1.0) == "loss not finite" and guard.judge(12, 1.0, math.inf) == "gradient not finite"
    assert guard.skipped == 3


def test_a_score_counts_deviations():
    assert spike_score(3 + 2 * 1.4826, [1, 2, 3, 4, 5, 3, 1, 5]) == pytest.approx(2 / 1.5, rel=1e-6)
    assert spike_score(1.1, [1.0] * 8) == pytest.approx(100), "losses that do not move have a least deviation"


def test_too_many_skips_in_the_window_exhaust_it():
    guard = Guard(GuardConfig(window=8, max_skips=3, max_rollbacks=1))
    for step, loss in enumerate([1, math.nan, 1, math.nan, 1, 1, 1, 1, 1, math.nan, 1]):
        guard.judge(step, loss, 1.0)
        assert not guard.exhausted, "the first two are out of the window when the third comes"
    before = guard.state_dict()
    for step in (11, 12):
        guard.judge(step, math.nan, 1.0)
    assert guard.exhausted and guard.first_bad(13) == 9
    guard.restart(before)
    assert not guard.exhausted and guard.skipped == 5
    for step in (13, 14, 15):
        guard.judge(step, math.nan, 1.0)
    with pytest.raises(TrainingError, match="step 16: 3 of the last 8 steps were left out, after 1 rollbacks; lower the learning rate"):
        guard.first_bad(16)


def test_it_goes_on_where_it_was():
    guard, other = (Guard(GuardConfig(window=8, max_skips=8)) for _ in range(2))
    for step in range(5):
        guard.judge(step, float(step) if step != 3 else math.nan, 1.0)
    other.load_state_dict(guard.state_dict())
    assert other.state_dict() == guard.state_dict()


def test_a_short_run_or_one_that_may_not_go_back_needs_no_way_back():
    guard = Guard(GuardConfig(window=8, max_skips=3))
    assert guard.may_go_back(3) and not guard.may_go_back(2)
    assert not Guard(GuardConfig(window=8, max_skips=3, max_rollbacks=0)).may_go_back(100)


@pytest.mark.parametrize("norm", [BatchNorm, torch.nn.BatchNorm1d])
def test_buffers_of_a_skipped_step_are_those_before(norm):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), norm(4))
    buffers = KeptBuffers(module)
    for _ in range(2):
        module(torch.randn(8, 3))
        before = {name: value.clone() for name, value in module.named_buffers()}
        buffers.keep()
        module(torch.full((8, 3), math.nan))
        assert not all(value.isfinite().all() for value in module.buffers())
        buffers.put_back()
        assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    KeptBuffers(torch.nn.Linear(2, 2)).keep(), KeptBuffers(torch.nn.Linear(2, 2)).put_back()


@pytest.mark.slow
def test_a_skipped_step_is_a_step_left_out(tmp_path):
    cases = {f"stage-{stage}": TRAIN | {"zero": {"stage": stage, "persistence_threshold": 0}, "trouble": {"nan": [0, 3]}}
             for stage in (0, 1, 2, 3)}
    cases["offloaded"] = cases["stage-2"] | {"accumulation": 2, "zero": {"stage": 2, "offload_optimiser": "cpu"}}
    cases["other statistics on one rank"] = cases["stage-2"] | {"trouble": {"nan": [0, 3], "own_offset": 1}}
    cases["on one rank"] = cases["stage-2"] | {"trouble": {"nan": [0, 3], "only": 1}}
    gradient = {f"gradient-{stage}": cases[f"stage-{stage}"] | {"trouble": {"gradient": [0, 3], "only": 1}} for stage in (0, 1, 2, 3)}
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, cases | gradient))
    assert codes == [0, 0], outputs
    assert outputs[0].count("toy: step 4 is skipped: loss not finite") == len(cases)
    assert outputs[0].count("toy: step 4 is skipped: gradient not finite") == len(gradient)
    wanted, size = _plain(str(tmp_path / "shards"), left_out={0, 3})
    for name in cases | gradient:
        found = load_file(tmp_path / name / "export" / "weights.safetensors")
        assert found.keys() == wanted.keys()
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-6, name
        lines = metrics(tmp_path / name)
        assert [line["skipped"] for line in lines if "skipped" in line] == [1, 1, 1, 2, 2, 2]
        assert lines[-1]["validation/size"] == pytest.approx(size, rel=1e-5), "stage 3 validates on whole weights"


@pytest.mark.slow
def test_a_skipped_batch_leaves_no_trace_in_statistics(tmp_path):
    cases = {kind: TRAIN | {"module": ["norm"], "trouble": {kind: [0, 3], "only": 1}} for kind in ("input", "gradient")}
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, cases))
    assert codes == [0, 0], outputs
    wanted, _ = _plain(str(tmp_path / "shards"), left_out={0, 3}, module=("norm",))
    for name in cases:
        found = load_file(tmp_path / name / "export" / "weights.safetensors")
        assert {"norm.running_mean", "norm.running_var"} < found.keys() == wanted.keys()
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-5, name


@pytest.mark.slow
def test_before_the_first_checkpoint_training_goes_back_to_the_start(tmp_path):
    train = TRAIN | {"guards": {"window": 8, "max_skips": 2}, "trouble": {"nan": [2, 3]}}
    cases = {f"stage-{stage}": train | {"zero": {"stage": stage, "persistence_threshold": 0}} for stage in (0, 1, 2, 3)}
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, cases))
    assert codes == [0, 0], outputs
    told = "toy: weights of step 0 again, as too many steps from 3 on were skipped; training goes on with step 5"
    assert outputs[0].count(told) == len(cases)
    wanted, _ = _plain(str(tmp_path / "shards"), left_out={0, 1, 2, 3})
    for name in cases:
        found = load_file(tmp_path / name / "export" / "weights.safetensors")
        assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-6, name


@pytest.mark.slow
def test_a_bad_stretch_is_taken_back_and_passed(tmp_path):
    guards = {"window": 8, "max_skips": 3, "spike_score": 50}
    train = TRAIN | {"steps": 24, "checkpoint_every": 4, "guards": guards}
    cases = {"taken-back": train | {"trouble": {"spike": [13, 14, 15]}}, "smooth": train}
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, cases))
    assert codes == [0, 0], outputs
    assert "toy: weights of step 12 again, as too many steps from 14 on were skipped; training goes on with step 17" in outputs[0]
    back, smooth = ({line["step"]: line["loss"] for line in metrics(tmp_path / name) if "loss" in line} for name in cases)
    assert list(back) == list(range(1, 25)), "no step is counted twice"
    assert {step for step in back if back[step] != smooth[step]} == {14, 15, 16, *range(17, 25)}


@pytest.mark.slow
def test_there_is_a_checkpoint_to_go_back_to_however_few_are_kept(tmp_path):
    guards = {"window": 8, "max_skips": 3, "spike_score": 50}
    average = {"kind": "power", "sigma_rels": [0.1], "snapshot_every": 1}
    train = TRAIN | {"steps": 24, "checkpoint_every": 1, "keep_checkpoints": 1, "guards": guards, "ema": average}
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, {"toy": train | {"trouble": {"nan": [13, 16, 19], "only": 1}}}))
    assert codes == [0, 0], outputs
    assert "toy: weights of step 13 again, as too many steps from 14 on were skipped; training goes on with step 21" in outputs[0]
    assert [path.name for path in (tmp_path / "toy" / "checkpoints").iterdir()] == ["step-00000024"]
    steps = sorted(int(path.name[5:13]) for path in (tmp_path / "toy" / "averages").iterdir())
    assert steps == [*range(1, 14), *range(21, 25)], "no average of weights that were given up"


@pytest.mark.slow
def test_it_gives_up_with_one_clear_line(tmp_path):
    train = TRAIN | {"checkpoint_every": 2, "steps": 12, "guards": {"window": 8, "max_skips": 2, "max_rollbacks": 1}}
    cases = {"hopeless": train | {"trouble": {"nan": list(range(4, 12))}}}
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, cases))
    assert codes == [1, 1]
    assert "TrainingError: step 8: 2 of the last 8 steps were left out, after 1 rollbacks; lower the learning rate" in outputs[0]


def _plain(shards: str, left_out: set[int], module: tuple[str, ...] = ()) -> tuple[dict[str, torch.Tensor], float]:
    """Averaged weights after plain AdamW on whole batches, without the updates of some steps; and what a validation must find."""
    train = pydantic.TypeAdapter(TrainConfig).validate_python(TRAIN)
    stage = ToyStage(train, shards, module=module)
    module = stage.build()
    batches = stage.stream(World(0, 1, torch.device("cpu")), None).batches()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(train.steps):
        batch = next(batches)
        if step in left_out:
            continue
        optimiser.param_groups[0]["lr"] = learning_rate(step, train.steps, train.optimiser)
        optimiser.zero_grad()
        module(**stage.inputs(batch, Draws(0, batch["position"]), torch.device("cpu")))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
        decay = min(train.ema_decay, (2 + step) / (11 + step))
        average = {name: average[name].lerp(p.detach(), 1 - decay) for name, p in trained.items()}
    size = float(sum(p.detach().square().sum() for p in module.parameters()))
    return module.state_dict() | average, size
