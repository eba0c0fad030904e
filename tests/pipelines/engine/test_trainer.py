"""The training loop where no process group is needed; the other tests of this folder let it train."""

import errno
import hashlib
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pipelines.config import TrainConfig
from pipelines.engine import trainer as module
from pipelines.engine.checkpoint import CheckpointError
from pipelines.engine.trainer import Trainer, has_validation
from pipelines.engine.world import World


def test_a_validation_is_found_in_the_log(tmp_path):
    lines = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1.0}, {"step": 4, "validation/size": 1.0}, {"step": 6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [has_validation(tmp_path / "metrics.jsonl", step) for step in (2, 4, 6, 8)] == [False, True, True, False]


def test_a_checkpoint_that_was_trained_on_other_weights_is_refused(tmp_path):
    parent = tmp_path / "generative" / "export"
    parent.mkdir(parents=True)
    (parent / "weights.safetensors").write_bytes(b"one")

    def resumed(state):
        trainer = object.__new__(Trainer)
        trainer.__dict__ |= {"folder": tmp_path / "preference" / "round-1", "stage": SimpleNamespace(parents=(parent,)),
                             "train": TrainConfig(checkpoint_mirror="s3://mine/run"), "world": World(0, 1, torch.device("cpu"))}
        trainer._check_parents({"step": 4} | state)
        return trainer._parents

    saved = {"parents": resumed({})}
    assert resumed(saved) == {"../../generative/export": hashlib.sha256(b"one").hexdigest()}
    (parent / "weights.safetensors").write_bytes(b"two")
    with pytest.raises(CheckpointError, match=r"step 4 was trained on other weights of .*/generative/export: restore those, or delete "
                                              r".*/preference/round-1 and s3://mine/run to train"):  # fmt: skip
        resumed(saved)


def test_what_fails_after_an_error_does_not_hide_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def watching():
        raise CheckpointError("step 4 is not saved")
        yield

    monkeypatch.setattr(module, "RunLog", lambda *_: SimpleNamespace(state=full, close=full))
    trainer = object.__new__(Trainer)
    trainer.__dict__ |= {"folder": tmp_path, "stage": SimpleNamespace(name="toy"), "step": 4, "train": TrainConfig(),
                         "world": World(0, 1, torch.device("cpu")), "watchdog": SimpleNamespace(watching=watching)}
    with pytest.raises(CheckpointError, match="step 4 is not saved"):
        trainer.fit()
