"""The jobs that train: what they ask for and say; and a chain on two real nodes that ends as if nothing had happened to it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from launch.launchers import launch as app
from launch.slurm import Container, Job, SlurmConfig, Training, chain, job_script
from pipelines.recipes import load_recipe
from tests.fixtures.tiny_chain import REPOSITORY, overrides, tiny_shards

DEMO = load_recipe("demo")
STAGES = ("autoencoder", "contrastive", "generative", "preference")
CHANGES = ("data=shards", "out=runs", "name=quiet", "prepare.reader=rendered", "prepare.arguments=[clips]")
STEPS = 30


def directives(script: str) -> list[str]:
    """What sbatch reads, in order."""
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def shown(*arguments: str) -> dict[str, str]:
    """Script of each job in a dry run, and under `submission` the calls of sbatch."""
    done = CliRunner().invoke(app, ["slurm", "demo", *CHANGES, *arguments, "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0
    *scripts, submission = re.split(r"^# (?=/|submitted)", done.output, flags=re.MULTILINE)[1:]
    return {Path(text.partition("\n")[0]).stem: text.partition("\n\n")[2] for text in scripts} | {"submission": submission}


def finish(stage: str, *also: str) -> None:
    """As if it had been exported."""
    for name in (stage, *also):
        export = Path("runs/quiet", name, "export")
        export.mkdir(parents=True)
        (export / "complete.json").write_text("{}")


def prepared() -> None:
    """As if shards were there and training had begun."""
    Path("shards").mkdir()
    for path in (Path("shards/index.parquet"), Path("runs/quiet/recipe.yaml")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def after(submission: str) -> dict[str, str]:
    """Job -> the jobs that it waits for."""
    calls = [line for line in submission.splitlines() if line.startswith("sbatch ")]
    found = ((Path(call.split()[-1]).stem, re.search(r"afterok:(\S+)", call)) for call in calls)
    return {name: match[1].replace("ID_OF_", "").lower() if match else "" for name, match in found}


def test_a_job_for_every_stage_follows_the_preparation():
    assert after(shown()["submission"]) == {
        "manifest": "", "shards": "manifest", "index": "shards", "verify": "index", "autoencoder": "verify", "contrastive": "verify",
        "generative": "autoencoder:contrastive", "preference": "generative"}  # fmt: skip


def test_what_is_complete_is_left_out():
    prepared()
    finish("autoencoder")
    assert after(shown()["submission"]) == {"contrastive": "", "generative": "contrastive", "preference": "generative"}
    finish("contrastive", "generative", "preference/round-1")
    done = CliRunner().invoke(app, ["slurm", "demo", *CHANGES, "--dry-run"], catch_exceptions=False)
    assert done.output.splitlines() == [*(f"{stage}: complete, skipped" for stage in STAGES), "shards: prepared, skipped",
                                        "nothing to do: every part is complete"]  # fmt: skip
    Path("runs/quiet/preference/round-1/export/complete.json").unlink()
    assert after(shown()["submission"]) == {"preference": ""}


def test_shards_are_verified_again_until_training_has_begun():
    prepared()
    Path("runs/quiet/recipe.yaml").unlink()
    Path("manifest.parquet").touch()
    assert list(after(shown("--stages", "prepare,autoencoder")["submission"])) == ["shards", "index", "verify", "autoencoder"]
    no_preparation = chain(load_recipe("demo", ("data=shards",)), Path("r.yaml"), SlurmConfig(folder=Path("s")), print)
    assert [job.name for job in no_preparation] == list(STAGES)


def test_what_a_stage_asks_for():
    scripts = shown("--nodes", "2", "--gpus-per-node", "4", "--partition", "cpu", "--time", "12:00:00", "--stage-time",
                    "generative=3-0", "--notice", "600", "--train-sbatch=--partition=gpu", "--mem", "0",
                    "--process-restarts", "5", "--restarts", "7")  # fmt: skip
    script = scripts["generative"]
    folder = Path.cwd() / "runs" / "quiet" / "slurm"
    assert directives(script) == [
        "--job-name=quiet-generative", f"--output={folder}/logs/generative-%j.log", "--open-mode=append", "--partition=cpu", "--time=3-0",
        "--mem=0", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=4", "--signal=B:USR1@600", "--requeue",
        "--partition=gpu"]  # fmt: skip
    assert "--time=12:00:00" in directives(scripts["contrastive"]) and "--partition=gpu" not in directives(scripts["shards"])
    assert "failed < 7" in script and "--shutdown-timeout=570" in script


@pytest.mark.parametrize(("change", "cpus"), [("features.workers=3", 8), ("generative.train.stream.workers=5", 12)])
def test_each_process_and_each_of_its_workers_has_a_cpu(change, cpus):
    script = shown("--gpus-per-node", "2", change)["generative"]
    assert f"--cpus-per-task={cpus}" in directives(script)


PRINTING = (r"srun() { printf '%s\0' srun \"$@\"; }".replace('\\"', '"'), 'scontrol() { echo "a7 NodeAddr=10.0.0.7 Port=1"; }')


@pytest.mark.parametrize("container", [None, "pyxis", "apptainer"])
def test_what_srun_starts(here, container):
    image = container and Container(image="lab#foleyscale:1", runtime=container, mounts=("/data", "/fast:/scratch"))
    config = SlurmConfig(folder=here / "s", setup=PRINTING, training=Training(nodes=2, gpus_per_node=4), container=image)
    script = job_script(Job(name="generative", command=("train", "generative", "a b.yaml"), trains=True, cpus=8), DEMO, config)
    config.logs.mkdir(parents=True)
    environment = os.environ | {"SLURM_JOB_ID": "20017", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "a[7-8]"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    srun, *words = done.stdout.partition("srun")[2].split("\0")[:-1]
    python = [sys.executable if container is None else "python3", "-P", "-m"]
    mounts = f"{here}:{here},/data:/data,/fast:/scratch"
    inside = {
        None: [],
        "pyxis": ["--container-image=lab#foleyscale:1", f"--container-mounts={mounts}", f"--container-workdir={here}"],
        "apptainer": ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(here), "lab#foleyscale:1"],
    }[container]
    assert words == [
        "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--kill-on-bad-exit=0", "--wait=60", *inside,
        *python, "torch.distributed.run", "--nnodes=2", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-id=20017-3",
        "--rdzv-endpoint=10.0.0.7:10017", "--max-restarts=2", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "--shutdown-timeout=270", "--no-python", *python, "launch.cli", "train", "generative", "a b.yaml"]  # fmt: skip


def test_only_starts_that_get_no_further_count(here):
    setup = ("srun() { eval \"$TROUBLE\"; }", "squeue() { echo RUNNING; }", "sleep() { :; }",
             'scontrol() { [[ $1 == requeue ]] && echo "asked: $*" || echo NodeAddr=a7; }')  # fmt: skip
    config = SlurmConfig(folder=here / "s", setup=setup, restarts=2)
    config.logs.mkdir(parents=True)
    script = job_script(Job(name="generative", command=("train",), trains=True, made_in=(here / "made",)), DEMO, config)
    (here / "made").mkdir()

    def start(trouble: str) -> bool:
        """Whether a start with this end goes back into the queue."""
        environment = os.environ | {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "a7", "TROUBLE": trouble}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and f"exit code 1: {'back' if 'asked: requeue 12' in done.stdout else 'given up'}" in done.stdout
        return "asked: requeue 12" in done.stdout

    failing, getting_on = "return 1", "touch made/complete.json; return 1"
    assert [start(trouble) for trouble in (failing, failing, failing)] == [True, True, False]
    assert [start(trouble) for trouble in (getting_on, failing, getting_on, failing, failing)] == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("saving", "end"),
    [
        ("touch made/complete.json", ["told to leave: back into the queue", "asked: requeue 12"]),
        (":", ["told to leave, and nothing was finished in 1 starts: given up"]),
    ],
)
def test_a_stage_that_is_told_to_leave_does_so(here, saving, end):
    """The script waits for torchrun's end, then asks for another start, as often as it takes while each gets further."""
    setup = (f"srun() {{ command sleep 1; {saving}; echo saved; return 1; }}", "squeue() { echo RUNNING; }",
             'scancel() { echo "scancel $*"; }',
             'sleep() { command sleep 0.05; }', 'scontrol() { [[ $1 == requeue ]] && echo "asked: $*" || echo NodeAddr=a7; }',
             "(command sleep 0.5; kill -USR1 $$) &")  # fmt: skip
    config = SlurmConfig(folder=here / "s", setup=setup, restarts=0)
    config.logs.mkdir(parents=True)
    script = job_script(Job(name="generative", command=("train",), trains=True, made_in=(here / "made",)), DEMO, config)
    (here / "made").mkdir()
    environment = os.environ | {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "a7", "SLURM_RESTART_COUNT": "40"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    said = [re.sub(r"^\S+ \S+ job 12 start 41: ", "", line) for line in done.stdout.splitlines()]
    assert said == ["running", "told to leave, saving", "scancel --signal=USR1 12", "saved", *end]
    assert done.returncode == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "prepare,vocoder"], "--stages has 'vocoder': choose from prepare, autoencoder, contrastive, generative, preference"),
        (["--stages", "autoencoder"], "shards: there are no indexed shards to train on; add prepare to --stages"),
        (["--stages", "prepare,generative"], "stage autoencoder is not complete, and generative starts from it; add it to --stages"),
        (["--nodes", "5"], r"autoencoder.train.batch_size \d+ must divide by 5 processes x accumulation 1: change one of them, --nodes or"),
        (["--nodes", "0"], "Training.nodes is 0: choose 1 or more"),
        (["--notice", "10"], "Training.notice is 10: choose 60 or more"),
        (["--stage-time", "vocoder=1"], "--stage-time 'vocoder=1': write it as STAGE=TIME with one of autoencoder, "),
        (["--train-sbatch", "qos=low"], "Training.sbatch has 'qos=low': write options of sbatch"),
        (["--container", "i", "--container-runtime", "docker"], "Container.runtime is 'docker': choose pyxis or apptainer"),
        (["--mount", "/data"], "--container-runtime and --mount are for a container: name its image with --container"),
        (["--container", "i", "--mount", "data"], "Container.mounts has 'data': write an absolute path without commas"),
    ],
)
def test_what_cannot_be_launched_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        shown(*arguments)
    assert "\n" not in str(raised.value)
    assert list(Path.cwd().iterdir()) == []


