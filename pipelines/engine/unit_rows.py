"""Rows of weights at unit norm after every step, whatever ZeRO shards: forced weight normalisation (EDM2, equation 66)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from pipelines.engine.elastic import Piece, Shard, shards

Held = Sequence[tuple[Piece, torch.Tensor]]
"""Pieces of master weights on this rank, with their values."""


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

    held = [(piece, part) for shard in shards(engine) for piece, part in _parts(shard, names)]
    blocks = [(piece.name, row, block) for piece, part in held for row, block in _blocks(piece, part, shapes[piece.name][1:].numel())]
    for name, row, block in blocks:
        of_row[name][row:row + len(block)] += block.square().sum(dim=1).to(squares.device)
    if engine.zero_optimization_stage() > 0 and engine.world_size > 1:
        dist.all_reduce(squares)
    squares.sqrt_().clamp_min_(torch.finfo(squares.dtype).tiny)
    for name, row, block in blocks:
        block.div_(of_row[name][row:row + len(block), None].to(block.device))
    _refresh_model(parameters, of_row, held)


def _refresh_model(parameters: Mapping[str, nn.Parameter], norms: Mapping[str, torch.Tensor], held: Held) -> None:
    """Bring the weights that the next forward pass uses after their master weights."""
    masters = {part.data_ptr() for _, part in held}
    for name, parameter in parameters.items():
        if parameter.numel() and parameter.data_ptr() not in masters:
            parameter.data.div_(norms[name].view(-1, *[1] * (parameter.dim() - 1)))
    for piece, part in held:
        # What stage 3 gathers a parameter from.
        if (shard := getattr(parameters[piece.name], "ds_tensor", None)) is not None:
            shard.data.view(-1)[:piece.size].copy_(part)


def _parts(shard: Shard, names: Collection[str]) -> Iterator[tuple[Piece, torch.Tensor]]:
    flat = shard.master.data.view(-1)
    for piece in shard.pieces:
        if piece.name in names and piece.size:
            yield piece, flat[piece.offset:piece.offset + piece.size]


def _blocks(piece: Piece, part: torch.Tensor, width: int) -> Iterator[tuple[int, torch.Tensor]]:
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
