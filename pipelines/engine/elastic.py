"""The sharded state of training by parameter, so that any number of processes under any ZeRO stage can take it up again.

DeepSpeed's own checkpoints fit one world size and one stage; its converter knows neither stage 0 nor averaged weights, and needs the
disk space twice. Here each shard says which values of which parameter it holds, and a rank reads its own values from any such files.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from pipelines.engine.disk import group_in_memory, on_disk


class Piece(NamedTuple):
    """`size` values of the flattened parameter `name` from `start` on, which lie at `offset` of a shard."""

    name: str
    start: int
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """fp32 master weights on this rank, as the optimiser holds them, and what they are."""

    master: torch.Tensor
    pieces: tuple[Piece, ...]
    owned: bool
    """Whether this rank is the one that saves and averages them: without sharding each rank holds them all."""
    swap: Callable[[bool], contextlib.AbstractContextManager] | None = None
    """Where master and moments lie on a disk, and are empty in memory: what brings them there, and takes them back if they change."""

    def in_memory(self, change: bool = False) -> contextlib.AbstractContextManager:
        """Inside, master and moments are there; only one shard at a time may be. What changes is lost without `change`."""
        return self.swap(change) if self.swap else contextlib.nullcontext()


class MismatchError(ValueError):
    """The saved state is of another model; the message names the parameter."""


def shards(engine) -> list[Shard]:
    """The master weights that this rank holds, in an order that never changes."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _replicated(engine, names)
    return _stage_3(engine, names) if stage == 3 else _stage_1_2(engine, names)


def _replicated(engine, names: Mapping[int, str]) -> list[Shard]:
    rank, size = engine.global_rank, engine.world_size
    return [Shard(master, (Piece(names[id(parameter)], 0, 0, master.numel()),), number % size == rank)
            for number, (parameter, master) in enumerate(_pairs(engine))]


def _pairs(engine) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Each trainable parameter with its fp32 master, which in fp32 is the parameter itself."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        yield from ((parameter, parameter) for parameter in engine.module.parameters() if parameter.requires_grad)
        return
    for low, full in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        yield from zip(low, full, strict=True)


def _stage_1_2(engine, names: Mapping[int, str]) -> list[Shard]:
    pieces = defaultdict(list)
    for parameter in engine.module.parameters():
        if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            start, there = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            pieces[mapping.param_group_index].append(Piece(names[id(parameter)], start, there.start, there.numel))
    return [Shard(master, tuple(pieces[group]), True) for group, master in enumerate(engine.optimizer.single_partition_of_fp32_groups)]


def _stage_3(engine, names: Mapping[int, str]) -> list[Shard]:
    found, optimiser = [], engine.optimizer
    for number, (group, master) in enumerate(zip(optimiser.fp16_groups, optimiser.fp32_partitioned_groups_flat, strict=True)):
        pieces, offset = [], 0
        for parameter in group:
            part = parameter.partition_numel()
            start = engine.global_rank * part
            # The last ranks' parts are padded beyond the end of the parameter.
            if (size := min(part, parameter.ds_numel - start)) > 0:
                pieces.append(Piece(names[id(parameter)], start, offset, size))
            offset += part
        swap = partial(group_in_memory, optimiser, number) if on_disk(optimiser, number) else None
        found.append(Shard(master, tuple(pieces), True, swap))
    return found


def masters(engine) -> list[torch.Tensor]:
    """The master weights of the shards that this rank owns; copies where they lie on a disk."""
    found = []
    for shard in (shard for shard in shards(engine) if shard.owned):
        with shard.in_memory():
            found.append(shard.master.detach().clone() if shard.swap else shard.master.detach())
    return found


