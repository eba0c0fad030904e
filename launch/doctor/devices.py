"""GPUs and the libraries that use them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import io
import os
import re
import resource
import warnings
from collections import Counter
from pathlib import Path

from launch.doctor.check import Check, size


def build() -> Check:
    """The version, and what it was built for."""
    import torch

    kind = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return Check("torch", "ok", f"{torch.__version__}, {kind}")


def gpu() -> Check:
    """How many GPUs of which kind, their memory and driver; why none can be used where one is there."""
    import torch

    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    driver = _driver()
    if torch.version.cuda is None:
        if devices:
            return Check("GPU", "fail", f"{len(devices)} here (driver {driver}), but torch is a CPU build", "install a CUDA build of torch")
        return Check("GPU", "ok", "none, and torch is a CPU build: preparation and small runs only")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = " ".join(str(said[-1].message).split())[:200] if said else "torch sees none"
        if devices:
            return Check("GPU", "fail", f"{len(devices)} here (driver {driver}), but none can be used: {why}",
                         f"update the driver for CUDA {torch.version.cuda}, or install torch for an older CUDA")  # fmt: skip
        return Check("GPU", "warn", f"none: {why}", "in a container, start it with --gpus all; see also CUDA_VISIBLE_DEVICES")
    return _gpu_memory(driver)


def _gpu_memory(driver: str) -> Check:
    import torch

    memory = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
    kinds = Counter(f"{torch.cuda.get_device_name(device)} {size(total)}" for device, (_, total) in enumerate(memory))
    found = f"{', '.join(f'{count} x {kind}' for kind, count in kinds.items())}, driver {driver}"
    if taken := [f"{device} ({size(total - free)})" for device, (free, total) in enumerate(memory) if free < 0.9 * total]:
        return Check("GPU", "warn", f"{found}; memory is taken on {', '.join(taken)}", "end the processes that nvidia-smi shows")
    return Check("GPU", "ok", found)


def bf16() -> Check:
    """Whether every device multiplies in bf16: kernels for its architecture must be in the build."""
    import torch

    count = gpus()
    for device in [torch.device("cuda", number) for number in range(count)] or [torch.device("cpu")]:
        one = torch.ones(64, 64, device=device, dtype=torch.bfloat16)
        if (one @ one).float().mean().item() != 64:
            return Check("bf16", "fail", f"{device} multiplies wrongly", "use another device, and have this one looked at")
    if old := [number for number in range(count) if torch.cuda.get_device_capability(number) < (8, 0)]:
        return Check("bf16", "warn", f"GPU {', '.join(map(str, old))} emulates it", "train with precision=fp32, or on Ampere or newer")
    return Check("bf16", "ok", f"on {count} GPUs" if count else "on the CPU")


def nccl() -> Check:
    """Whether GPUs can talk to each other, or processes on CPUs."""
    import torch.distributed as dist

    if not gpus():
        if not dist.is_gloo_available():
            return Check("NCCL", "fail", "no GPU, and torch has no gloo either", "install a build of torch with torch.distributed")
        return Check("NCCL", "ok", "not needed without a GPU: processes talk through gloo")
    if not dist.is_nccl_available():
        return Check("NCCL", "fail", "torch has none: several GPUs cannot talk", "install torch from PyPI")
    import torch

    return Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def infiniband() -> Check:
    """Whether NCCL can use what the machine has."""
    if not any(Path("/dev/infiniband").glob("uverbs*")):
        return Check("InfiniBand", "ok", "none: nodes talk through TCP")
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return Check("InfiniBand", "warn", "libibverbs is missing, so NCCL takes TCP", "install libibverbs1 and ibverbs-providers")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked != resource.RLIM_INFINITY:
        remedy = "docker run --ulimit memlock=-1; ulimit -l unlimited"
        return Check("InfiniBand", "warn", f"no more than {size(locked)} of memory may be locked", remedy)
    return Check("InfiniBand", "ok", "libibverbs is there")


def deepspeed() -> Check:
    """Whether it can be imported, and which device it has chosen."""
    device = "cuda" if gpus() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", device)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it logs as it is imported
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    found = f"{deepspeed.__version__} on {get_accelerator().device_name()}"
    if get_accelerator().device_name() != device:
        return Check("DeepSpeed", "fail", f"{found}, but torch would use {device}", "unset DS_ACCELERATOR")
    return Check("DeepSpeed", "ok", found)


def attention() -> Check:
    """Which kernels there are."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return Check("attention", "ok", "torch's own kernels; flash-attn is not installed, nor needed")
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        found = f"flash-attn {version} cannot be loaded ({str(error).splitlines()[0]})"
        return Check("attention", "warn", found, "build it anew against this torch, or uninstall it: torch has kernels of its own")
    return Check("attention", "ok", f"torch's own kernels, and flash-attn {version}")


def gpus() -> int:
    """How many torch can use."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    return found[1] if (found := re.search(r"Kernel Module\D*(\d+(?:\.\d+)+)", text)) else "unknown"
