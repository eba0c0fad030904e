"""Processes of a launcher leave together; threads with one store stand for them."""

import threading
import time

import pytest
import torch

from launch.together import leaving_together


@pytest.fixture
def launcher(monkeypatch):
    """A launcher of two processes."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr("launch.together._TICK", 0.01)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_an_error_is_said_at_once_and_raised_when_all_are_done(launcher):
    said, left = [], []

    def failing():
        with pytest.raises(OSError, match="disk"), leaving_together(said.append):
            raise OSError("disk")
        left.append("failing")

    thread = threading.Thread(target=failing)
    thread.start()
    with leaving_together(said.append):
        time.sleep(0.3)
        assert said == ["disk; the other processes are waited for"] and not left
    thread.join(timeout=10)
    assert left == ["failing"]


def test_an_interrupt_does_not_wait(launcher):
    with pytest.raises(KeyboardInterrupt), leaving_together(print):
        raise KeyboardInterrupt


def test_a_store_that_is_gone_is_not_waited_for(launcher, monkeypatch):
    class Gone:
        def add(self, key, number):
            raise torch.distributed.DistNetworkError("gone")

    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([(Gone(), 1, 2)]))
    with pytest.raises(ValueError, match="mine"), leaving_together(print):
        raise ValueError("mine")


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}])
def test_nobody_to_wait_for(monkeypatch, environment):
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="mine"), leaving_together(print):
        raise ValueError("mine")