def full_values(engine, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every trainable parameter made of what lies beside the owned shards of all ranks, on the CPU of rank 0; collective.

    No rank holds more than one parameter beside its own share, and the others than rank 0 get nothing.
    """
    pieces = defaultdict(list)
    for shard, value in zip((shard for shard in shards(engine) if shard.owned), values, strict=True):
        for piece in shard.pieces:
            pieces[piece.name].append((piece, value.reshape(-1)))
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            full = torch.zeros(_shape(parameter).numel(), device=engine.device)
            for piece, value in pieces[name]:
                full[piece.start:piece.start + piece.size] = value[piece.offset:piece.offset + piece.size]
            dist.reduce(full, dst=0)  # each value is zero on all ranks but one
            if engine.global_rank == 0:
                found[name] = full.cpu().view(() if hasattr(parameter, "scalar") else _shape(parameter))
    return found


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def shapes(engine) -> dict[str, list[int]]:
    """The shape of every parameter, whatever part of it is here."""
    return {name: list(_shape(parameter)) for name, parameter in engine.module.named_parameters()}


def module_state(engine) -> dict[str, torch.Tensor]:
    """What is in no shard, frozen parameters and buffers (where ranks differ, rank 0's), on the main rank; collective."""
    found = {name: buffer.detach() for name, buffer in _buffers(engine)}
    for name, parameter in _frozen(engine):
        if hasattr(parameter, "whole"):  # in bf16 what the forward pass uses is rounded
            found[name] = parameter.whole
            continue
        with _whole(parameter):
            found[name] = parameter.detach().clone() if hasattr(parameter, "ds_id") else parameter.detach()
    return found if engine.global_rank == 0 else {}


@torch.no_grad()
def restore_module(engine, path: Path) -> None:
    """Give frozen parameters and buffers what `module_state` found; collective."""
    with safe_open(path, "pt") as file:
        for name, buffer in _buffers(engine):
            buffer.copy_(file.get_tensor(name))
        for name, parameter in _frozen(engine):
            saved = file.get_tensor(name)
            if hasattr(parameter, "whole"):
                parameter.whole.copy_(saved)
            with _whole(parameter, modifier_rank=0):
                if parameter.numel():  # under stage 3 the other ranks may hold nothing of it while rank 0 changes it
                    parameter.copy_(saved)


def _buffers(engine) -> list[tuple[str, torch.Tensor]]:
    kept = engine.module.state_dict().keys()
    return [(name, buffer) for name, buffer in engine.module.named_buffers() if name in kept]


def _frozen(engine) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]


def _whole(parameter: nn.Parameter, modifier_rank: int | None = None):
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)


