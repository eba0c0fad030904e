"""SLURM jobs: scripts that bash and sbatch read as meant, whatever the names; a chain that ends complete whatever is killed."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep.shards import shard_name
from launch.launchers import launch as app
from launch.slurm import Job, SlurmConfig, chain, job_script, launch
from pipelines.recipes import load_recipe

CLIPS, TASKS, ROWS_PER_SHARD = 24, 4, 1
SHARDS = CLIPS // ROWS_PER_SHARD
CHANGES = (
    "data=shards", "out=runs", "name=noise",
    "prepare.reader=rendered", f'prepare.arguments=[clips, --clips, "{CLIPS - 4}", --heldout, "4"]',
    f"prepare.tasks={TASKS}", "prepare.workers=1", f"prepare.settings.rows_per_shard={ROWS_PER_SHARD}",
)  # fmt: skip
DEMO = load_recipe("demo")
PREPARE = ("--stages", "prepare")
CHAIN = ("manifest", "shards", "index", "verify")
PRINTING = (": $NOT_SET", r"""srun() { printf '%s\0' "$PWD" "$@"; }""")
"""Setup lines that put a function in place of srun, which prints where it runs and what it is called with."""
words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
names_of_folders = words.filter(lambda text: text.isprintable() and text not in (".", "..") and {"%", "\\", "/"}.isdisjoint(text))


def plan(tmp_path, *changes, **options) -> tuple[dict[str, str], SlurmConfig]:
    """Script of each job of the recipe."""
    recipe, config = load_recipe("demo", (*CHANGES, *changes)), SlurmConfig(folder=tmp_path / "slurm", **options)
    jobs = chain(recipe, config.folder / "recipe.yaml", config, print, ["prepare"])
    return {job.name: job_script(job, recipe, config) for job in jobs}, config


def directives(script: str) -> dict[str, str]:
    """Option -> value of the lines that sbatch reads."""
    options = (shlex.split(line.removeprefix("#SBATCH "))[0] for line in script.splitlines() if line.startswith("#SBATCH "))
    return {name: value for name, _, value in (option.removeprefix("--").partition("=") for option in options)}


def command(script: str) -> list[str]:
    """What follows the module in the command that the script runs."""
    return shlex.split(re.search(r"launch\.cli (.*) &$", script, flags=re.MULTILINE)[1])


def test_the_chain_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripts, config = plan(tmp_path)
    assert {name: command(script) for name, script in scripts.items()} == {
        "manifest": ["prep", "manifest", "rendered", "clips", "--clips", "20", "--heldout", "4", "--out", "manifest.parquet"],
        "shards": ["prep", "shards", "manifest.parquet", "shards", "--recipe", f"{config.folder}/recipe.yaml", "--task", "auto",
                   "--workers", "1"],
        "index": ["prep", "index", "shards"],
        "verify": ["prep", "verify", "shards", "--manifest", "manifest.parquet"],
    }
    assert all(f"{shlex.quote(sys.executable)} -P -m launch.cli" in script for script in scripts.values())
    assert [name for name, script in scripts.items() if "export FOLEYSCALE_TASKS=4" in script] == ["shards"]


def test_every_job_restarts_and_appends_to_its_log(tmp_path):
    scripts, config = plan(tmp_path)
    for name, script in scripts.items():
        options = directives(script)
        ids = "%A_%a" if name == "shards" else "%j"
        assert options["output"] == f"{config.folder}/logs/{name}-{ids}.log"
        assert options["open-mode"] == "append" and "requeue" in options and options["signal"] == "B:USR1@60"
        assert options["job-name"] == f"noise-{name}"


def test_options_reach_the_jobs_they_are_for(tmp_path):
    scripts, _ = plan(tmp_path, tasks=32, max_running=8, partition="cpu", account="sound", time="12:00:00", mem="32G", cpus_per_task=16,
                      sbatch=("--qos=low",), setup=("module load python",), log_dir=tmp_path / "logs of all", restarts=7)  # fmt: skip
    every = {"partition": "cpu", "account": "sound", "time": "12:00:00", "mem": "32G", "qos": "low"}
    for name, script in scripts.items():
        options = directives(script)
        assert every.items() <= options.items()
        assert options.get("array") == ("0-31%8" if name == "shards" else None)
        assert options["cpus-per-task"] == ("16" if name in ("shards", "verify") else "1")
        assert options["output"].startswith(f"{tmp_path}/logs of all/{name}-")
        assert "set +u\nmodule load python\nset -u\n" in script and "start <= 7" in script


def test_a_manifest_that_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.parquet").touch()
    scripts, _ = plan(tmp_path)
    assert list(scripts) == ["shards", "index", "verify"]
    assert capsys.readouterr().out == "manifest.parquet is there and is used as it is; delete it to list the clips anew\n"


@given(names=st.lists(words, min_size=3, max_size=3), folder=names_of_folders)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_words_reach_the_command(tmp_path, names, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    with contextlib.chdir(tmp_path / folder):
        job, config = Job(name="shards", command=("prep", *names), tasks=3), SlurmConfig(folder=Path.cwd(), setup=PRINTING)
        script = job_script(job, replace(DEMO, name=folder), config)
    called = subprocess.run(["bash", "-c", script], env=os.environ | {"SLURM_JOB_ID": "1"}, capture_output=True, check=True)
    place, *arguments, _ = called.stdout.split(b"\n", 1)[1].decode().split("\0")
    assert place == str(tmp_path / folder)
    assert arguments == ["--ntasks=1", "--cpus-per-task=1", sys.executable, "-P", "-m", "launch.cli", "prep", *names]
    assert directives(script)["output"] == f"{tmp_path / folder}/logs/shards-%A_%a.log"
    assert directives(script)["job-name"] == f"{folder}-shards"


@pytest.mark.parametrize(
    ("answers", "status", "starts", "state", "requeued"),
    [
        ((), 0, 0, "RUNNING", False),
        ((), 2, 0, "RUNNING", True),
        ((), 137, 2, "RUNNING", True),
        ((), 137, 3, "RUNNING", False),  # often enough
        ((), 143, 0, "COMPLETING", False),  # cancelled
        ((1,), 1, 0, "RUNNING", False),  # verify found damage
        ((1,), 137, 0, "RUNNING", True),
    ],
)
def test_when_a_job_goes_back_into_the_queue(tmp_path, monkeypatch, answers, status, starts, state, requeued):
    monkeypatch.chdir(tmp_path)
    setup = (f"srun() {{ return {status}; }}", f"squeue() {{ echo {state}; }}", 'scontrol() { echo "asked: $*"; }', "sleep() { :; }")
    job = Job(name="shards", command=("prep",), tasks=4, answers=answers)
    script = job_script(job, DEMO, SlurmConfig(folder=tmp_path, setup=setup))
    environment = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": str(starts)}
    done = subprocess.run(["bash", "-c", script], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == status
    assert ("asked: requeue 12_3\n" in done.stdout) == requeued
    assert f"exit code {status}" in done.stdout.splitlines()[1]


def test_a_controller_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # squeue fails twice, then scontrol does.
    setup = ("srun() { return 2; }", "squeue() { echo RUNNING; echo >>asked; (($(wc -l <asked) > 2)); }",
             'scontrol() { echo "asked: $*"; echo >>asked; (($(wc -l <asked) > 4)); }', "sleep() { :; }")  # fmt: skip
    script = job_script(Job(name="shards", command=("prep",)), DEMO, SlurmConfig(folder=tmp_path, setup=setup))
    done = subprocess.run(["bash", "-c", script], env=os.environ | {"SLURM_JOB_ID": "12"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.count("asked: requeue 12\n") == 2


def test_a_dry_run_shows_everything_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    arguments = ["slurm", "demo", *CHANGES, *PREPARE, "--tasks", "8", "--max-running", "2", "--dry-run"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    folder = tmp_path / "runs" / "noise" / "slurm"
    assert [line for line in done.output.splitlines() if line.startswith("# /")] == [f"# {folder}/{name}.sh" for name in CHAIN]
    assert "#SBATCH --array=0-7%2" in done.output
    after = {"manifest": "", "shards": "MANIFEST", "index": "SHARDS", "verify": "INDEX"}
    assert done.output.splitlines()[-len(CHAIN):] == [
        "sbatch --parsable " + (f"--dependency=afterok:ID_OF_{after[name]} --kill-on-invalid-dep=yes " if after[name] else "")
        + f"{folder}/{name}.sh" for name in CHAIN]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ((), {}, "sbatch is not on the PATH: launch where SLURM jobs are submitted, or see the jobs with --dry-run"),
        (("data=''",), {"dry_run": True}, "data: name the folder or URL of the shards"),
        (("prepare=null",), {"dry_run": True}, "prepare: the recipe does not say how its shards are made"),
        (("prepare.reader=''",), {"dry_run": True}, "prepare.manifest: manifest.parquet is not there; make it, or name a reader"),
        (("name='a\tb'",), {"dry_run": True}, r"'a\\tb-manifest' has a line break or another character that sbatch cannot take"),
    ],
)
def test_what_cannot_be_launched_is_one_line(tmp_path, monkeypatch, changes, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=message) as raised:
        launch(load_recipe("demo", (*CHANGES, *changes)), SlurmConfig(folder=tmp_path / "slurm"), print, parts=["prepare"], **options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, "SlurmConfig.tasks is 0: choose 1 or more"),
        ({"restarts": -1}, "SlurmConfig.restarts is -1: choose 0 or more"),
        ({"sbatch": ("qos=low",)}, "SlurmConfig.sbatch has 'qos=low': write options of sbatch, such as --qos=low"),
        ({"log_dir": Path("100%")}, "SlurmConfig.log_dir is '100%': SLURM reads % and"),
    ],
)
def test_settings_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SlurmConfig(folder=tmp_path, **options)


@pytest.mark.slow
def test_a_chain_with_trouble_ends_like_a_run_without(cluster, place):
    manifest, shards, index, verify = submit()
    names = [f"{shards}_{task}" for task in range(TASKS)]
    twice = cluster.run("sbatch", "--parsable", "--array=1", f"--dependency=afterok:{manifest}", "runs/noise/slurm/shards.sh") + "_1"
    wait_for(lambda: all(map(written, range(TASKS))))
    kill(shards, 0)
    cluster.run("scancel", "--batch", "--signal=USR1", names[2])  # what SLURM sends before the time limit
    assert cluster.job(names[1])["JobState"] == cluster.job(twice)["JobState"] == "RUNNING"
    cluster.lose(cluster.job(names[3])["NodeList"])
    assert max(map(len, map(written, range(TASKS)))) < SHARDS // TASKS, "the tasks were over before anything could happen to them"
    wait_for_all(cluster)
    for job in (manifest, *names, twice, index, verify):
        assert cluster.job(job)["JobState"] == "COMPLETED", logs()
    assert all(int(cluster.job(names[task])["Restarts"]) >= 1 for task in (0, 2, 3))
    assert "exit code 137: back into the queue" in log(f"shards-{shards}_0")
    assert "the time limit is near: back into the queue" in log(f"shards-{shards}_2")
    assert "shards: sound" in log(f"verify-{verify}")
    recipe, = Path("runs/noise/slurm").glob("recipe-*.yaml")
    alone = [sys.executable, "-m", "launch.cli", "prep", "shards", "manifest.parquet", "alone", "--recipe", str(recipe), "--task", "0/1"]
    subprocess.run(alone, check=True)
    done, undisturbed = contents("shards"), contents("alone")
    assert done.keys() == undisturbed.keys() and len(done) == 2 * SHARDS + 3
    assert [name for name in done if done[name] != undisturbed[name]] == []


@pytest.mark.slow
def test_what_is_cancelled_stays_so_and_launching_again_resumes(cluster, place):
    first = submit()
    wait_for(lambda: written(0))
    there = {name: Path("shards", name).stat().st_mtime_ns for name in written(0)}
    cluster.run("scancel", *first)
    wait_for_all(cluster)
    assert {cluster.job(job)["JobState"] for job in (f"{first[1]}_0", *first[2:])} == {"CANCELLED"}
    *_, verify = submit()
    wait_for_all(cluster)
    assert cluster.job(verify)["JobState"] == "COMPLETED", logs()
    assert {name: Path("shards", name).stat().st_mtime_ns for name in there} == there


@pytest.mark.slow
def test_a_job_that_fails_for_good_takes_the_rest_along(cluster, place):
    first, *rest = submit("prepare.reader=folder", "prepare.arguments=[nowhere]", "--restarts", "1")
    wait_for_all(cluster)
    assert cluster.job(first)["JobState"] == "FAILED" and cluster.job(first)["Restarts"] == "1"
    assert log(f"manifest-{first}").count("nowhere: no such folder") == 2
    assert {cluster.job(job)["Reason"] for job in rest} == {"DependencyNeverSatisfied"}


@pytest.mark.slow
def test_where_a_job_is_refused_none_stays_in_the_queue(cluster, place):
    with pytest.raises(ValueError, match="sbatch refused the job shards, and nothing stays in the queue: .* Invalid job array") as raised:
        submit("--tasks", "5000")
    assert "\n" not in str(raised.value)
    wait_for_all(cluster)
    assert not Path("manifest.parquet").exists()


def submit(*arguments: str) -> list[str]:
    """Launch the recipe; the ids of its jobs."""
    done = CliRunner().invoke(app, ["slurm", "demo", *CHANGES, *PREPARE, *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return re.findall(r"^\w+: job (\d+)", done.output, flags=re.MULTILINE)


def written(task: int) -> list[str]:
    """Sidecars of a task's shards that are there."""
    names = [f"{shard_name(number)}.parquet" for number in range(task, SHARDS, TASKS)]
    return [name for name in names if Path("shards", name).exists()]


def kill(job: str, task: int) -> None:
    """SIGKILL to every Python process of an array task."""
    wanted = {f"SLURM_ARRAY_JOB_ID={job}", f"SLURM_ARRAY_TASK_ID={task}"}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ = set((process / "environ").read_text(errors="replace").split("\0"))
            if wanted <= environ and (process / "cmdline").read_text().startswith(sys.executable):
                os.kill(int(process.name), signal.SIGKILL)


def wait_for(ready, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, logs()
        time.sleep(0.02)


def wait_for_all(cluster) -> None:
    """Until the queue is empty."""
    wait_for(lambda: not cluster.active())


def log(name: str) -> str:
    return Path(f"runs/noise/slurm/logs/{name}.log").read_text()


def logs() -> str:
    """Everything that all jobs said."""
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(Path("runs/noise/slurm/logs").glob("*.log")))


def contents(folder: str) -> dict[str, bytes]:
    """Every file of a folder but those of writers that were killed, whose names begin with a dot."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("[!.]*")}
