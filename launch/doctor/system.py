"""The interpreter, the operating system and its limits."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from launch.doctor.check import GIB, Check, size
from launch.doctor.devices import gpus

OLDEST_PYTHON = (3, 11)
_DISK_WARN, _DISK_FAIL = 20 * GIB, GIB
_SHM = GIB
"""What NCCL's rings between the GPUs of one machine want of /dev/shm, with room to spare."""
_OPEN_FILES = 4096
"""Shards, connections to a store and pipes to workers are all open files; many systems allow 1024."""
_UNSYNCHRONISED = 5
"""TIME_ERROR of ntp_gettime(3)."""


def python() -> Check:
    """The interpreter."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", "fail", found, f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    return Check("python", "ok", found)


def host() -> Check:
    """Cores and memory that this process may use, and the system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A container sees all of the machine's memory and is killed at its own limit.
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            memory = min(memory, int(limit.read_text()))
    return Check("host", "ok", f"{len(os.sched_getaffinity(0))} cores, {size(memory)} of memory, {platform.platform(terse=True)}")


def processes() -> Check:
    """Decoding and preparation start workers in all three ways, and hand batches over in memory without a name."""
    for method in ("fork", "forkserver", "spawn"):
        child = multiprocessing.get_context(method).Process(target=_nothing)
        child.start()
        child.join(30)
        if child.exitcode != 0:
            child.kill()
            found = f"a worker started by {method} ended with {child.exitcode}"
            return Check("processes", "fail", found, "allow more processes: ulimit -u, docker run --pids-limit")
    os.close(os.memfd_create("doctor"))
    return Check("processes", "ok", "fork, forkserver and spawn")


def _nothing() -> None:
    """Work of a worker that need only start and end."""


def open_files() -> Check:
    """How many files may be open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES:
        remedy = f"ulimit -n {min(hard, 65536)}" if hard > soft else "docker run --ulimit nofile=65536, or a higher hard limit"
        return Check("open files", "warn", f"{soft} may be open at once", remedy)
    return Check("open files", "ok", f"{soft} may be open at once")


def shared_memory() -> Check:
    """Room in /dev/shm for NCCL; batches do not go there."""
    if not Path("/dev/shm").is_dir():
        return Check("shared memory", "warn", "no /dev/shm", "mount a tmpfs there: NCCL and other libraries look for it")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{size(usage.free)} of {size(usage.total)} free in /dev/shm"
    if gpus() > 1 and usage.free < _SHM:
        found = f"{found}: too little for NCCL between {gpus()} GPUs"
        return Check("shared memory", "warn", found, "docker run --shm-size=8g, or --ipc=host")
    return Check("shared memory", "ok", found)


def disk(folder: Path) -> Check:
    """Whether the folder of the run can be written to, and how much fits."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if (problem := _unwriteable(there)) is not None:
        return Check("disk", "fail", problem, "choose another folder, or mount it for this user")
    free = shutil.disk_usage(there).free
    found, remedy = f"{size(free)} free in {there}", "make room, or choose another folder: checkpoints and shards are large"
    if free < _DISK_FAIL:
        return Check("disk", "fail", found, remedy)
    return Check("disk", "warn", found, remedy) if free < _DISK_WARN else Check("disk", "ok", found)


def caches() -> Check:
    """Whether compiled kernels can be kept."""
    home = Path.home()
    wanted = [Path(tempfile.gettempdir()), Path(os.environ.get("XDG_CACHE_HOME", home / ".cache")),
              Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton")),
              Path(os.environ.get("TORCH_EXTENSIONS_DIR", home / ".cache" / "torch_extensions"))]  # fmt: skip
    parents = {next(path for path in (folder, *folder.parents) if path.exists()) for folder in wanted}
    if problems := [problem for folder in sorted(parents) if (problem := _unwriteable(folder)) is not None]:
        return Check("caches", "warn", "; ".join(problems), "set HOME to a folder of this user's: compiled kernels are kept there")
    return Check("caches", "ok", f"below {home} and {tempfile.gettempdir()}")


def host_name() -> Check:
    """Whether the name of this machine has an address: torchrun and gloo ask for it."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        remedy = "add it to /etc/hosts; on one machine, torchrun --local_addr=127.0.0.1"
        return Check("host name", "warn", f"{name} has no address, and torchrun waits ten minutes for one", remedy)
    return Check("host name", "ok", f"{name} is {address}")


def clock() -> Check:
    """The time, and whether a time service keeps it: object stores refuse requests from another time."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    ask = getattr(ctypes.CDLL(None), "ntp_gettime", None)  # musl has none
    state = ask(ctypes.create_string_buffer(256)) if ask else -1  # larger than its struct on any machine
    if state < 0:  # as where a container's seccomp profile forbids it
        return Check("clock", "ok", f"{now}; whether a time service keeps it cannot be asked here")
    if state == _UNSYNCHRONISED:
        remedy = "start chronyd or systemd-timesyncd: S3 refuses a clock that is 15 minutes wrong"
        return Check("clock", "warn", f"{now}, and no time service keeps it", remedy)
    return Check("clock", "ok", f"{now}, kept by a time service")


def _unwriteable(folder: Path) -> str | None:
    """Why nothing can be written into a folder; None where it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None
