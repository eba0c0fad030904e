"""DeepSpeed ZeRO: the engine with every value written out, and the full weights that it shards."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.config import TrainConfig, ZeroConfig
from pipelines.engine.world import World

NEVER = 2**31


def deepspeed_config(train: TrainConfig, world: World) -> dict:
    """The engine's settings. Nothing is left to a default: DeepSpeed's own gradient_clipping, for one, is 1.0."""
    per_pass = world.size * train.accumulation
    if train.batch_size % per_pass:
        raise ValueError(f"batch_size {train.batch_size} must divide by processes x accumulation = {world.size} x {train.accumulation}")
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // per_pass,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.optimiser.gradient_clipping,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": train.precision,
        "data_types": {"grad_accum_dtype": train.precision},
        "zero_optimization": _zero(train.zero, on_gpu=world.device.type == "cuda"),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _zero(zero: ZeroConfig, on_gpu: bool) -> dict:
    settings = {
        "stage": zero.stage,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "use_multi_rank_bucket_allreduce": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": 50_000_000,
        "allgather_partitions": True,
        "allgather_bucket_size": 50_000_000,
        "elastic_checkpoint": False,
        "load_from_fp32_weights": True,
        "ignore_unused_parameters": True,
        "compute_grad_norm": True,
        "memory_efficient_linear": True,
        # Parameters of stage 3 that are never partitioned, and how far ahead and how long whole ones are kept: elements.
        "stage3_param_persistence_threshold": zero.persistence_threshold,
        "stage3_model_persistence_threshold": 2**62,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        "sub_group_size": 1_000_000_000,
    }
    for what, place in (("optimizer", zero.offload_optimiser), ("param", zero.offload_parameters)):
        if place == "nvme":
            _needs_asynchronous_io()
        if place != "none":
            path = {"nvme_path": zero.nvme_path} if place == "nvme" else {}
            settings[f"offload_{what}"] = {"device": place, "pin_memory": on_gpu, **path}
    return settings


def _needs_asynchronous_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError("offload to nvme: DeepSpeed's async_io operator cannot be built here; install libaio-dev and a C++ compiler, "
                         "or set zero.offload_optimiser and zero.offload_parameters to cpu")


def start_engine(module: nn.Module, train: TrainConfig, world: World):
    """A DeepSpeed engine around `module` with AdamW over its trainable parameters."""
    import deepspeed

    options = train.optimiser
    _scalars_as_vectors(module)
    if train.precision == "bf16":
        _keep_frozen(module)
    trainable = [p for p in module.parameters() if p.requires_grad]
    # torch's own fused AdamW: DeepSpeed's would be compiled on first use.
    optimiser = torch.optim.AdamW(trainable, lr=options.lr, betas=tuple(options.betas), eps=options.eps,
                                  weight_decay=options.weight_decay, fused=True)
    config = deepspeed_config(train, world)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimiser, config=config, dist_init_required=False)
    return engine


def _keep_frozen(module: nn.Module) -> None:
    """Copies of the weights that do not train: DeepSpeed rounds all of them, and keeps fp32 masters of the trained ones only."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.whole = parameter.detach().to("cpu", copy=True)


def _scalars_as_vectors(module: nn.Module) -> None:
    """Let 0-dimensional parameters train as vectors of one: DeepSpeed broadcasts bytes that a scalar cannot be viewed as."""
    for parameter in module.parameters():
        if parameter.dim() == 0:
            parameter.data = parameter.data.reshape(1)
            parameter.scalar = True


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

    if hasattr(parameter, "whole"):
        return parameter.whole.clone()
    stage = engine.zero_optimization_stage()
    if parameter.requires_grad and stage > 0:
        return safe_get_full_fp32_param(parameter).detach().float().cpu().clone()
    with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
        return _unsharded_master(engine, parameter).detach().float().cpu().clone()


def _unsharded_master(engine, parameter: nn.Parameter) -> torch.Tensor:
    """The fp32 weights behind a bf16 parameter of stage 0; else the parameter itself."""
    for low, full in zip(getattr(engine.optimizer, "fp16_groups", ()), getattr(engine.optimizer, "fp32_groups", ()), strict=False):
        for own, master in zip(low, full, strict=True):
            if own is parameter:
                return master
    return parameter
