"""A real SLURM of two nodes on this machine: controller and node daemons of its own, on free ports, below a folder of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.services.ports import free_ports

NODES = ("n1", "n2")
_DAEMONS = ("munged", "slurmctld", "slurmd")
_SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
_CONFIG = """\
ClusterName=foley
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
# A requeued job is held for as long as the old start's credential lives: 120 s by default.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
# The least loaded node first, so that both get tasks.
SelectTypeParameters=CR_Core,CR_LLN
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=2
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    if os.geteuid() != 0:
        return "SLURM's node daemons need root"
    lacking = [name for name in (*_DAEMONS, "sbatch") if not _find(name)]
    return f"{', '.join(lacking)} not installed (apt-get install slurm-wlm munge)" if lacking else ""


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster; `sbatch` and friends find it through `environment`."""

    root: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What a command says; RuntimeError where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def job(self, name: str) -> dict[str, str]:
        """Fields of `scontrol show job` of a job id or an array task, as ID_TASK."""
        pairs = (word.partition("=") for word in self.run("scontrol", "-o", "show", "job", name).splitlines()[0].split())
        return {key: value for key, _, value in pairs}

    def lose(self, node: str) -> None:
        """Count a node as failed, which takes its jobs off it, and get it back."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        try:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        except RuntimeError:
            # Its daemon may have registered in between, and brought it back by itself.
            assert "DOWN" not in self.run("scontrol", "-o", "show", "node", node)

    def active(self) -> list[str]:
        """Ids of the jobs and tasks that are not over."""
        return self.run("squeue", "-h", "-r", "-o", "%i").split()


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start two nodes, and end them with all their jobs."""
    with ExitStack() as stack:
        # The path of munge's socket must stay below 108 characters: not pytest's folder.
        root = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        config = _write_config(root)
        cluster = SlurmCluster(root, os.environ | {"SLURM_CONF": str(config)})
        key = root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        _start(stack, cluster, "munged", "--foreground", "--force", *(f"--{name}={root / file}" for name, file in files.items()))
        _wait(lambda: (root / "munge.socket").exists(), "munged does not answer", root)
        _start(stack, cluster, "slurmctld", "-D", "-c")
        for name in NODES:
            _start(stack, cluster, "slurmd", "-D", "-N", name)
        stack.callback(_cancel_all, cluster)
        _wait(lambda: _states(cluster) == ["idle"] * len(NODES), "the nodes do not come up", root)
        yield cluster


def _write_config(root: Path) -> Path:
    host = socket.gethostname().partition(".")[0]
    controller, *ports = free_ports(1 + len(NODES))
    nodes = [f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
             for name, port in zip(NODES, ports, strict=True)]  # fmt: skip
    root.chmod(0o755)
    for folder in ("state", *(f"spool-{name}" for name in NODES)):
        (root / folder).mkdir()
    path = root / "slurm.conf"
    path.write_text(_CONFIG.format(host=host, controller=controller, root=root, nodes="\n".join(nodes), names=",".join(NODES)))
    return path


def _start(stack: ExitStack, cluster: SlurmCluster, name: str, *arguments: str) -> None:
    """Run a daemon in the foreground, so that its process id is known; ended when the stack is closed."""
    with open(cluster.root / f"{name}.out", "ab") as log:
        process = subprocess.Popen([_find(name), *arguments], env=cluster.environment, stdout=log, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL)  # fmt: skip
    stack.callback(_end, process)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _cancel_all(cluster: SlurmCluster) -> None:
    """End the jobs while the daemons that know their processes still run."""
    cluster.run("scancel", "--full", "--user=root")
    _wait(lambda: not cluster.active(), "jobs do not end", cluster.root)


def _states(cluster: SlurmCluster) -> list[str]:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=cluster.environment, capture_output=True, text=True)
    return done.stdout.split()


def _wait(ready: Callable[[], bool], complaint: str, root: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"{complaint}:\n{_tails(sorted(root.glob('*.out')))}")
        time.sleep(0.2)


def _tails(logs: Sequence[Path]) -> str:
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)


def _find(name: str) -> str | None:
    return shutil.which(name, path=_SEARCH)
