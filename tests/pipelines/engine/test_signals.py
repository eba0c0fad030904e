"""A signal to one rank stops all of them at the same step, saved; one that comes later ends at once."""

import os
import signal
import time

import pytest
import torch

from pipelines.engine.checkpoint import newest
from pipelines.engine.signals import REQUEUE, Stopped, leave_if_asked, stop_on_signals, stop_requested
from pipelines.engine.world import World
from tests.pipelines.engine.toy import finish_ranks, metrics, start_ranks

TRAIN = {"steps": 40, "batch_size": 8, "log_every": 1, "checkpoint_every": 100, "optimiser": {"lr": 0.01, "warmup_steps": 2}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_only_raises_a_flag(number):
    world, before = World(0, 1, torch.device("cpu")), signal.getsignal(number)
    with stop_on_signals():
        leave_if_asked(world, "nothing is under way")
        os.kill(os.getpid(), number)
        assert stop_requested()
        with pytest.raises(Stopped) as stopped:
            leave_if_asked(world, "the features are complete")
    assert stopped.value.code == REQUEUE == 75
    assert str(stopped.value) == "asked to stop: the features are complete; run the same command again to go on (exit code 75)"
    assert signal.getsignal(number) is before
    with stop_on_signals():
        assert not stop_requested(), "the next run was not asked"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_asked_and_all_leave_at_the_same_step(tmp_path, rank):
    train = TRAIN | {"validate_every": 1}
    case = {"toy": train | {"trouble": {"pause": 0.1}}}
    processes = start_ranks(2, tmp_path, case)
    wait_for_lines(tmp_path / "toy" / "metrics.jsonl", 3, processes)
    processes[rank].send_signal(signal.SIGUSR1)
    codes, outputs = finish_ranks(processes)
    assert codes == [REQUEUE, REQUEUE], outputs
    stopped = metrics(tmp_path / "toy")[-1]["step"]
    assert 3 <= stopped < 40
    assert newest(tmp_path / "toy" / "checkpoints").name == f"step-{stopped:08d}"
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, {"toy": train}))
    assert codes == [0, 0], outputs
    finish_ranks(start_ranks(2, tmp_path, {"whole": train}))
    told = ("step", "loss", "validation/size")
    lines, whole = ([{key: line[key] for key in told if key in line} for line in metrics(tmp_path / name)] for name in ("toy", "whole"))
    assert lines == whole, "the step that it stopped at is validated later"


@pytest.mark.slow
def test_the_echo_of_a_signal_is_the_same_request_and_a_later_one_ends_at_once(tmp_path):
    processes = start_ranks(1, tmp_path, {"toy": TRAIN | {"trouble": {"pause": 16}}})
    wait_for_lines(tmp_path / "toy" / "metrics.jsonl", 1, processes)
    for pause in (0.01, 10.5):
        processes[0].send_signal(signal.SIGTERM)
        time.sleep(pause)
    assert processes[0].poll() is None
    begin = time.monotonic()
    processes[0].send_signal(signal.SIGTERM)
    assert finish_ranks(processes)[0] == [-signal.SIGTERM]
    assert time.monotonic() - begin < 2


def wait_for_lines(path, count, processes):
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), finish_ranks(processes)
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not grow")
