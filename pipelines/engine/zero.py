"""DeepSpeed ZeRO: the engine with every value written out, and the full weights that it shards."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Sequence

import torch
from torch import nn

from pipelines.config import TrainConfig, ZeroConfig
from pipelines.engine.disk import AIO, heed_types, load_asynchronous_io, optimiser_settings, parameter_settings
from pipelines.engine.elastic import full_values, masters, module_state
from pipelines.engine.world import World

NEVER = 2**31


def deepspeed_config(train: TrainConfig, world: World, module: nn.Module) -> dict:
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
        "zero_optimization": _zero(train.zero, world, module),
        "aio": AIO,
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


def _zero(zero: ZeroConfig, world: World, module: nn.Module) -> dict:
    on_gpu = world.device.type == "cuda"
    # From a disk parameters come when they are needed and go at once: each that stays holds one of few buffers.
    ahead = 0 if zero.offload_parameters == "nvme" else 1
    return {
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
        "stage3_prefetch_bucket_size": ahead * 50_000_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": ahead * 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        # Elements that are updated together. A parameter of its own each where they lie on a disk: DeepSpeed 0.19.8 reads gradients that
        # do not begin at a whole block of it to the wrong places, and the weights go astray in silence.
        "sub_group_size": 1 if zero.offload_optimiser == "nvme" else 1_000_000_000,
        **_offload(zero, world, module),
    }


def _offload(zero: ZeroConfig, world: World, module: nn.Module) -> dict:
    settings = {}
    for what, place in (("optimizer", zero.offload_optimiser), ("param", zero.offload_parameters)):
        if place != "none":
            settings[f"offload_{what}"] = {"device": place, "pin_memory": world.device.type == "cuda"}
        if place == "nvme":
            disk = optimiser_settings(zero.nvme_path) if what == "optimizer" else parameter_settings(zero.nvme_path, module, world.size)
            settings[f"offload_{what}"] |= disk
    return settings


def start_engine(module: nn.Module, train: TrainConfig, world: World):
    """A DeepSpeed engine around `module` with AdamW over its trainable parameters."""
    import deepspeed

    options = train.optimiser
    if "nvme" in (train.zero.offload_optimiser, train.zero.offload_parameters):
        load_asynchronous_io()
        heed_types()
    _scalars_as_vectors(module)
    if train.precision == "bf16":
        _keep_frozen(module)
    trainable = [p for p in module.parameters() if p.requires_grad]
    # torch's own fused AdamW: DeepSpeed's would be compiled on first use.
    optimiser = torch.optim.AdamW(trainable, lr=options.lr, betas=tuple(options.betas), eps=options.eps,
                                  weight_decay=options.weight_decay, fused=True)
    config = deepspeed_config(train, world, module)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimiser, config=config, dist_init_required=False)
    return engine


def stop_engine(engine) -> None:
    """Let an engine's memory go once nobody refers to it: DeepSpeed's hooks and what it keeps for the process would hold it for good."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    engine.destroy()
    # Stage 3 keeps a list of modules, and on a class what is released after which; with the modules, all that they belong to.
    parameter_offload.FWD_MODULE_STACK.clear()
    released = partitioned_param_coordinator.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(released).nonlocals["func"].cache_clear()
    gc.collect()


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


def gather_weights(engine, values: Sequence[torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The full fp32 state dict, on the CPU of rank 0 and an empty one elsewhere; collective.

    values: what lies beside the shards that each rank owns and is wanted in place of their master weights, such as an average of them.
    """
    trained = full_values(engine, masters(engine) if values is None else values)
    kept = {name: value.to("cpu", copy=True) for name, value in module_state(engine).items()}
    scalars = {name for name, parameter in engine.module.named_parameters() if hasattr(parameter, "scalar")}
    weights = {name: value.reshape(()) if name in scalars else value for name, value in (trained | kept).items()}
    return {name: weights[name] for name in engine.module.state_dict() if name in weights}
