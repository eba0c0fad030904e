"""Checkpoints: complete or not there."""

import json

from pipelines.engine.checkpoint import MARKER, newest, write_atomically
from pipelines.engine.log import keep_lines_until


def test_newest_is_the_newest_complete_one(tmp_path):
    assert newest(tmp_path) is None
    for step, complete in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        if complete:
            (folder / MARKER).write_text("{}")
    assert newest(tmp_path).name == "step-00000010"


def test_a_file_is_there_whole(tmp_path):
    write_atomically(tmp_path / "a.json", "old")
    write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_lines_after_the_checkpoint_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + "\n" + '{"step": 5, "lo')
    keep_lines_until(path, 3)
    assert path.read_text().splitlines() == lines[:3]
    keep_lines_until(tmp_path / "none.jsonl", 3)
