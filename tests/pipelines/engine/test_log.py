"""Logs: as lines, as a bar, as TensorBoard's curves, and one clear line where the disk is full."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.engine import log as logs
from pipelines.engine.log import STATUS, LogError, RunLog, Validation
from pipelines.engine.saving import write_atomically
from tests.fixtures.made_shards import damage, write
from tests.pipelines.engine.toy import finish_ranks, start_ranks


def scalars(folder):
    """Name -> [(step, value)] as TensorBoard reads them."""
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_what_is_logged_is_in_the_file_and_in_tensorboard(tmp_path):
    log = RunLog(tmp_path, "toy", 0, 3, active=True)
    log.scalars(1, {"loss": 0.5, "time/data": 0.25})
    log.scalars(2, {"loss": 0.125})
    log.validation(2, Validation({"flow_loss": 2.0}, {"mel": np.eye(4)}, {"sound": np.zeros(800)}))
    log.close()
    wanted = {"loss": [(1, 0.5), (2, 0.125)], "time/data": [(1, 0.25)], "validation/flow_loss": [(2, 2.0)]}
    assert scalars(tmp_path) == wanted
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5, "time/data": 0.25}, {"step": 2, "loss": 0.125}, {"step": 2, "validation/flow_loss": 2.0}]


def test_clips_that_cannot_be_read_are_counted_for_all_processes(tmp_path):
    """Two epochs of 48 clips, of which one is damaged; one process of the two meets it each time."""
    damage(write(tmp_path / "whole"), 3, 5, tmp_path / "shards")
    train = {"steps": 12, "batch_size": 8, "log_every": 1}
    codes, outputs = finish_ranks(start_ranks(2, tmp_path, {"toy": train}))
    assert codes == [0, 0], outputs
    assert [json.loads(line)["key"] for line in (tmp_path / "toy" / "quarantine.jsonl").read_text().splitlines()] == ["clip-18"] * 2
    counts = [value for _, value in scalars(tmp_path / "toy")["quarantined"]]
    assert sorted(counts) == counts and len(counts) == 12 and (counts[5], counts[11]) == (1, 2)


def test_a_resumed_run_writes_later_steps_again_and_each_once(tmp_path):
    for step, losses in ((0, {1: 0.5, 2: 0.25, 3: 9.0}), (2, {3: 0.125})):
        log = RunLog(tmp_path, "toy", step, 3, active=True)
        for at, loss in losses.items():
            log.scalars(at, {"loss": loss})
        log.close()
    assert scalars(tmp_path)["loss"] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0.5, 0.25, 0.125]


def test_other_processes_write_nothing(tmp_path):
    log = RunLog(tmp_path, "toy", 0, 3, active=False)
    log.scalars(1, {"loss": 0.5})
    log.validation(1, Validation({"loss": 0.5}))
    log.advance(1, 0.5, 8.0)
    log.tell("nothing")
    log.state("failed")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_job_gets_a_line_a_minute_and_what_must_not_be_overlooked(tmp_path, monkeypatch, capsys):
    seconds = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    log = RunLog(tmp_path, "toy", 0, 9, active=True)
    for step, now in ((1, 130.0), (2, 161.0), (3, 170.0)):
        seconds[0] = now
        log.advance(step, 0.5, 31.25)
    log.tell("toy: step 4 is skipped")
    log.close()
    told = capsys.readouterr()
    assert told.err == "toy: step 2 of 9, loss 0.5000, 31.2 samples/s, 0:01:01\ntoy: step 4 is skipped\n" and told.out == ""


def test_a_terminal_gets_a_bar_where_it_was_looked_for(tmp_path, monkeypatch, capsys):
    """On stderr: what goes to stdout may be a file."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(logs, "Console", lambda **options: Console(force_terminal=True, width=160, **options))
    log = RunLog(tmp_path, "toy", 2, 9, active=True)
    log.advance(3, 0.5, 8.0)
    log.tell("toy: step 4 is skipped")
    log.close()
    told = capsys.readouterr()
    assert "toy" in told.err and "3/9" in told.err and "loss 0.5000, 8 samples/s" in told.err and "step 4 is skipped" in told.err
    assert told.out == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_once_and_hides_no_other_error(tmp_path, monkeypatch, number):
    def full(path, text):
        raise OSError(number, os.strerror(number), str(path))

    log = RunLog(tmp_path, "toy", 0, 3, active=True)
    monkeypatch.setattr(logs, "write_atomically", full)
    with pytest.raises(LogError, match=f"{tmp_path}: {os.strerror(number)}, so the logs cannot be written; make room and run again: it"):
        log.state("validating")
    log.state("failed", "for want of room")
    log.close()
    monkeypatch.setattr(logs, "write_atomically", write_atomically)
    log = RunLog(tmp_path, "toy", 0, 3, active=True)
    monkeypatch.setattr(logs, "write_atomically", full)
    log.state("failed", "something else")  # whose error is on its way
    log.close()


def test_another_error_of_the_disk_stays_what_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    log = RunLog(tmp_path / "run", "toy", 0, 3, active=True)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        log.state("validating")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread finds no room either
def test_a_full_disk_is_one_clear_line(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        (tmp_path / "run").mkdir()
        log = RunLog(tmp_path / "run", "toy", 0, 3, active=True)
        filler = tmp_path / "filler"
        filler.write_bytes(b"x" * shutil.disk_usage(tmp_path).free)
        with pytest.raises(LogError, match="run: No space left on device, so the logs cannot be written; make room and run again"):
            for step in range(1000):
                log.scalars(step, {"loss": 0.5, "gradient_norm": 1.0})
        log.state("failed", "for want of room")
        log.close()
        with pytest.raises(LogError, match="make room and run again"):
            RunLog(tmp_path / "run", "toy", 0, 3, active=True)
        filler.unlink()
        log = RunLog(tmp_path / "run", "toy", 0, 3, active=True)
        log.scalars(1, {"loss": 0.5})
        log.close()
        assert scalars(tmp_path / "run")["loss"][-1] == (1, 0.5)
        assert json.loads((tmp_path / "run" / STATUS).read_text())["state"] == "starting"
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)
