"""DeepSpeed ZeRO: the engine with every value written out, and access to the fp32 weights that it shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pipelines.config import TrainConfig
from pipelines.engine.world import World

NEVER = 2**31


def deepspeed_config(train: TrainConfig, world: World) -> dict:
    """The engine's settings. Nothing is left to a default: DeepSpeed's own gradient_clipping, for one, is 1.0."""
    per_pass = world.size * train.accumulation
    if train.batch_size % per_pass:
        raise ValueError(f"batch_size {train.batch_size} must divide by processes x accumulation = {world.size} x {train.accumulation}")
    zero = {"stage": train.zero.stage, "overlap_comm": world.device.type == "cuda", "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    if train.zero.offload_optimiser == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // per_pass,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.optimiser.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": False},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def start_engine(module: nn.Module, train: TrainConfig, world: World):
    """A DeepSpeed engine around `module` with AdamW over its trainable parameters."""
    import deepspeed

    options = train.optimiser
    _scalars_as_vectors(module)
    trainable = [p for p in module.parameters() if p.requires_grad]
    # torch's own fused AdamW: DeepSpeed's would be compiled on first use.
    optimiser = torch.optim.AdamW(trainable, lr=options.lr, betas=tuple(options.betas), eps=options.eps,
                                  weight_decay=options.weight_decay, fused=True)
    config = deepspeed_config(train, world)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimiser, config=config, dist_init_required=False)
    return engine


def _scalars_as_vectors(module: nn.Module) -> None:
    """Let 0-dimensional parameters train as vectors of one: DeepSpeed broadcasts bytes that a scalar cannot be viewed as."""
    for parameter in module.parameters():
        if parameter.dim() == 0:
            parameter.data = parameter.data.reshape(1)
            parameter.scalar = True


def master_shards(engine) -> Sequence[torch.Tensor]:
    """The fp32 master weights that this rank owns, in an order that never changes."""
    if engine.zero_optimization_stage() == 0:
        return [p.data for p in engine.module.parameters() if p.requires_grad]
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


@contextlib.contextmanager
def swapped(engine, replacement: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let the master weights hold `replacement` for a while, for example the averaged weights while they are gathered."""
    shards = master_shards(engine)
    kept = [shard.clone() for shard in shards]
    _copy(shards, replacement)
    try:
        yield
    finally:
        _copy(shards, kept)


def gather_weights(engine) -> dict[str, torch.Tensor]:
    """The full fp32 state dict on the CPU; collective: every rank must call it."""
    wanted = engine.module.state_dict().keys()
    weights = {name: _full(engine, parameter) for name, parameter in engine.module.named_parameters()}
    weights |= {name: weights[name].reshape(()) for name, p in engine.module.named_parameters() if hasattr(p, "scalar")}
    weights |= {name: buffer.detach().cpu().clone() for name, buffer in engine.module.named_buffers()}
    return {name: weights[name] for name in wanted}


def _full(engine, parameter: nn.Parameter) -> torch.Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad and engine.zero_optimization_stage() > 0:
        return safe_get_full_fp32_param(parameter).detach().float().cpu().clone()
    with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
        return parameter.detach().float().cpu().clone()


@torch.no_grad()
def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