def changes(folder: Path, shards: str) -> list[str]:
    """Overrides of the two stages that are watched: more steps, so that there is time to disturb them."""
    return [*overrides(folder, shards), *(f"{stage}.train.{change}" for stage in ("autoencoder", "generative") for change in (
        f"steps={STEPS}", "checkpoint_every=10", "validate_every=0"))]


FIRST_STAGES = """
import sys
from pipelines.recipes import load_recipe
from pipelines.run import STAGES, run_chain
run_chain(load_recipe("demo", sys.argv[1:]), STAGES[:3])
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Shards, and a run of the first three stages by two processes without any trouble."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shards = tiny_shards(folder)
    (folder / "first_stages.py").write_text(FIRST_STAGES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "first_stages.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command, *changes(folder, shards)], cwd=folder, env=environment, check=True, timeout=280)
    return shards, folder / "run"


@pytest.mark.slow
@pytest.mark.timeout(600)  # three minutes on two cores that others share
def test_a_chain_that_is_preempted_and_killed_ends_like_one_that_was_not(cluster, place, undisturbed, monkeypatch):
    shards, quiet = undisturbed
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    shutil.copytree(quiet / "contrastive", "run/contrastive")
    arguments = ["slurm", "demo", *changes(place, shards), "--nodes", "2", "--stages", "autoencoder,contrastive,generative"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    first, last = re.findall(r"^\w+: job (\d+)", done.output, flags=re.MULTILINE)
    with pytest.raises(ValueError, match=f"jobs of an earlier launch are in the queue: {first}, {last}; wait for them, or scancel"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)

    wait_for(lambda: logged("autoencoder") > 3)
    cluster.run("scancel", "--batch", "--signal=USR1", first)  # what SLURM sends before the time limit, and before it preempts
    wait_for(lambda: logged("generative") > 15)
    kill(last, rank=1)
    wait_for(lambda: not cluster.active())

    jobs = [cluster.job(job) for job in (first, last)]
    assert [job["JobState"] for job in jobs] == ["COMPLETED"] * 2, logs()
    assert [int(job["Restarts"]) for job in jobs] == [1, 0], logs()
    assert re.search(r"autoencoder is saved at step .* told to leave: back into the queue", log(f"autoencoder-{first}"), flags=re.DOTALL)
    assert "exitcode: -9" in log(f"generative-{last}")
    # Gradients of several processes differ in their last bit from start to start; the features of the second stage are float16.
    for stage, tolerance in (("autoencoder", 1e-5), ("generative", 2e-3)):
        (steps, values), (expected_steps, expected) = learned(Path("run"), stage), learned(quiet, stage)
        assert steps == expected_steps == list(range(1, STEPS + 1))
        torch.testing.assert_close(values, expected, rtol=tolerance, atol=0)
        ours, theirs = weights(Path("run"), stage), weights(quiet, stage)
        assert (ours - theirs).norm() / theirs.norm() < tolerance
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.output.splitlines()[-1] == "nothing to do: every part is complete"


def learned(run: Path, stage: str) -> tuple[list[int], torch.Tensor]:
    """The steps that are logged, and the loss of each."""
    lines = list(map(json.loads, (run / stage / "metrics.jsonl").read_text().splitlines()))
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return [step for step, _ in found], torch.tensor([loss for _, loss in found])


def weights(run: Path, stage: str) -> torch.Tensor:
    """All that the stage exports, one after another."""
    return torch.cat([weight.flatten() for _, weight in sorted(load_file(run / stage / "export" / "weights.safetensors").items())])


def logged(stage: str) -> int:
    path = Path("run", stage, "metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def kill(job: str, rank: int) -> None:
    """SIGKILL to one rank of a job."""
    wanted = {f"SLURM_JOB_ID={job}", f"RANK={rank}"}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((process / "environ").read_text(errors="replace").split("\0")):
                os.kill(int(process.name), signal.SIGKILL)


def wait_for(ready, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, logs()
        time.sleep(0.05)


def log(name: str) -> str:
    return Path(f"run/slurm/logs/{name}.log").read_text()


def logs() -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-6000:]}" for path in sorted(Path("run/slurm/logs").glob("*.log")))
