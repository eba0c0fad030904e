"""A stage small enough to compare every weight of it, as the tests of this folder train it in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pydantic
import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.index import ShardSet
from data_prep.stream import ClipStream
from models.encoders.batch_norm import BatchNorm
from pipelines.config import TrainConfig
from pipelines.engine.log import Validation
from pipelines.stages.stage import Stage
from tests.fixtures.made_shards import DECODE, write
from tests.services.ports import free_ports

BATCH = 8
REPOSITORY = Path(__file__).resolve().parents[3]


class Toy(nn.Module):
    """Two layers, a frozen one, a scalar, a buffer, and a condition that may be dropped per row; a norm over all ranks on demand."""

    def __init__(self, norm: bool = False):
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(6, 16), nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 3)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.null = nn.Parameter(torch.full((6,), 0.1))
        self.register_buffer("offset", torch.ones(3))
        self.norm = BatchNorm(16, "sync") if norm else nn.Identity()

    def forward(self, x, y, drop):
        x = torch.where(drop[:, None], self.null, x)
        return {"loss": (self.last(self.frozen(self.norm(self.first(x).tanh()))) * self.gain + self.offset - y).square().mean()}


def toy(norm: bool = False) -> Toy:
    """The same weights at every call."""
    torch.manual_seed(0)
    return Toy(norm)


def counted_graph(graph, inputs):
    """A compiler's backend that changes nothing and counts its calls."""
    counted_graph.calls += 1
    return graph.forward


counted_graph.calls = 0


def toy_batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """The arguments of `steps` forward passes over whole batches; a quarter of the conditions is dropped."""
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(BATCH, 6, generator=generator), "y": 3 * torch.randn(BATCH, 3, generator=generator),
             "drop": torch.rand(BATCH, generator=generator) < 0.25} for _ in range(steps)]


def share(batch: dict[str, torch.Tensor], world, parts: int = 1) -> list[dict[str, torch.Tensor]]:
    """What this rank sees of a batch, in `parts` passes."""
    mine = {name: value.chunk(world.size)[world.rank].chunk(parts) for name, value in batch.items()}
    return [{name: values[part] for name, values in mine.items()} for part in range(parts)]


class ToyStage(Stage):
    """Trains the toy on the 48 clips of tests.fixtures.made_shards.

    trouble: what goes wrong, and where. "nan": steps (from 0) whose loss is not finite; "input": whose input is not; "gradient": whose
    gradient is not, but the loss; "spike": whose loss is a million times as large; "only": the one rank that has these; "pause": seconds
    that every step takes; "fail" and "hang": [rank, step]; "hang_in_build": rank; "own_offset": rank whose buffer
    is another. module: "norm" and "compiled" (by `counted_graph`).
    """

    name = "toy"

    def __init__(self, train: TrainConfig, shards: str, trouble: dict | None = None, module: tuple[str, ...] = ()):
        self.train, self.seed, self._shards, self._trouble, self._module = train, 0, shards, trouble or {}, module

    def build(self):
        if str(self._trouble.get("hang_in_build")) == os.environ.get("RANK"):
            time.sleep(1000)
        module = toy("norm" in self._module)
        if str(self._trouble.get("own_offset")) == os.environ.get("RANK"):
            module.offset += 1000
        if "compiled" in self._module:
            module.compile(backend=counted_graph)
        return module

    def stream(self, world, quarantine):
        self._rank = world.rank
        return ClipStream(ShardSet.open(self._shards), DECODE, batch_size=self.train.batch_size, rank=world.rank, world_size=world.size,
                          quarantine=quarantine)  # fmt: skip

    def inputs(self, batch, draws, device):
        step = int(batch["position"][0]) // self.train.batch_size
        self._cause_trouble(step)
        phase = batch["value"].float().to(device) * torch.arange(1, 7, device=device)
        here = self._trouble if self._trouble.get("only", self._rank) == self._rank else {}
        scale = float("nan") if step in here.get("nan", ()) else 1e3 if step in here.get("spike", ()) else 1.0
        self._bad_gradient = step in here.get("gradient", ())
        broken = float("nan") if step in here.get("input", ()) else 1.0
        return {"x": broken * phase.sin(), "y": scale * phase[:, :3].cos(), "drop": draws.uniform() < 0.25}

    def backward(self, engine, inputs):
        outputs = engine(**inputs)
        if self._bad_gradient:
            outputs["loss"].register_hook(lambda gradient: gradient * float("inf"))
        engine.backward(outputs["loss"])
        return outputs

    def _cause_trouble(self, step):
        time.sleep(self._trouble.get("pause", 0))
        if self._trouble.get("fail") == [self._rank, step]:
            raise ValueError("clip-7 is not to my taste")
        if self._trouble.get("hang") == [self._rank, step]:
            time.sleep(1000)

    def validate(self, module, device):
        """How far the weights are from zero, which needs all of them outside a forward pass."""
        graphs = {"graphs": counted_graph.calls} if "compiled" in self._module else {}
        return Validation({"size": float(sum(p.detach().square().sum() for p in module.parameters()))} | graphs)

    def export(self, weights, folder):
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "weights.safetensors")


def start_ranks(size: int, folder: Path, cases: dict[str, dict]) -> list[subprocess.Popen]:
    """Train `cases` (name -> arguments of TrainConfig, `trouble`, `module`) one after the other in `size` processes without a launcher."""
    shards = folder / "shards"
    if not shards.exists():
        write(str(shards))
    port = str(free_ports(1)[0])
    common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0",
              "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.pipelines.engine.toy", str(folder), json.dumps(cases)]
    return [subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | common | {"RANK": str(rank)}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for rank in range(size)]


def finish_ranks(processes: list[subprocess.Popen], seconds: float = 120) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of all ranks."""
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def metrics(folder: Path) -> list[dict]:
    """The lines of a case's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main(folder: str, cases: str) -> None:
    from pipelines.engine.signals import stop_on_signals
    from pipelines.engine.trainer import Trainer
    from pipelines.engine.world import join_world

    with stop_on_signals():
        world = join_world()
        for name, train in json.loads(cases).items():
            trouble, module = train.pop("trouble", {}), train.pop("module", ())
            config = pydantic.TypeAdapter(TrainConfig).validate_python(train)
            Trainer(ToyStage(config, f"{folder}/shards", trouble, module), Path(folder) / name, world).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
