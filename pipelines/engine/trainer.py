"""The training loop that all stages share."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from pipelines.engine.checkpoint import EXPORTED, load_checkpoint, save_checkpoint, weights_hash, write_atomically
from pipelines.engine.draws import Draws
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.guards import check_finite
from pipelines.engine.log import RunLog
from pipelines.engine.schedule import learning_rate
from pipelines.engine.world import World
from pipelines.engine.zero import start_engine
from pipelines.stages.stage import Stage


class Trainer:
    """Trains one stage in `folder`, from its newest complete checkpoint to its export."""

    def __init__(self, stage: Stage, folder: Path, world: World):
        self.stage, self.train, self.folder, self.world = stage, stage.train, folder, world
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(stage.seed)
        self.engine = start_engine(stage.build().to(world.device), self.train, world)
        self.ema = ShardedEMA(self.engine, self.train.ema_decay)
        self.stream = stage.stream(world, folder / "quarantine.jsonl")
        self.step = self._resume()

    def fit(self) -> None:
        """Train to the last step, checkpointing on the way, then export."""
        log = RunLog(self.folder, self.stage.name, self.step, self.train.steps, self.world.is_main)
        batches = self.stream.batches(self.train.stream.workers)
        try:
            while self.step < self.train.steps:
                self._one_step(batches, log)
                if self.step % self.train.checkpoint_every == 0 and self.step < self.train.steps:
                    self._save()
        finally:
            log.close()
        self._export()

    def _one_step(self, batches, log: RunLog) -> None:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        self._set_learning_rate()
        losses = self._forward_backward(batch)
        self.step += 1
        self.ema.update(self.step)
        if self.step % self.train.log_every == 0 or self.step == self.train.steps:
            self._report(log, losses, waited, time.perf_counter() - started)
        if self._validates():
            log.validation(self.step, self._validate())

    def _forward_backward(self, batch: dict) -> dict[str, torch.Tensor]:
        totals: dict[str, torch.Tensor] = {}
        self.engine.train()
        for part in split_batch(batch, self.train.accumulation):
            draws = Draws(self.stage.seed, part["position"], self.world.device)
            inputs = self._cast(self.stage.inputs(part, draws, self.world.device))
            outputs = self.stage.backward(self.engine, inputs)
            self.engine.step()
            for name, value in outputs.items():
                totals[name] = totals.get(name, 0) + value.detach() / self.train.accumulation
        return totals

    def _cast(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """DeepSpeed casts weights, not inputs."""
        if self.train.precision == "fp32":
            return inputs
        return {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}

    def _set_learning_rate(self) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.train.steps, self.train.optimiser)

    def _report(self, log: RunLog, losses: dict[str, torch.Tensor], waited: float, seconds: float) -> None:
        values = self.world.mean({name: float(value) for name, value in losses.items()})
        check_finite(values, self.step)
        norm = self.engine.get_global_grad_norm()
        extra = {} if norm is None else {"gradient_norm": float(norm)}
        rate = learning_rate(self.step - 1, self.train.steps, self.train.optimiser)
        log.scalars(self.step, values | extra | {
            "learning_rate": rate, "seconds_per_step": seconds, "data_wait": waited / seconds,
            "samples_per_second": self.train.batch_size / seconds, **self.world.total({"quarantined": self.stream.bad})})
        log.advance(self.step, f"loss {values['loss']:.4f}")

    def _validates(self) -> bool:
        every = self.train.validate_every
        return self.step == self.train.steps or bool(every and self.step % every == 0)

    @torch.no_grad()
    def _validate(self):
        self.engine.eval()
        return self.stage.validate(self.engine.module, self.world.device)

    def _save(self) -> None:
        state = self.stream.state_dict(self.world.total({"seen": self.stream.seen, "bad": self.stream.bad}))
        save_checkpoint(self.checkpoints, self.step, self.engine, self.ema, state, self.world, self.train.keep_checkpoints)

    def _resume(self) -> int:
        state = load_checkpoint(self.checkpoints, self.engine, self.ema, self.world)
        if state is None:
            return 0
        self.stream.load_state_dict(state["stream"], self.train.stream.allow_data_change)
        return state["step"]

    def _export(self) -> None:
        weights = self.ema.weights()
        if self.world.is_main:
            export = self.folder / "export"
            export.mkdir(exist_ok=True)
            self.stage.export(weights, export)
            # Relative, so that a run can be moved as a whole.
            parents = {os.path.relpath(path, self.folder): weights_hash(path) for path in self.stage.parents}
            write_atomically(export / EXPORTED, json.dumps({"stage": self.stage.name, "steps": self.step, "parents": parents}, indent=1))
        self.world.barrier()


def split_batch(batch: dict, parts: int) -> list[dict]:
    """Equal consecutive parts of a batch of tensors and lists."""
    if parts == 1:
        return [batch]
    size = len(batch["position"]) // parts
    return [{name: value[i * size:(i + 1) * size] for name, value in batch.items()} for i in range(parts)]
