"""What is measured of the steps: time by phase, operations, memory, a trace."""

import gzip
import json
import time

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.recomputation import in_chunks, recomputed
from pipelines.config import TrainConfig
from pipelines.engine.gradients import part_names
from pipelines.engine.telemetry import FlopCount, StepClock, Telemetry, memory, peak_tflops
from pipelines.engine.world import World
from tests.pipelines.engine.toy import counted_graph, finish_ranks, metrics, start_ranks, toy, toy_batches


def test_phases_add_up():
    clock, module = StepClock(torch.device("cpu")), nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    clock.read()
    for _ in range(2):
        with clock.phase("data"):
            time.sleep(0.01)
        with clock.passes(module):
            module(torch.ones(1, 2)).sum().backward()
            time.sleep(0.03)
        clock.timed("communication", time.sleep)(0.01)
        clock.count_step()
    seconds = clock.read()
    assert seconds["data"] == pytest.approx(0.01, abs=0.01) and seconds["communication"] == pytest.approx(0.01, abs=0.01)
    assert seconds["forward"] < 0.02 < 0.03 < seconds["backward"] < 0.08, "a hook of the module's own comes before ours"
    assert sum(seconds.values()) - seconds["step"] == pytest.approx(seconds["step"], abs=0.01)
    assert clock.read().keys() == {"backward", "step"}


def test_operations_are_counted_once():
    flops, module, batch = FlopCount(), toy(), toy_batches(1)[0]
    for _ in range(2):
        with flops.counting(passes=3):
            module(**batch)["loss"].backward()
    # Two per multiply-add: a trained layer three times (forward, its input, its weights), the frozen one twice.
    assert flops.per_step == 3 * 2 * 8 * (3 * 6 * 16 + 2 * 16 * 16 + 3 * 16 * 3)


def test_counting_changes_no_number():
    gradients = []
    for count in (FlopCount().counting(1), torch.enable_grad()):
        torch.manual_seed(0)
        # torch takes the backward pass of silu apart where something counts with its own FlopCounterMode.
        module = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.LayerNorm(64), nn.Linear(64, 64))
        with count:
            module(torch.randn(32, 64)).square().mean().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def operations(function, *inputs):
    """Of a forward and a backward pass."""
    flops = FlopCount()
    with flops.counting(1):
        function(*inputs).sum().backward()
    return flops.per_step


@pytest.mark.parametrize("again", [lambda layer, x: recomputed(layer, x), lambda layer, x: in_chunks(layer, x, 4)])
def test_what_is_computed_again_counts_once(again):
    layer, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(8, 6, requires_grad=True)
    assert operations(lambda x: again(layer, x), x) == operations(layer, x) == 3 * 2 * 8 * (6 * 16 + 16 * 3)


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention_counts_alike_in_every_kernel(kernel):
    b, h, n, d = 2, 3, 16, 8
    query, key, value = (torch.randn(b, h, n, d, requires_grad=True) for _ in range(3))
    flops = FlopCount()
    with sdpa_kernel(kernel), flops.counting(1):
        out = nn.functional.scaled_dot_product_attention(query, key, value)
    assert flops.per_step == 4 * b * h * n * n * d
    with sdpa_kernel(kernel):
        assert operations(nn.functional.scaled_dot_product_attention, query, key, value) == 3 * flops.per_step
    assert out.shape == query.shape


def test_what_is_counted_is_compiled_afterwards():
    torch.compiler.reset()
    flops, module, batch, before = FlopCount(), toy(), toy_batches(1)[0], counted_graph.calls
    module.compile(backend=counted_graph)
    for compiled in (False, True, True):
        with flops.counting(passes=1):
            module(**batch)["loss"].backward()
        assert (counted_graph.calls > before) == compiled
        assert flops.per_step == 2 * 8 * (3 * 6 * 16 + 2 * 16 * 16 + 3 * 16 * 3), "as without a compiler"


def test_a_resumed_run_does_not_count_again():
    train, world = TrainConfig(batch_size=8), World(0, 1, torch.device("cpu"))
    first, same, other = (Telemetry(world, each) for each in (train, train, TrainConfig(batch_size=16)))
    with first._flops.counting(1):
        toy()(**toy_batches(1)[0])["loss"].backward()
    assert first.state_dict() == {"flops": first._flops.per_step, "of": [1, 8, 1]} and first._flops.per_step > 0
    same.load_state_dict(first.state_dict()), other.load_state_dict(first.state_dict())
    assert same.state_dict() == first.state_dict() and other.state_dict()["flops"] is None


def test_peaks_by_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5
    assert peak_tflops("NVIDIA H200", "fp32") == 67.0 and peak_tflops("NVIDIA L40S", "fp32") == 91.6
    assert peak_tflops("Tesla T4", "fp32") == 8.1 and peak_tflops("Tesla T4", "bf16") == 0.0
    assert peak_tflops("a CPU", "bf16") == 0.0


def test_memory_of_the_host():
    assert 0.05 < memory(torch.device("cpu"))["host_gb"] < 100


def test_parts_are_named_below_what_all_share():
    assert part_names(["net.video.a.weight", "net.video.b", "net.audio.weight"]) == ["video", "video", "audio"]
    assert part_names(["first.weight", "gain"]) == ["first", "gain"]
    assert part_names(["only.weight", "only.bias"]) == ["weight", "bias"]


@pytest.mark.slow
def test_a_compiled_model_is_compiled_and_counted(tmp_path):
    train = {"steps": 3, "batch_size": 8, "log_every": 1, "optimiser": {"lr": 0.01}}
    codes, outputs = finish_ranks(start_ranks(1, tmp_path, {"plain": train, "compiled": train | {"module": ["compiled"]}}))
    assert codes == [0], outputs
    counts = {name: [line["speed/tflops"] * line["seconds_per_step"] for line in metrics(tmp_path / name) if "loss" in line]
              for name in ("plain", "compiled")}
    assert counts["compiled"] == pytest.approx(counts["plain"])
    assert metrics(tmp_path / "compiled")[-1]["validation/graphs"] >= 1


@pytest.mark.slow
def test_a_run_tells_them(tmp_path):
    train = {"steps": 8, "batch_size": 8, "log_every": 2, "profile": 2, "peak_tflops": 1.0, "optimiser": {"lr": 0.01}}
    codes, outputs = finish_ranks(start_ranks(1, tmp_path, {"toy": train}))
    assert codes == [0], outputs
    lines = [line for line in metrics(tmp_path / "toy") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    wanted = {"loss", "gradient_norm", "gradient_norm/first", "gradient_norm/last", "gradient_norm/gain", "gradient_norm/null",
              "quarantined", "skipped", "learning_rate", "samples_per_second", "speed/tflops", "speed/mfu", "memory/host_gb",
              "time/data", "time/forward", "time/backward", "time/optimiser", "time/communication"}
    assert wanted <= lines[0].keys()
    for line in lines:
        parts = sum(line[f"time/{name}"] for name in ("data", "inputs", "forward", "backward", "optimiser"))
        assert 0 < parts < line["seconds_per_step"]
        assert line["speed/mfu"] == line["speed/tflops"] > 0
    (trace,) = (tmp_path / "toy" / "profile").glob("*.json.gz")
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::addmm", "ProfilerStep#3", "ProfilerStep#4"} <= names
