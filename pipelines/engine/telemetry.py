"""Where the time of a step goes, what the device does per second, and the memory it needs."""

from __future__ import annotations

import contextlib
import functools
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

from models.recomputation import is_recomputing
from pipelines.config import TrainConfig
from pipelines.engine.world import World

_PEAKS = {
    # Dense TFLOP/s without sparsity: (bf16, fp32). Of fp32 itself, not of TF32, which nothing here switches on. Sources: NVIDIA's and AMD's
    # data sheets.
    "B200": (2250.0, 75.0), "GH200": (989.0, 67.0), "H200 NVL": (836.0, 60.0), "H200": (989.0, 67.0), "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0), "H100": (989.0, 67.0), "A100": (312.0, 19.5), "A10G": (70.0, 35.0), "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6), "L40": (181.0, 90.5), "L4": (121.0, 30.3), "A6000": (155.0, 38.7), "4090": (165.0, 82.6),
    "3090": (71.0, 35.6), "V100": (0.0, 15.7), "Tesla T4": (0.0, 8.1), "MI300X": (1307.0, 163.4), "MI250X": (383.0, 95.7),
}  # fmt: skip

_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
"""Not among torch's formulas."""
_COLLECTIVES = ("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter_tensor", "broadcast", "all_gather",
                "all_gather_into_tensor", "all_gather_coalesced")


def peak_tflops(name: str, precision: str) -> float:
    """Dense peak of one device by the name that its driver gives; 0 where it is not known."""
    for known, (bf16, fp32) in _PEAKS.items():
        if known in name:
            return bf16 if precision == "bf16" else fp32
    return 0.0


class Telemetry:
    """What is measured of the steps of a stage."""

    def __init__(self, world: World, train: TrainConfig):
        self.clock = StepClock(world.device)
        self._world, self._train, self._flops = world, train, FlopCount()
        self._of = [world.size, train.batch_size, train.accumulation]
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self._peak = train.peak_tflops or peak_tflops(name, train.precision)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Steps happen inside."""
        with timing_collectives(self.clock):
            self.clock.read()
            yield

    @contextlib.contextmanager
    def passes(self, engine) -> Iterator[None]:
        """One forward and backward pass happens inside."""
        with self.clock.passes(engine), self._flops.counting(self._train.accumulation):
            yield

    def state_dict(self) -> dict:
        """What a restart needs: it would else count again, in a pass that is not compiled and so differs in last bits."""
        return {"flops": self._flops.per_step, "of": self._of}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken; with other processes or batches the operations are others."""
        if state["of"] == self._of:
            self._flops.per_step = state["flops"]

    def count_step(self) -> None:
        """One step is done."""
        self.clock.count_step()

    def restart(self) -> None:
        """What went before, such as a validation, is no step."""
        self.clock.read()

    def read(self) -> dict[str, float]:
        """Figures of the steps since the last call, this rank's; seconds are means per step."""
        seconds = self.clock.read()
        step = max(seconds.pop("step"), 1e-9)
        tflops = (self._flops.per_step or 0) / step / 1e12
        found = {"seconds_per_step": step, "data_wait": seconds.get("data", 0.0) / step,
                 "samples_per_second": self._train.batch_size / step, "speed/tflops": tflops}
        found |= {f"time/{name}": value for name, value in seconds.items()}
        if self._peak:
            found["speed/mfu"] = tflops / self._peak
        return found | {f"memory/{name}": value for name, value in memory(self._world.device).items()}


