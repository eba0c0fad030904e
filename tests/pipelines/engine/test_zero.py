"""ZeRO on two real processes is plain torch on the full batch."""


import pytest
import torch

from pipelines.config import TrainConfig, ZeroConfig
from pipelines.engine.world import World
from pipelines.engine.zero import deepspeed_config
from tests.fixtures.two_ranks import run_on_two_ranks
from tests.pipelines.engine.toy import toy

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What zero_steps.py finds in two processes."""
    folder = tmp_path_factory.mktemp("zero")
    return run_on_two_ranks(__file__, "zero_steps.py", folder, "found.json")


def test_steps_equal_plain_torch(found):
    assert len(found["worst"]) == 4 * 2 * 2 + 3
    assert all(difference < 1e-6 for difference in found["worst"].values()), found["worst"]


def test_bf16_trains_fp32_weights(found):
    """Adam's steps are about as long as the rate, and far below what bf16 can add to 0.5."""
    assert list(found["moved"]) == ["0", "1", "2", "3"]
    assert all(moved == pytest.approx(4e-5, rel=0.2) for moved in found["moved"].values()), found["moved"]


def test_memory_is_as_estimated(found):
    assert len(found["memory"]) == 8
    for case, (estimated, measured) in found["memory"].items():
        assert measured == pytest.approx(estimated, rel=0.01), case


def test_nothing_is_left_to_deepspeeds_defaults():
    train = TrainConfig(batch_size=24, accumulation=2, zero=ZeroConfig(stage=3))
    config = deepspeed_config(train, World(0, 3, torch.device("cpu")), toy())
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_clipping"] == 1.0
    assert {"zero_optimization", "aio", "bf16", "fp16", "gradient_accumulation_steps", "steps_per_print", "data_types"} <= config.keys()
    stage_3 = {"reduce_bucket_size", "overlap_comm", "stage3_param_persistence_threshold", "sub_group_size"}
    assert stage_3 <= config["zero_optimization"].keys()


def test_offloading_is_written_out():
    zero = ZeroConfig(stage=3, offload_optimiser="cpu", offload_parameters="cpu")
    settings = deepspeed_config(TrainConfig(zero=zero), ALONE, toy())["zero_optimization"]
    assert settings["offload_optimizer"] == settings["offload_param"] == {"device": "cpu", "pin_memory": False}
    with pytest.raises(ValueError, match="offload_parameters cpu needs zero.stage 3, not 2"):
        ZeroConfig(stage=2, offload_parameters="cpu")
    with pytest.raises(ValueError, match="nvme_path must name a folder"):
        ZeroConfig(stage=3, offload_parameters="nvme")
    with pytest.raises(ValueError, match="offload_optimiser nvme needs zero.stage 3, not 2"):
        ZeroConfig(stage=2, offload_optimiser="nvme", nvme_path="disk")


def test_a_disk_is_written_out(tmp_path):
    zero = ZeroConfig(stage=3, offload_parameters="nvme", nvme_path=str(tmp_path))
    place = deepspeed_config(TrainConfig(zero=zero), ALONE, toy())["zero_optimization"]["offload_param"]
    assert place.items() >= {"device": "nvme", "pin_memory": False, "nvme_path": str(tmp_path), "max_in_cpu": 0}.items()


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size 10 must divide by processes x accumulation = 3 x 2"):
        deepspeed_config(TrainConfig(batch_size=10, accumulation=2), World(0, 3, torch.device("cpu")), toy())