def sharded_state(engine, averages: Mapping[str, Sequence[torch.Tensor]]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What this rank saves: "kind/number" -> flat values (masters, the optimiser's moments, averages), and the pieces that they are."""
    tensors, layout = {}, []
    for number, shard in enumerate(shard for shard in shards(engine) if shard.owned):
        state = engine.basic_optimizer.state.get(shard.master, {})
        with shard.in_memory():
            kinds = {"master": shard.master.detach(), **_moments(state, shard)}
            if shard.swap:
                kinds = {kind: value.clone() for kind, value in kinds.items()}
        step = float(state["step"]) if "step" in state else None
        layout.append({"pieces": shard.pieces, "moments": sorted(kinds.keys() - {"master"}), "step": step})
        kinds |= {kind: average[number] for kind, average in averages.items()}
        tensors |= {f"{kind}/{number}": value.reshape(-1) for kind, value in kinds.items()}
    return tensors, {"shards": json.dumps(layout)}


def _moments(state: Mapping[str, object], shard: Shard) -> dict[str, torch.Tensor]:
    # A parameter of one value has moments that look like the step, which is a number.
    return {kind: value for kind, value in state.items()
            if torch.is_tensor(value) and value.numel() == shard.master.numel() and kind != "step"}


@dataclass(frozen=True)
class _Saved:
    """A piece in a file."""

    piece: Piece
    file: safe_open
    names: frozenset[str]
    """Of all tensors in that file."""
    number: int
    moments: tuple[str, ...]
    step: float | None


class SavedState:
    """The shards that any number of processes saved, read by parameter."""

    def __init__(self, files: Sequence[Path]):
        self._saved: dict[str, list[_Saved]] = defaultdict(list)
        for path in files:
            file = safe_open(path, "pt")
            names = frozenset(file.keys())
            for number, shard in enumerate(json.loads(file.metadata()["shards"])):
                for piece in (Piece(*piece) for piece in shard["pieces"]):
                    self._saved[piece.name].append(_Saved(piece, file, names, number, tuple(shard["moments"]), shard["step"]))
        self.moments = sorted({kind for saved in self._saved.values() for each in saved for kind in each.moments})
        """Names of the optimiser's moments; empty where no step was taken yet."""

    def flat(self, kind: str, pieces: Sequence[Piece], size: int) -> torch.Tensor:
        """A flat shard of `size` values with these pieces of `kind`, zeros between them; MismatchError where some were not saved."""
        values = torch.zeros(size)
        for piece in pieces:
            target = values[piece.offset:piece.offset + piece.size]
            found = sum(self._copy(kind, piece, target, saved) for saved in self._saved.get(piece.name, ()))
            if found != piece.size:
                raise MismatchError(f"{piece.name}: {kind} of {found} of the {piece.size} values wanted here were saved")
        return values

    def _copy(self, kind: str, wanted: Piece, target: torch.Tensor, saved: _Saved) -> int:
        """Copy what both have; how many values that is."""
        first = max(wanted.start, saved.piece.start)
        last = min(wanted.start + wanted.size, saved.piece.start + saved.piece.size)
        # A parameter that no loss has reached yet has no moments: they are zero.
        if first >= last or (kind in self.moments and kind not in saved.moments):
            return max(0, last - first)
        name, shift = f"{kind}/{saved.number}", saved.piece.offset - saved.piece.start
        if name not in saved.names:
            return 0
        target[first - wanted.start:last - wanted.start] = saved.file.get_slice(name)[first + shift:last + shift]
        return last - first

    def step(self, pieces: Sequence[Piece]) -> float | None:
        """Optimiser steps that these parameters have taken; None where they have no moments yet."""
        steps = [saved.step for piece in pieces for saved in self._saved.get(piece.name, ()) if saved.step is not None]
        return max(steps, default=None)


@torch.no_grad()
def restore_state(engine, averages: Mapping[str, Sequence[torch.Tensor]], saved: SavedState) -> None:
    """Give master weights, moments and averages the values that were saved; collective. MismatchError as in SavedState.flat."""
    held = shards(engine)
    for number, shard in enumerate(shard for shard in held if shard.owned):
        for kind, average in averages.items():
            _fill(average[number], kind, shard, saved)
    for number, shard in enumerate(held):
        with shard.in_memory(change=True):
            _fill(shard.master.data, "master", shard, saved)
            _restore_moments(engine.basic_optimizer, shard, saved)
            if engine.zero_optimization_stage() == 3:
                engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)
    _spread(engine)


def _fill(target: torch.Tensor, kind: str, shard: Shard, saved: SavedState) -> None:
    target.copy_(saved.flat(kind, shard.pieces, target.numel()).view(target.shape))


def _restore_moments(optimiser: torch.optim.Optimizer, shard: Shard, saved: SavedState) -> None:
    step = saved.step(shard.pieces)
    if step is None and shard.pieces and shard.master not in optimiser.state:
        return
    # In place where they are there: DeepSpeed holds views of them. A shard of nothing but padding still needs its moments.
    state = optimiser.state[shard.master]
    if step is None:
        for moment in _moments(state, shard).values():
            moment.zero_()
    for kind in saved.moments:
        _fill(state.setdefault(kind, torch.zeros_like(shard.master.data)), kind, shard, saved)
    fused = optimiser.param_groups[0].get("fused") or optimiser.param_groups[0].get("capturable")
    counted = torch.tensor(step or 0.0, dtype=torch.float32, device=shard.master.device if fused else "cpu")
    # DeepSpeed's optimisers count in a plain number, torch's in a tensor.
    state["step"] = counted if isinstance(optimiser, torch.optim.Adam | torch.optim.AdamW) else int(counted)


def _spread(engine) -> None:
    """Let the weights that the forward pass uses follow the master weights."""
    optimiser, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for parameter, master in _pairs(engine):
            parameter.data.copy_(master.data)
    elif stage == 3:  # the shards have been seen to, but not what is whole on every rank
        if optimiser.persistent_parameters:
            optimiser.persistent_parameters[0].partition(optimiser.persistent_parameters)
            optimiser.persistent_parameters[0].all_gather(optimiser.persistent_parameters)
    else:
        optimiser.update_lp_params()