class StepClock:
    """Seconds by phase since the last look. On a GPU the device's time: the host runs ahead of it."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple]] = defaultdict(list)
        self._steps, self._since = 0, time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside counts as `name`."""
        begin = self._mark()
        try:
            yield
        finally:
            self._spans[name].append((begin, self._mark()))

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, each call of which counts as `name`."""

        @functools.wraps(function)
        def call(*arguments, **named):
            with self.phase(name):
                return function(*arguments, **named)

        return call

    @contextlib.contextmanager
    def passes(self, engine) -> Iterator[None]:
        """Forward and backward passes happen inside: what of it the engine's forward takes is `forward`, the rest `backward`."""
        begun: list = []
        handles = [engine.register_forward_pre_hook(lambda *_: begun.append(self._mark())),
                   engine.register_forward_hook(lambda *_: self._spans["forward"].append((begun.pop(), self._mark())))]
        try:
            with self.phase("passes"):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def count_step(self) -> None:
        """One step is done."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Mean seconds per step, in all and by phase, since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
        now, steps = time.perf_counter(), max(1, self._steps)
        sums = {name: sum(self._seconds(*span) for span in spans) / steps for name, spans in self._spans.items()}
        sums["backward"] = sums.pop("passes", 0.0) - sums.get("forward", 0.0)
        sums["step"] = (now - self._since) / steps
        self._spans.clear()
        self._steps, self._since = 0, now
        return sums

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin, end) -> float:
        return begin.elapsed_time(end) / 1000 if self._cuda else end - begin


class FlopCount:
    """Floating-point operations that the model asks for, forward and backward, counted once, on the first real batch."""

    def __init__(self):
        self.per_step: int | None = None
        """Of one rank, all its passes of a step; None before they are counted."""

    @contextlib.contextmanager
    def counting(self, passes: int) -> Iterator[None]:
        """Count what happens inside, one of `passes` equal passes, unless that is known already."""
        if self.per_step is not None:
            yield
            return
        # While operations are looked at, torch compiles nothing, and never again what it came across meanwhile.
        with torch.compiler.set_stance("force_eager"), _CountedOperations() as counted:
            yield
        self.per_step = counted.total * passes


class _CountedOperations(TorchDispatchMode):
    """Adds up torch's own formulas. Its FlopCounterMode takes operators apart, which changes last bits: a resumed run would differ.

    What is computed a second time to save memory is no work of the model, whether checkpointing does that or a kernel of attention.
    """

    total = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        named = named or {}
        result = operator(*arguments, **named)
        if not is_recomputing() and (formula := _formula(operator._overloadpacket)) is not None:
            self.total += formula(*arguments, **named, out_val=result)
        return result


def _formula(operator) -> Callable | None:
    name = operator.__name__
    if name.startswith("_scaled_dot_product_") and name.endswith("_attention_backward") or name == f"{_CPU_ATTENTION}_backward":
        return _attention_backward
    return sdpa_flop if name == _CPU_ATTENTION else flop_registry.get(operator)


def _attention_backward(gradient, query, key, value, *_, **__) -> int:
    """Twice the forward pass, as of any product; torch's own formula adds the scores that fused kernels compute again."""
    return 2 * sdpa_flop(query, key, value)


@contextlib.contextmanager
def timing_collectives(clock: StepClock) -> Iterator[None]:
    """Inside, DeepSpeed's collectives count as `communication` too: on a GPU they may overlap the backward pass that they belong to."""
    from deepspeed.comm import comm

    backend = comm.cdb
    for name in _COLLECTIVES:
        setattr(backend, name, clock.timed("communication", getattr(backend, name)))
    try:
        yield
    finally:
        for name in _COLLECTIVES:
            delattr(backend, name)


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GB: of this process on the host, and of torch on a GPU."""
    found = {"host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        peaks = {"gpu_gb": torch.cuda.max_memory_allocated(device), "gpu_reserved_gb": torch.cuda.max_memory_reserved(device)}
        found |= {name: peak / 2**30 for name, peak in peaks.items()}
    return found


def step_profiler(steps: int, folder: Path):
    """A torch profiler whose trace of `steps` steps, after three to warm up, goes to `folder`; step it after every step."""
    schedule = torch.profiler.schedule(wait=1, warmup=2, active=steps, repeat=1)

    def write(profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / f"steps-{profile.step_num - steps}-to-{profile.step_num - 1}.json.gz"))

    return torch.profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)
