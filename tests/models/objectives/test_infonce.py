from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from models.collectives import gather
from models.objectives.infonce import segment_infonce

ROOT = Path(__file__).parents[3]
RANKS, LOCAL, WIDTH = 2, 3, 5


def written_out(audio: torch.Tensor, video: torch.Tensor, temperature: float) -> torch.Tensor:
    """Equations 1 and 2, term by term."""
    audio, video = F.normalize(audio, dim=1), F.normalize(video, dim=1)
    total = torch.zeros(())
    for first, second in ((audio, video), (video, audio)):
        for i in range(len(first)):
            scores = torch.stack([torch.dot(first[i], other) / temperature for other in second])
            total = total - (scores[i].exp() / scores.exp().sum()).log() / len(first)
    return total / 2


@given(st.integers(1, 6), st.floats(0.05, 2.0), st.integers(0, 100))
def test_loss_is_equations_1_and_2(count, temperature, seed):
    audio, video = torch.randn(2, count, 4, generator=torch.Generator().manual_seed(seed))
    loss, _ = segment_infonce(audio, video, temperature)
    torch.testing.assert_close(loss, written_out(audio, video, temperature), rtol=1e-4, atol=1e-5)


def test_known_values():
    apart = torch.eye(4)
    loss, accuracy = segment_infonce(apart, apart, 1.0)
    assert loss.item() == pytest.approx(math.log(1 + 3 / math.e), rel=1e-6) and accuracy == 1
    loss, accuracy = segment_infonce(apart, apart.roll(1, dims=0), 0.01)
    assert loss.item() == pytest.approx(100, rel=1e-4) and accuracy == 0
    assert segment_infonce(7 * apart, apart, 1.0)[0] == segment_infonce(apart, apart, 1.0)[0]


def test_autocast_does_not_round_the_logits():
    audio, video = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = segment_infonce(audio, video, 0.02)
    torch.testing.assert_close(inside, segment_infonce(audio, video, 0.02)[0])


def test_unpaired_rows_are_refused():
    with pytest.raises(ValueError, match=r"not \(4, 8\) and \(3, 8\)"):
        segment_infonce(torch.zeros(4, 8), torch.zeros(3, 8), 0.1)


def test_unknown_negatives_are_refused():
    with pytest.raises(ValueError, match="negatives is 'some': choose one of global, local"):
        segment_infonce(torch.ones(2, 8), torch.ones(2, 8), 0.1, "some")


def gradients(rows: slice, negatives: str = "global") -> dict[str, torch.Tensor]:
    """Loss and gradients of two linear towers and the temperature, on some rows of a fixed batch."""
    random = torch.Generator().manual_seed(0)
    batch = torch.randn(2, RANKS * LOCAL, WIDTH, generator=random)
    towers = [torch.randn(WIDTH, WIDTH, generator=random, requires_grad=True) for _ in range(2)]
    temperature = torch.tensor(0.3, requires_grad=True)
    loss, accuracy = segment_infonce(batch[0, rows] @ towers[0], batch[1, rows] @ towers[1], temperature, negatives)
    loss.backward()
    return {"loss": loss.detach(), "accuracy": accuracy, "audio": towers[0].grad, "video": towers[1].grad, "temperature": temperature.grad}


def test_gradients_averaged_over_two_ranks_equal_the_full_batch(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(RANKS)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * RANKS
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name, value in gradients(slice(None)).items():
        torch.testing.assert_close(mean(result["global"][name] for result in results), value, rtol=1e-6, atol=1e-6)
    halves = [gradients(half) for half in (slice(0, LOCAL), slice(LOCAL, None))]
    for name in halves[0]:
        found, wanted = mean(result["local"][name] for result in results), mean(half[name] for half in halves)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert results[0]["rows"].tolist() == [[0.0], [0.0], [0.0], [1.0], [1.0], [1.0]]


def mean(values) -> torch.Tensor:
    """Of a few tensors: what data-parallel training makes of the gradients of its ranks."""
    return torch.stack(list(values)).mean(dim=0)


def run_rank(rank: int, folder: str) -> None:
    """One of the two gloo processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    result = {negatives: gradients(slice(rank * LOCAL, (rank + 1) * LOCAL), negatives) for negatives in ("global", "local")}
    result["rows"] = gather(torch.full((LOCAL, 1), float(rank)))
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
