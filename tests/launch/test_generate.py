"""The command `generate`: a list of videos with prompts, precision, compiled blocks."""

import json
import sys
from functools import partialmethod
from pathlib import Path

import pytest

from data_prep.readers.rendered import read_rendered
from data_prep.rendering.config import RenderConfig
from launch.cli import app, main
from launch.video_list import read_list
from models.generators.mmdit import MMDiT
from pipelines.sounding import SoundModel
from tests.fixtures.made_encoders import small_mmaudio


@pytest.fixture
def folder(tmp_path):
    """Two names of videos, and what is no video."""
    for name in ("one.mp4", "two.mp4"):
        (tmp_path / name).write_text("no media")
    return tmp_path


@pytest.mark.parametrize(("text", "prompts"), [
    ("video\none.mp4\ntwo.mp4\n", [{}, {}]),
    ("\ufeffprompt,video\r\n\"rain, on tin\",one.mp4\r\n,two.mp4\r\n", [{"prompt": "rain, on tin"}, {}]),
    ("video,negative_prompt,prompt\none.mp4,music,\n\ntwo.mp4, wind,rain\n",
     [{"negative_prompt": "music"}, {"negative_prompt": "wind", "prompt": "rain"}]),
])
def test_a_list_is_read(folder, text, prompts):
    (folder / "list.csv").write_text(text, encoding="utf-8")
    assert read_list(folder / "list.csv") == dict(zip((folder / "one.mp4", folder / "two.mp4"), prompts, strict=True))


@pytest.mark.parametrize(("text", "message"), [
    ("", "list.csv: the first line names no column video"),
    ("video\n", "list.csv: no videos below its header"),
    ("prompt\nrain\n", "list.csv: the first line names no column video"),
    ("video,promt\none.mp4,rain\n", "list.csv: no column 'promt' is known; there are video, prompt and negative_prompt"),
    ("video,prompt,prompt\none.mp4,rain,rain\n", "list.csv: a column is there twice"),
    ("video,prompt\none.mp4,rain\nthree.mp4,rain\n", "list.csv:3: {folder}/three.mp4: no such video file"),
    ("video,prompt\none.mp4,rain, on tin\n", "list.csv:2: 2 cells are wanted, as many as columns; quote what has a comma in it"),
    ("video,prompt\none.mp4\n", "list.csv:2: 2 cells are wanted"),
    ("video\none.mp4\none.mp4\n", "list.csv:3: {folder}/one.mp4 is in the list twice"),
    ("video,prompt\none.mp4,\"rain\n", "list.csv: unexpected end of data"),
])
def test_what_is_wrong_with_a_list_is_one_line(folder, monkeypatch, capsys, text, message):
    (folder / "list.csv").write_text(text)
    monkeypatch.setattr(sys, "argv", ["foleyscale", *f"generate --run nowhere --out {folder}/out --list {folder}/list.csv".split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message.format(folder=folder) in said and said.count("\n") == 1, said


@pytest.mark.parametrize(("arguments", "message"), [
    ("--list list.csv one.mp4", "name videos or a --list of them, not both"),
    ("--list nothing.csv", "nothing.csv: no such list of videos"),
    ("--precision fp16 one.mp4", "--precision is fp16: choose fp32 or bf16"),
])
def test_options_that_do_not_go_together(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        app(["generate", "--run", "nowhere", "--out", "out", *arguments.split()], standalone_mode=False)


def test_a_list_in_bfloat16_with_compiled_blocks(tmp_path, monkeypatch):
    rows = read_rendered(tmp_path / "in", 2, settings=RenderConfig(size=32, seconds=1.6), workers=1)
    videos = [Path(row.source) for row in rows]
    (tmp_path / "list.csv").write_text(f"video,prompt\n{videos[0]},a bell\n{videos[1]},\n")
    model = small_mmaudio()
    monkeypatch.setattr(SoundModel, "from_run", lambda *_: model)
    monkeypatch.setattr(MMDiT, "compile_blocks", partialmethod(MMDiT.compile_blocks, backend="eager"))
    options = ["--prompt", "rain", "--steps", "1", "--precision", "bf16", "--compile"]
    app(["generate", "--run", "x", "--out", str(tmp_path / "out"), "--list", str(tmp_path / "list.csv"), *options], standalone_mode=False)
    records = [json.loads((tmp_path / "out" / f"{video.stem}.json").read_text()) for video in videos]
    assert [(record["options"]["prompt"], record["precision"]) for record in records] == [("a bell", "bf16"), ("rain", "bf16")]
    assert all(block._compiled_call_impl for block in (*model.generator.joint_blocks, *model.generator.fused_blocks))
