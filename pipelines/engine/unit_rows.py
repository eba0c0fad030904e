"""Rows of weights at unit norm after every step, whatever ZeRO shards: forced weight normalisation (EDM2, equation 66)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from pipelines.engine.elastic import Piece, Shard, shards


@torch.no_grad()
def normalise_rows(engine, names: Collection[str]) -> None:
    """Scale each row (all but the first dimension) of the named parameters to unit norm, in the fp32 master weights and in the model.

    The squares of a row's values are summed over the ranks that share it, in one collective for all parameters: every rank must call it.
    """
    parameters = {name: parameter for name, parameter in engine.module.named_parameters() if name in names}
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters.items()}
    ends = dict(zip(shapes, itertools.accumulate(shape[0] for shape in shapes.values()), strict=True))
    squares = torch.zeros(sum(shape[0] for shape in shapes.values()), device=engine.device)
    of_row = {name: squares[ends[name] - shape[0]:ends[name]] for name, shape in shapes.items()}

    held = shards(engine)
    for shard in held:
        with shard.in_memory():
            for name, row, block in _blocks(shard, shapes):
                of_row[name][row:row + len(block)] += block.square().sum(dim=1).to(squares.device)
    if engine.zero_optimization_stage() > 0 and engine.world_size > 1:
        dist.all_reduce(squares)
    squares.sqrt_().clamp_min_(torch.finfo(squares.dtype).tiny)
    _refresh_whole(parameters, of_row, held)
    for number, shard in enumerate(held):
        with shard.in_memory(change=True):
            for name, row, block in _blocks(shard, shapes):
                block.div_(of_row[name][row:row + len(block), None].to(block.device))
            if engine.zero_optimization_stage() == 3:  # what it gathers parameters from
                engine.optimizer._reassign_or_swap_out_partitioned_parameters(number)


def _refresh_whole(parameters: Mapping[str, nn.Parameter], norms: Mapping[str, torch.Tensor], held: Sequence[Shard]) -> None:
    """Scale the weights of the next forward pass that are whole on this rank and are no master weights themselves."""
    masters = {part.data_ptr() for shard in held for _, part in _parts(shard, parameters.keys()) if not shard.swap}
    for name, parameter in parameters.items():
        if parameter.numel() and parameter.data_ptr() not in masters:
            parameter.data.div_(norms[name].view(-1, *[1] * (parameter.dim() - 1)))


def _blocks(shard: Shard, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """The parts of a shard that belong to these parameters as (name, number of the first row, rows or a part of one)."""
    for piece, part in _parts(shard, shapes.keys()):
        for row, block in _rows(piece, part, shapes[piece.name][1:].numel()):
            yield piece.name, row, block


def _parts(shard: Shard, names: Collection[str]) -> Iterator[tuple[Piece, torch.Tensor]]:
    flat = shard.master.data.view(-1)
    for piece in shard.pieces:
        if piece.name in names and piece.size:
            yield piece, flat[piece.offset:piece.offset + piece.size]


def _rows(piece: Piece, part: torch.Tensor, width: int) -> Iterator[tuple[int, torch.Tensor]]:
    """A piece of a flattened matrix as (number of the first row, rows): the end of a row, whole rows, the beginning of one."""
    head = min(-piece.start % width, piece.size)
    whole = (piece.size - head) // width * width
    row = piece.start // width
    if head:
        yield row, part[None, :head]
        row += 1
    if whole:
        yield row, part[head:head + whole].view(-1, width)
    if head + whole < piece.size:
        yield row + whole // width, part[None, head + whole:]
