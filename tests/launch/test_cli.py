"""The command line: quick to answer, and one clear line with exit code 2 for what a user can mend."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
SLOW_TO_IMPORT = ("torch", "deepspeed", "av", "pyarrow", "numpy", "matplotlib", "pydantic")


def foleyscale(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a process of its own."""
    return subprocess.run([sys.executable, "-W", "ignore", "-m", "launch.cli", *arguments], cwd=REPOSITORY, capture_output=True,
                          text=True, env=os.environ | environment, timeout=120)


def test_help_answers_in_half_a_second():
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Commands:" in foleyscale("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, not the clock's: other work on the machine must not decide.
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5


def test_nothing_heavy_is_imported_before_a_command_runs():
    code = f"import sys, launch.cli; print([name for name in {SLOW_TO_IMPORT!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run demo clip.sice=3", "demo.yaml: clip.sice: no such key; did you mean size?"),
        ("run demo clip.size=large", "demo.yaml: clip.size: input should be a valid integer"),
        ("run demo generative.train.steps", "override 'generative.train.steps': write it as key=value"),
        ("run nowhere", "nowhere: no such recipe file, and no shipped recipe of that name (demo, mmaudio_finetune, rendered, vggsound)"),
        ("run demo", "data: name the shards to train on"),
        ("generate --run nowhere --out {out} {video}", "nowhere/recipe.yaml is missing"),
        ("generate --run nowhere --out {out} nothing.mp4", "nothing.mp4: no such video file"),
        ("export --run nowhere", "there is nothing to write: name --out, --vae-out or both"),
        ("export --run nowhere --vae-out {out}", "nowhere/autoencoder/export is missing"),
        ("evaluate --run nowhere", "nowhere/recipe.yaml is missing"),
        ("prep shards nothing.parquet {out}", "nothing.parquet: no such manifest"),
        ("prep shards {video} {out}", "not a Parquet file"),
        ("prep shards nothing.parquet {out} --task 2/2", "--task '2/2': write it as I/N with 0 <= I < N"),
        ("prep shards nothing.parquet {out} --task one", "--task 'one': write it as I/N"),
        ("prep shards nothing.parquet {out} format.short_side=33", "ClipFormat.short_side is 33: choose an even number"),
        ("prep manifest folder nowhere --out {out}", "nowhere: no such folder"),
        ("prep index nowhere", "nowhere: no settings.json here; make shards with `foleyscale prep shards` first"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    video = tmp_path / "video.mp4"
    video.write_text("no media")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["foleyscale", *arguments.format(video=video, out=tmp_path / "out").split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith("foleyscale: ") and said.err.count("\n") == 1
    assert message in said.err


@pytest.mark.parametrize("arguments", ["run demo clip.sice=3", "train generative demo data=nowhere"])
def test_a_mistake_is_one_line_of_a_process_too(arguments):
    done = foleyscale(*arguments.split())
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("foleyscale: ") and done.stderr.count("\n") == 1, done.stderr


def test_an_unknown_stage_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["foleyscale", "train", "decoder", "demo"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "no stage 'decoder'; choose from autoencoder, contrastive, generative, preference" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "profiled"), [
    ("run demo --profile 5", {"autoencoder": 5, "contrastive": 5, "generative": 5, "preference": 5}),
    ("train generative demo --profile 5", {"autoencoder": 0, "contrastive": 0, "generative": 5, "preference": 0}),
    ("train generative demo generative.train.profile=2 --profile 5", {"generative": 2}),
    ("run demo", {"generative": 0}),
])
def test_a_profile_is_one_of_every_stage_that_runs(monkeypatch, arguments, profiled):
    started = []
    monkeypatch.setattr("pipelines.run.run_chain", lambda recipe, *_, **__: started.append(recipe))
    monkeypatch.setattr(sys, "argv", ["foleyscale", *arguments.split()])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, None)
    assert {stage: getattr(started[0], stage).train.profile for stage in profiled} == profiled


def test_the_stack_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["foleyscale", "run", "demo", "clip.sice=3"])
    monkeypatch.setenv("FOLEYSCALE_DEBUG", "1")
    with pytest.raises(ValueError, match="no such key"):
        main()


def test_verify_exits_1_for_what_is_damaged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["foleyscale", "prep", "verify", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().out.endswith(": 1 problems\n")


def test_the_guard_speaks_when_it_leaves_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "vggss.json").write_text('[{"file": "---g-f_I2yQ_000001", "class": "people marching", "bbox": []}]')
    (tmp_path / "vggsound.csv").write_text("---g-f_I2yQ,1,people marching,test\n")
    monkeypatch.chdir(tmp_path)
    command = "prep manifest vggss vggss.json --split train --exclude vggsound.csv"
    monkeypatch.setattr(sys, "argv", ["foleyscale", *command.split()])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "no clips" in said and "dropped 1 of 1 clips" in said and "--exclude vggss.json:all" in said and said.count("\n") == 1


@pytest.mark.parametrize("code", [0, 2])
def test_the_process_group_is_ended_after_success_alone(code):
    script = f"""
import sys, torch.distributed as dist, launch.cli as cli
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
cli.app = lambda: sys.exit({code})
try:
    cli.main()
except SystemExit as end:
    assert end.code == {code} and dist.is_initialized() == bool({code})
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=100)
