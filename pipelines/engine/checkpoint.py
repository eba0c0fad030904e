"""Resumable checkpoints: `checkpoints/step-*/`, each complete if and only if its marker is there and the files are those it lists.

A rank writes its shards (pipelines.engine.elastic) into a hidden folder and says so in a file. When all have, rank 0 writes the marker,
gives the folder its name and removes what is surplus. No collective takes part in that, so it can go on behind the training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from pipelines.engine.elastic import (
    MismatchError,
    SavedState,
    module_state,
    restore_module,
    restore_state,
    shapes,
    sharded_state,
)
from pipelines.engine.ema import ShardedEMA
from pipelines.engine.mirror import Mirror
from pipelines.engine.saving import (
    HostCopies,
    file_matches,
    in_background,
    missing_room,
    sync_folder,
    write_atomically,
    write_tensors,
)
from pipelines.engine.world import World

MARKER = EXPORTED = "complete.json"
_MODULE = "module.safetensors"
_UNFINISHED = ".unfinished-"
_BROKEN = "broken-"
_POLL = 0.02
"""Seconds between looks at what the other ranks have written."""
_Value = TypeVar("_Value")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message names it and says what to do."""


class Options(Protocol):
    """The fields of a recipe's `train` section that matter here."""

    keep_checkpoints: int
    keep_every: int
    asynchronous_checkpoints: bool
    checkpoint_mirror: str


@dataclass
class _Saving:
    """A checkpoint on its way to the disk."""

    step: int
    folder: Path
    own: Future
    """This rank's files."""
    complete: Future | None
    """Marker and name; on rank 0."""
    given_up: threading.Event


