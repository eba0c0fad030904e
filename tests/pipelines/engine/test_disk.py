"""Stage 3 from a disk is plain torch as well, with averages, guards, checkpoints and another number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from pipelines.config import TrainConfig, ZeroConfig
from pipelines.engine.disk import clear, folder_of, heed_types, load_asynchronous_io, parameter_settings
from pipelines.engine.trainer import with_own_places
from pipelines.engine.world import World

REPOSITORY = Path(__file__).resolve().parents[3]
MB = 1e6


def test_a_stage_of_a_run_has_a_folder_of_its_own(tmp_path):
    train = TrainConfig(zero=ZeroConfig(stage=3, offload_parameters="nvme", nvme_path=str(tmp_path)), checkpoint_mirror="s3://bucket/run/")
    first, second, again = (with_own_places(train, "toy", tmp_path / name) for name in ("a/toy", "b/toy", "a/../a/toy"))
    assert first.zero.nvme_path == again.zero.nvme_path != second.zero.nvme_path
    assert Path(first.zero.nvme_path).parent == tmp_path and first.checkpoint_mirror == "s3://bucket/run/toy"
    assert with_own_places(TrainConfig(), "toy", tmp_path).zero == TrainConfig().zero
    left = folder_of(str(tmp_path), tmp_path / "a/toy")
    (left / "optimizer").mkdir(parents=True)
    clear(left, World(0, 1, torch.device("cpu")))
    assert not left.exists()


def test_buffers_are_there_for_all_that_is_in_use_at_once():
    model = nn.Sequential(nn.Linear(10, 30), nn.Sequential(nn.Linear(30, 10), nn.BatchNorm1d(10)))
    model.scale = nn.Parameter(torch.ones(7))
    assert parameter_settings("disk", model, ranks=4) == {
        "nvme_path": "disk", "buffer_count": 4, "buffer_size": 75, "max_in_cpu": 0}, "the scale, weight and bias of a layer, and one more"


def test_without_a_compiler_a_disk_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(ValueError, match="async_io operator cannot be built here; install libaio-dev"):
        load_asynchronous_io()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_keep_their_type_where_the_processor_has_no_float16(dtype, monkeypatch):
    heed_types()
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    parameters = SimpleNamespace()
    Init._set_dtype(parameters, None, dtype)
    assert parameters.dtype == dtype


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_equal_plain_torch(tmp_path):
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("async_io cannot be built here")
    # What a build that was killed leaves: torch alone would wait for it without end.
    (tmp_path / "built/async_io").mkdir(parents=True)
    (tmp_path / "built/async_io/lock").touch()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("disk_steps.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {case: json.loads((tmp_path / case / "found.json").read_text()) for case in ("optimiser", "parameters", "both")}
    assert all(each["worst"] < 1e-6 and each["norm"] < 1e-5 for each in found.values()), found
    # 1.1 M trained values and 1.2 M frozen ones, four bytes each; the master weights of the trained ones are in memory.
    assert found["parameters"]["in_memory"] < 5 * MB and found["parameters"]["on_disk"] > 9 * MB, found
    assert found["optimiser"]["in_memory"] < 10 * MB and found["optimiser"]["on_disk"] > 13 * MB, found
    assert found["both"]["in_memory"] < 1 * MB and found["both"]["on_disk"] > 22 * MB, found
