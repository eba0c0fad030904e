from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models.encoders.batch_norm import BatchNorm
from models.encoders.slowfast import PRESETS, SlowFast
from models.recomputation import recomputed

ROOT = Path(__file__).parents[3]
RANKS = 2


@pytest.mark.parametrize("training", [True, False])
def test_is_torchs(training):
    ours, torchs = (norm.train(training) for norm in (BatchNorm(6), torch.nn.BatchNorm3d(6)))
    x = 2 + 3 * torch.randn(4, 6, 3, 5, 5)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours.running_var, torchs.running_var)


def test_frozen_applies_the_running_statistics_while_training():
    norm = BatchNorm(3, "frozen").train()
    norm.running_mean.fill_(2.0)
    x = torch.randn(5, 3)
    torch.testing.assert_close(norm(x), (x - 2) / (1 + norm.eps) ** 0.5)
    assert norm.running_mean.tolist() == [2.0] * 3 and norm.running_var.tolist() == [1.0] * 3


def test_a_recomputed_batch_is_counted_once():
    once, twice = BatchNorm(3).train(), BatchNorm(3).train()
    x = 4 + torch.randn(6, 3, requires_grad=True)
    once(x).square().sum().backward()
    recomputed(twice, x).square().sum().backward()
    assert once.running_mean.abs().sum() > 0
    assert torch.equal(once.running_mean, twice.running_mean) and torch.equal(once.running_var, twice.running_var)


def test_parameters_in_bfloat16_use_statistics_in_float32():
    norm = BatchNorm(3).train()
    for parameter in norm.parameters():
        parameter.data = parameter.data.bfloat16()
    x = 1000 + torch.randn(64, 3)
    assert norm(x.bfloat16()).dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, 0.1 * x.bfloat16().float().mean(dim=0))


def measured(rows: slice, policy: str) -> dict[str, torch.Tensor]:
    """Outputs, gradients and running statistics of two norms and a tower on some rows of a fixed batch."""
    random = torch.Generator().manual_seed(0)
    batch, mel = 50 + 3 * torch.randn(8, 4, 2, 3, generator=random), torch.randn(8, 128, 32, generator=random, dtype=torch.float64)
    torch.manual_seed(1)
    plain, bare = BatchNorm(4, policy), BatchNorm(4, policy, affine=False)
    parts = ("stem", "res3") if policy == "sync" else ()
    tower = SlowFast(replace(PRESETS["audio_tiny"], batch_norm=policy, activation_checkpointing=parts, zero_init=False)).double()
    x = batch[rows].requires_grad_()
    y, embedding = bare(plain(x).sin()), tower.train()(mel[rows])
    (y.pow(3).sum() + embedding.square().sum()).backward()
    shared = {f"tower {name}": parameter.grad for name, parameter in tower.named_parameters()}
    shared |= {"weight": plain.weight.grad, "bias": plain.bias.grad}
    same = {f"tower {name}": buffer for name, buffer in tower.named_buffers()}
    same |= {"mean": plain.running_mean, "variance": plain.running_var, "bare variance": bare.running_var}
    return {"y": y.detach(), "embedding": embedding.detach(), "x": x.grad, "summed": shared, "same": same}


def test_sync_on_two_ranks_is_the_norm_of_the_full_batch(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(RANKS)]
    expected = measured(slice(None), "local")
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * RANKS
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name in ("y", "embedding", "x"):
        torch.testing.assert_close(torch.cat([result[name] for result in found]), expected[name], rtol=1e-5, atol=1e-5)
    for name, value in expected["summed"].items():
        total = sum(result["summed"][name] for result in found)
        torch.testing.assert_close(total, value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)
    for result in found:
        for name, value in expected["same"].items():
            torch.testing.assert_close(result["same"][name], value, rtol=1e-6, atol=1e-6, msg=name)


def run_rank(rank: int, folder: str) -> None:
    """One of the two gloo processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(measured(slice(rank * 4, (rank + 1) * 4), "sync"), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
