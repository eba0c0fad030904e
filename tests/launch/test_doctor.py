"""The doctor: on this machine, on machines that lack something, and on data that is or is not within reach."""

import json
import resource
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from data_prep.storage import Folder
from launch.doctor import devices, examine, looked, media, report, system
from launch.doctor.check import Check, size

NAMES = ["python", "host", "torch", "GPU", "bf16", "NCCL", "InfiniBand", "DeepSpeed", "attention", "codecs", "decoders", "processes",
         "open files", "shared memory", "disk", "caches", "host name", "clock"]  # fmt: skip
FEW = """
import resource
from launch.doctor.system import open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 2000))
print(open_files())
"""


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "shard-000000.tar").write_bytes(b"1")
    return examine(folder / "run", str(folder))


def test_every_check_has_its_line(checks):
    assert [check.name for check in checks] == [*NAMES, "data"]
    lines = report(checks).splitlines()
    assert len(lines) == len(checks) + 1
    assert all("\n" not in str(check) and check.status in ("ok", "warn", "fail") for check in checks)
    assert lines[-1].endswith(", 0 to mend")


def test_this_machine_can_train(checks):
    found = {check.name: check for check in checks}
    assert [name for name in NAMES if found[name].status == "fail"] == []
    assert found["DeepSpeed"].found.endswith(" on cpu") and found["processes"].found == "fork, forkserver and spawn"
    assert "libx264, flac, aac" in found["codecs"].found and "pyav" in found["decoders"].found
    assert found["data"].status == "ok" and found["data"].found.startswith("1 files in ")


def test_what_is_not_ok_says_what_to_do(checks):
    assert all(check.remedy for check in checks if check.status == "fail" or (check.status == "warn" and check.name != "decoders"))


def test_json_holds_the_same(checks):
    assert [Check(**each) for each in json.loads(report(checks, as_json=True))] == checks


def test_a_library_that_raises_is_a_finding_and_hides_what_opens_a_store():
    def broken():
        raise OSError("libcudart.so.13: cannot open\n https://user:word@example.org/x")

    assert str(looked("DeepSpeed", broken)) == (
        "fail  DeepSpeed      OSError: libcudart.so.13: cannot open https://***@example.org/x; install again what this names")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = system.disk(Path("/proc/1/runs"))
    assert found.status == "fail" and found.found.startswith("/proc/1")
    assert system.disk(tmp_path / "not" / "there" / "yet").found.endswith(f"free in {tmp_path}")


@pytest.mark.parametrize(("free", "status"), [(1 << 29, "fail"), (10 << 30, "warn"), (30 << 30, "ok")])
def test_room_on_the_disk(tmp_path, monkeypatch, free, status):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(system.shutil, "disk_usage", lambda _: usage(1 << 40, 0, free))
    assert system.disk(tmp_path).status == status


def test_little_shared_memory_matters_to_several_gpus(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(system.shutil, "disk_usage", lambda _: usage(64 << 20, 0, 64 << 20))
    for count, status in ((0, "ok"), (1, "ok"), (8, "warn")):
        monkeypatch.setattr(system, "gpus", lambda count=count: count)
        assert system.shared_memory().status == status
    assert "--shm-size" in system.shared_memory().remedy


def test_few_open_files():
    said = subprocess.run([sys.executable, "-c", FEW], capture_output=True, text=True, check=True).stdout.strip()
    assert said == "warn  open files     1000 may be open at once; ulimit -n 2000"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 1000


def test_a_host_name_without_an_address(monkeypatch):
    monkeypatch.setattr(system.socket, "gethostname", lambda: "nowhere.invalid")
    assert system.host_name().status == "warn"


def test_a_clock_that_nobody_keeps_is_told():
    found = system.clock()
    assert found.found.startswith(time.strftime("%Y-%m-%d", time.gmtime())) and (found.status == "warn") == ("and no time" in found.found)


def test_a_clock_that_cannot_be_asked_about_is_not_said_to_be_kept(monkeypatch):
    monkeypatch.setattr(system.ctypes, "CDLL", lambda _: object())  # a C library without ntp_gettime
    assert (system.clock().status, "cannot be asked" in system.clock().found) == ("ok", True)


def test_a_home_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("HOME", "/proc/1")
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert system.caches().status == "warn" and "/proc/1" in system.caches().found


def test_a_codec_that_is_not_there(monkeypatch):
    monkeypatch.setattr(media, "_ENCODERS", ("libx264", "no_such_codec"))
    assert (media.codecs().status, "no_such_codec" in media.codecs().found) == ("fail", True)


def test_a_build_of_torch_without_the_gpu_that_is_here(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(devices.Path, "glob", lambda *_: iter([tmp_path / "nvidia0"]))
    assert str(devices.gpu()).startswith("fail  GPU            1 here (driver ")


def test_a_wrong_accelerator_is_told(monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: 8)
    found = devices.deepspeed()
    assert found.status == "fail" and found.remedy == "unset DS_ACCELERATOR"


def test_data_out_of_reach(tmp_path, monkeypatch):
    assert media.data(str(tmp_path / "nothing")).status == "warn"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    found = media.data("s3://bucket/shards")
    assert found.status == "fail" and "credentials" in found.found and "AWS_ACCESS_KEY_ID" in found.remedy
    monkeypatch.setattr(media, "_URL_SECONDS", 0.1)
    monkeypatch.setattr(Folder, "sizes", lambda _: time.sleep(1))
    assert media.data("s3://bucket/shards").found == "s3://bucket/shards: no answer within 0.1 s"


@pytest.mark.parametrize(("count", "text"), [(64 << 20, "64 MiB"), (3 << 29, "1.5 GiB"), (141 << 30, "141 GiB")])
def test_sizes(count, text):
    assert size(count) == text
