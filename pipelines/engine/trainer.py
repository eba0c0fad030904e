"""The training loop that all stages share."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from pipelines.config import TrainConfig
from pipelines.engine.agreement import StepFacts, agree
from pipelines.engine.checkpoint import EXPORTED, CheckpointError, Checkpoints, weights_hash
from pipelines.engine.disk import clear, folder_of
from pipelines.engine.draws import Draws
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.gradients import GradientNorms, update_held_back
from pipelines.engine.guards import Guard, KeptBuffers, TrainingError
from pipelines.engine.log import STATUS, RunLog
from pipelines.engine.plain import PlainCopy
from pipelines.engine.saving import write_atomically
from pipelines.engine.schedule import learning_rate
from pipelines.engine.signals import Stopped, stop_requested
from pipelines.engine.snapshots import Snapshots
from pipelines.engine.telemetry import Telemetry, step_profiler
from pipelines.engine.watchdog import Watchdog
from pipelines.engine.world import World
from pipelines.engine.zero import gather_weights, start_engine, stop_engine
from pipelines.stages.stage import Stage


class Trainer:
    """Trains one stage in `folder`, from its newest complete checkpoint to its export."""

    def __init__(self, stage: Stage, folder: Path, world: World):
        self.stage, self.folder, self.world = stage, folder, world
        self.train = with_own_places(stage.train, stage.name, folder)
        self.watchdog = Watchdog(folder, world, self.train.hang_seconds, pulse=folder / STATUS)
        with self.watchdog.watching():
            self.watchdog.beat(f"{stage.name}, building the model")
            torch.manual_seed(stage.seed)
            module = stage.build()
            self.plain = PlainCopy(module) if world.is_main else None
            self._clear_disk()
            self.engine = start_engine(module.to(world.device), self.train, world)
            world.agree_on(self.engine.module.buffers())  # each has measured its own; DeepSpeed hands the first one's parameters on alone
            self.norms = GradientNorms(self.engine)
            self.ema = ShardedEMA(self.engine, self.train.ema or self.train.ema_decay, folder / "averages")
            self.checkpoints = Checkpoints(folder / "checkpoints", world, self.train)
            self.stream = stage.stream(world, folder / "quarantine.jsonl")
            self.guard, self.buffers = Guard(self.train.guards), KeptBuffers(self.engine.module)
            self.telemetry = Telemetry(world, self.train)
            self.watchdog.beat(f"{stage.name}, taking up a checkpoint")
            self.step = self._resume()

    def fit(self) -> None:
        """Train to the last step, checkpointing on the way, then export; what the engine holds is given back.

        Stopped where a signal asks for it: all is saved then.
        """
        log = RunLog(self.folder, self.stage.name, self.step, self.train.steps, self.world.is_main)
        try:
            with self.watchdog.watching(), self.telemetry.watching(), self._profiler() as profiler:
                self._begin(log)
                batches = self.stream.batches(self.train.stream.workers)
                while self.step < self.train.steps:
                    self.one_step(batches, log)
                    if profiler:
                        profiler.step()
                self._validate(log)
                self._export(log)
        except BaseException as error:
            # On a full disk these fail too, and would take the place of the error that says so.
            with contextlib.suppress(OSError):
                log.state("stopped" if isinstance(error, Stopped) else "failed", str(error) or type(error).__name__)
            with contextlib.suppress(OSError):
                log.close()
            raise
        log.close()
        log.state("complete")
        stop_engine(self.engine)
        self._clear_disk()

    def _begin(self, log: RunLog) -> None:
        """What must be there before the next step."""
        if self.step == 0:
            if self.guard.may_go_back(self.train.steps):
                self._save()
        elif self._validates() and not self._is_validated():
            # The life before this one ended between the checkpoint and the validation of its step.
            self._validate(log)

    def one_step(self, batches: Iterator[dict], log: RunLog) -> None:
        """One optimiser step on the next batch, and what is due after it."""
        with self._phase("data"):
            batch = next(batches)
        facts = self._forward_backward(batch)
        self._update(facts, log)
        self.step += 1
        self._report(facts, log)
        if self.guard.exhausted:
            self._roll_back(log)
        stopping = facts.stop and self.step < self.train.steps
        # Before the validation: it may fail, or take longer than whoever asked for an end will wait.
        if stopping or self.step % self.train.checkpoint_every == 0 or self.step == self.train.steps:
            self._save()
        if stopping:
            self.checkpoints.wait()
            raise Stopped(f"{self.stage.name} is saved at step {self.step} of {self.train.steps}")
        if self._validates():
            self._validate(log)

    def _forward_backward(self, batch: dict) -> StepFacts:
        """Gradients of the batch, averaged over all ranks, up to but without the update."""
        totals: dict[str, torch.Tensor] = {}
        self.engine.train()
        self.buffers.keep()
        parts = split_batch(batch, self.train.accumulation)
        for number, part in enumerate(parts):
            with self._phase("inputs"):
                draws = Draws(self.stage.seed, part["position"], self.world.device)
                inputs = self.stage.inputs(part, draws, self.world.device)
            self._beat("forward and backward")
            with self.telemetry.passes(self.engine):
                outputs = self.stage.backward(self.engine, inputs)
            for name, value in outputs.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(parts)
            if number < len(parts) - 1:
                self.engine.step()  # counts the pass, and changes nothing before the last
        with self._phase("communication"):
            return agree(self.world, totals, self.norms, stop_requested(), self.stream.bad)

    def _update(self, facts: StepFacts, log: RunLog) -> None:
        """The optimiser's step, or where the guard finds it harmful, everything of it but the update."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.train.steps, self.train.optimiser)
        reason = self.guard.judge(self.step, facts.losses["loss"], facts.norm)
        with self._phase("optimiser"):
            if reason:
                log.tell(f"{self.stage.name}: step {self.step + 1} is skipped: {reason}")
                with update_held_back(self.engine):
                    self.engine.step()
                self.buffers.put_back()
                return
            self.engine.step()
            self.stage.after_step(self.engine)
            self.ema.update(self.step + 1)

    def _report(self, facts: StepFacts, log: RunLog) -> None:
        self.telemetry.count_step()
        if self.step % self.train.log_every and self.step != self.train.steps:
            return
        measured = self.telemetry.read()
        log.scalars(self.step, facts.losses | {
            "gradient_norm": facts.norm, **{f"gradient_norm/{part}": norm for part, norm in facts.norms.items()},
            "learning_rate": learning_rate(self.step - 1, self.train.steps, self.train.optimiser),
            "quarantined": facts.quarantined, "skipped": self.guard.skipped, **measured})
        log.advance(self.step, facts.losses["loss"], measured["samples_per_second"])

    def _validates(self) -> bool:
        every = self.train.validate_every
        return bool(every) and self.step % every == 0 and self.step < self.train.steps

    def _is_validated(self) -> bool:
        """Whether the log has the validation of this step. Collective."""
        return self.world.any(self.world.is_main and has_validation(self.folder / "metrics.jsonl", self.step))

    @torch.no_grad()
    def _validate(self, log: RunLog) -> None:
        """On the main rank alone, on a copy that needs no other rank; the others wait, as they would for the slowest of them."""
        self._beat("validation")
        log.state("validating")
        weights = gather_weights(self.engine)
        if self.plain:
            with self.plain.holding(weights, self.world.device) as module:
                log.validation(self.step, self.stage.validate(module, self.world.device))
        self.world.barrier()
        self.telemetry.restart()

    def _save(self) -> None:
        self._beat("checkpoint")
        state = self.stream.state_dict(self.world.total({"seen": self.stream.seen, "bad": self.stream.bad}))
        client = {"stream": state, "guard": self.guard.state_dict(), "telemetry": self.telemetry.state_dict(), "parents": self._parents}
        self.checkpoints.save(self.step, self.engine, self.ema, client, needed=self.guard.suspect)

    def _resume(self) -> int:
        state = self.checkpoints.restore(self.engine, self.ema)
        self._forget_averages(state["step"] if state else 0)
        if state is None:
            return 0
        self._check_parents(state)
        self.stream.load_state_dict(state["stream"], self.train.stream.allow_data_change)
        self.guard.load_state_dict(state["guard"])
        if "telemetry" in state:  # not in a checkpoint of an earlier version
            self.telemetry.load_state_dict(state["telemetry"])
        return state["step"]

    @cached_property
    def _parents(self) -> dict[str, str]:
        """Folder -> identity of the exports that this stage was built on, relative, so that a run can be moved; in the main process."""
        return {} if not self.world.is_main else {os.path.relpath(path, self.folder): weights_hash(path) for path in self.stage.parents}

    def _check_parents(self, state: dict) -> None:
        """CheckpointError where a checkpoint, perhaps one from a mirror, was trained on other exports than are there now."""
        known = state.get("parents")  # not in a checkpoint of an earlier version
        if self.world.any(self.world.is_main and known is not None and known != self._parents):
            parents = ", ".join(os.path.normpath(self.folder / path) for path in known)
            mirror = f" and {self.train.checkpoint_mirror}" if self.train.checkpoint_mirror else ""
            raise CheckpointError(f"{self.folder}/checkpoints: step {state['step']} was trained on other weights of {parents}: restore "
                                  f"those, or delete {self.folder}{mirror} to train this stage again")

    def _roll_back(self, log: RunLog) -> None:
        """Weights, moments and averages from before the first bad step. Step and data move on: the same clips would do the same again."""
        self._beat("rollback")
        first = self.guard.first_bad(self.step)
        if self.checkpoints.rollback_target(before=first + 1) is None:
            raise TrainingError(f"step {self.step}: too many steps were left out from step {first + 1} on, and there is no checkpoint from "
                                "before it to go back to; lower the learning rate or look at the data")
        state = self.checkpoints.restore(self.engine, self.ema, before=first + 1)
        if state is None:
            raise TrainingError(f"step {self.step}: no checkpoint from before step {first + 1} is whole: run again to go on from the last")
        self._forget_averages(state["step"])
        self.guard.restart(state["guard"])
        log.tell(f"{self.stage.name}: weights of step {state['step']} again, as too many steps from {first + 1} on were skipped; "
                 f"training goes on with step {self.step + 1}")
        self._save()

    def _forget_averages(self, step: int) -> None:
        """Snapshots after a step that training goes on from: an export would mix them in."""
        if self.world.is_main:
            Snapshots(self.folder / "averages").forget(step)
        self.world.barrier()

    def _export(self, log: RunLog) -> None:
        self._beat("export")
        log.state("exporting")
        self.checkpoints.wait()
        weights = self.ema.weights(self.step)
        if self.world.is_main:
            export = self.folder / "export"
            export.mkdir(exist_ok=True)
            self.stage.export(weights, export)
            about = {"stage": self.stage.name, "steps": self.step, "parents": self._parents}
            write_atomically(export / EXPORTED, json.dumps(about, indent=1))
        self.world.barrier()

    def _clear_disk(self) -> None:
        if self.train.zero.nvme_path:
            clear(Path(self.train.zero.nvme_path), self.world)

    def _beat(self, phase: str) -> None:
        self.watchdog.beat(f"{self.stage.name}, step {self.step + 1}, {phase}")

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._beat(name)
        with self.telemetry.clock.phase(name):
            yield

    def _profiler(self) -> contextlib.AbstractContextManager:
        if self.train.profile and self.world.is_main:
            return step_profiler(self.train.profile, self.folder / "profile")
        return contextlib.nullcontext()


def with_own_places(train: TrainConfig, name: str, folder: Path) -> TrainConfig:
    """A folder of the mirror and one of the disk for each stage and round: they would take up each other's checkpoints and state."""
    mirror, disk = train.checkpoint_mirror, train.zero.nvme_path
    zero = replace(train.zero, nvme_path=str(folder_of(disk, folder))) if disk else train.zero
    return replace(train, checkpoint_mirror=f"{mirror.rstrip('/')}/{name}" if mirror else "", zero=zero)


def has_validation(metrics: Path, step: int) -> bool:
    """Whether a log holds the line of a validation at this step."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return any(line.pop("step") == step and all(name.startswith("validation/") for name in line) for line in lines)


def split_batch(batch: dict, parts: int) -> list[dict]:
    """Equal consecutive parts of a batch of tensors and lists."""
    if parts == 1:
        return [batch]
    size = len(batch["position"]) // parts
    return [{name: value[i * size:(i + 1) * size] for name, value in batch.items()} for i in range(parts)]