class Checkpoints:
    """The checkpoints in a folder. Every method is collective: all ranks call it, and all get the same answer or error."""

    def __init__(self, folder: Path, world: World, options: Options):
        self._folder, self._world, self._options = folder, world, options
        self._copies = HostCopies() if options.asynchronous_checkpoints else None
        self._saving: _Saving | None = None
        self._newest: int | None = None
        self._needed: int | None = None
        """Step before which, or at it, one checkpoint must stay."""
        self._mirror: Mirror | None = None
        """On rank 0, where the recipe names one."""
        self._distrusted: set[int] = set()
        self._from_main(self._open)

    def save(self, step: int, engine, ema: ShardedEMA, client: Mapping, needed: int | None = None) -> None:
        """Save the state after `step` steps and `client`, which JSON can hold; in the background where the recipe says so.

        needed: the newest checkpoint of this step or an earlier one stays, whatever the recipe keeps.
        CheckpointError where it cannot be saved, or where the save before this one failed. Older checkpoints are untouched then.
        """
        self._finish()
        self._needed = needed
        if step == self._newest:
            return
        tensors, layout = sharded_state(engine, ema.averages)
        files = {_file(self._world.rank, self._world.size): (tensors, layout)}
        module = module_state(engine)
        if self._world.is_main:
            files[_MODULE] = (module, {"shapes": json.dumps(shapes(engine))})
        folder = self._begin(step, sum(tensor.nbytes for tensors, _ in files.values() for tensor in tensors.values()))
        about = {"step": step, "processes": self._world.size, "zero_stage": engine.zero_optimization_stage(), "client": dict(client)}
        self._start(step, folder, {name: (self._on_host(name, tensors), text) for name, (tensors, text) in files.items()}, about)
        if not self._options.asynchronous_checkpoints:
            self._finish()

    def wait(self) -> None:
        """Until everything is written, or CheckpointError, and copied to the mirror, or told: what is safe here is no failure."""
        self._finish()
        self._from_main(lambda: self._mirror and self._mirror.wait())

    def rollback_target(self, before: int | None = None) -> int | None:
        """Step of the newest complete checkpoint, or of the newest below `before`."""
        self._finish()
        return self._from_main(lambda: max((step for step in _steps(self._folder) if before is None or step < before), default=None))

    def restore(self, engine, ema: ShardedEMA, before: int | None = None) -> dict | None:
        """Take up the newest complete checkpoint of any world size and ZeRO stage; its `client` and `step`, None where there is none.

        before: take one of an earlier step, and delete this one and those after it, which training is about to write anew.
        """
        self._finish()
        while (path := self._from_main(lambda: self._choose(before))) is not None:
            damage = next(filter(None, self._from_all(self._damage(path))), None)
            if damage is None:
                client = self._load(path, engine, ema)
                if before is not None:  # only now: where all earlier ones are damaged, the later ones are all there is
                    self._from_main(lambda: self._forget(before))
                return client
            self._from_main(partial(self._set_aside, path, damage))
        return None

    def _load(self, path: Path, engine, ema: ShardedEMA) -> dict:
        about = json.loads((path / MARKER).read_text())
        try:
            _check_shapes(path / _MODULE, shapes(engine))
            restore_module(engine, path / _MODULE)
            files = [path / _file(rank, about["processes"]) for rank in range(about["processes"])]
            restore_state(engine, ema.averages, SavedState(files))
        except MismatchError as error:
            raise CheckpointError(f"{path} does not fit this recipe: {error}; restore the recipe, or begin a new run") from error
        self._newest = engine.global_steps = about["step"]
        engine.global_samples = about["step"] * engine.train_batch_size()
        engine.micro_steps = about["step"] * engine.gradient_accumulation_steps()
        return {**about["client"], "step": about["step"]}

    # Saving

    def _begin(self, step: int, size: int) -> Path:
        """A folder for this attempt alone: a rank of a killed run that still writes somewhere cannot get in the way."""
        total = int(self._world.total({"bytes": size})["bytes"])

        def make() -> Path:
            if lack := missing_room(self._folder, total):
                raise CheckpointError(f"step {step} is not saved, older checkpoints are as they were: {lack}. Make room or set "
                                      "keep_checkpoints lower, then run again: it resumes from the newest one")
            folder = self._folder / f"{_UNFINISHED}{_name(step)}-{secrets.token_hex(4)}"
            folder.mkdir()
            return folder

        return self._from_main(make)

    def _on_host(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        if self._copies is None:
            return {key: tensor.cpu() for key, tensor in tensors.items()}
        return dict(zip(tensors, self._copies.take({f"{name}/{key}": tensor for key, tensor in tensors.items()}).values(), strict=True))

    def _start(self, step: int, folder: Path, files: Mapping, about: dict) -> None:
        given_up = threading.Event()
        own = in_background(_write, folder, files, self._world.rank)
        complete = in_background(self._complete, folder, about, given_up) if self._world.is_main else None
        self._saving = _Saving(step, folder, own, complete, given_up)

    def _complete(self, folder: Path, about: dict, given_up: threading.Event) -> None:
        written = [folder / _written(rank) for rank in range(self._world.size)]
        while not all(path.exists() for path in written):
            if given_up.wait(_POLL):
                return
        files = {name: sums for path in written for name, sums in json.loads(path.read_text()).items()}
        for path in written:
            path.unlink()
        write_atomically(folder / MARKER, json.dumps({**about, "files": files}))
        final = self._folder / _name(about["step"])
        _remove(final)  # what an interrupted run left under this name has no marker
        folder.rename(final)
        sync_folder(self._folder)
        self._prune()
        if self._mirror:
            self._mirror.push(final)

    def _finish(self) -> None:
        """Until the save under way is complete; CheckpointError on all ranks where a rank could not write."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        errors = self._from_all(_reason(saving.own))
        if not any(errors):
            errors = [self._from_main(lambda: _reason(saving.complete))]
        if error := next(filter(None, errors), ""):
            saving.given_up.set()
            self._from_main(lambda: _remove(saving.folder))
            raise CheckpointError(f"step {saving.step} is not saved, older checkpoints are as they were: {error}")
        self._newest = saving.step

    def _prune(self) -> None:
        for step in self._surplus(_steps(self._folder)):
            path = self._folder / _name(step)
            if not (self._mirror and self._mirror.holds(path)):
                _remove(path)

    def _surplus(self, steps: list[int]) -> list[int]:
        return surplus(steps, self._options.keep_checkpoints, self._options.keep_every, self._needed)

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._options.checkpoint_mirror:
            self._mirror = Mirror(self._options.checkpoint_mirror, MARKER, self._surplus)

    # Choosing

    def _choose(self, before: int | None) -> Path | None:
        """The newest complete checkpoint below `before`, from the mirror where the folder has none; what is half written goes."""
        for path in (*self._folder.glob(f"{_UNFINISHED}*"), *(p for p in self._folder.glob("step-*") if not (p / MARKER).exists())):
            _remove(path)
        last = max((step for step in _steps(self._folder) if before is None or step < before), default=None)
        return self._fetch(before) if last is None else self._folder / _name(last)

    def _forget(self, first: int) -> None:
        """Delete checkpoints from a step on, here and in the mirror: a run that was taken back must not find them later."""
        if self._mirror:
            self._mirror.wait()
        for step in _steps(self._folder):
            if step >= first:
                _remove(self._folder / _name(step))
        for step in self._mirror.steps() if self._mirror else ():
            if step >= first:
                self._mirror.remove(step)

    def _fetch(self, before: int | None) -> Path | None:
        mirrored = self._mirror.steps() if self._mirror else []
        there = [step for step in mirrored if step not in self._distrusted and (before is None or step < before)]
        if not there:
            return None
        path = self._folder / _name(there[-1])
        temporary = self._folder / f"{_UNFINISHED}{path.name}-{secrets.token_hex(4)}"
        self._mirror.fetch(there[-1], temporary)
        temporary.rename(path)
        sync_folder(self._folder)
        return path

    def _set_aside(self, path: Path, damage: str) -> None:
        aside = path.with_name(_BROKEN + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        self._distrusted.add(int(path.name[5:]))
        logging.getLogger(__name__).warning("%s: %s; it is kept as %s and the checkpoint before it is used", path, damage, aside.name)

    def _damage(self, path: Path) -> str:
        """What is wrong with this rank's share of the files, or an empty string."""
        try:
            files = json.loads((path / MARKER).read_text())["files"]
        except (OSError, ValueError, KeyError):
            return f"{MARKER} lists no files"
        mine = sorted(files)[self._world.rank::self._world.size]
        return next((f"{name} is not as it was written" for name in mine if not file_matches(path / name, files[name])), "")

    # Agreeing

    def _from_main(self, function: Callable[[], _Value]) -> _Value:
        """What rank 0 gets from calling it, on all ranks; CheckpointError on all of them where it fails."""
        answer: list = [None, None]
        if self._world.is_main:
            try:
                answer[0] = function()
            except Exception as error:  # the other ranks wait for an answer
                answer[1] = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        if self._world.size > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]

    def _from_all(self, value: _Value) -> list[_Value]:
        """The value of every rank."""
        found = [value] * self._world.size
        if self._world.size > 1:
            dist.all_gather_object(found, value)
        return found


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`."""
    return max((marker.parent for marker in folder.glob(f"step-*/{MARKER}")), default=None)


def surplus(steps: list[int], keep: int, keep_every: int, needed: int | None = None) -> list[int]:
    """Those of the complete steps that may go.

    The newest `keep` stay (0: all), the multiples of `keep_every` (0: none), and the newest up to `needed`.
    """
    old = sorted(steps)[:-keep] if keep else []
    kept = max((step for step in steps if needed is not None and step <= needed), default=None)
    return [step for step in old if step != kept and not (keep_every and step % keep_every == 0)]


def weights_hash(export: Path) -> str:
    """Identity of an export: sha256 of its weights."""
    with open(export / "weights.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(folder: Path, files: Mapping[str, tuple[Mapping[str, torch.Tensor], Mapping[str, str]]], rank: int) -> None:
    sums = {name: write_tensors(folder / name, *contents) for name, contents in files.items()}
    write_atomically(folder / _written(rank), json.dumps(sums))


def _reason(work: Future) -> str:
    """Why it failed, once it has ended; an empty string where it did not."""
    error = work.exception()
    return "" if error is None else f"{type(error).__name__}: {error}"


def _check_shapes(path: Path, own: Mapping[str, list[int]]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        saved = json.loads(file.metadata()["shapes"])
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise MismatchError(f"{name} was {saved.get(name, 'not there')}, now {own.get(name, 'not there')}")


def _remove(path: Path) -> None:
    # Marker first: an interrupted removal leaves nothing that looks complete. What a network file system still holds goes next time.
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _steps(folder: Path) -> list[int]:
    return sorted(int(marker.parent.name[5:]) for marker in folder.glob(f"step-*/{MARKER}"))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _file(rank: int, size: int) -> str:
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def _written(rank: int) -> str:
    return f"rank-{rank:05d}.written"
