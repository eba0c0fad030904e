from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import pickle
import threading
import time
import uuid
from collections import Counter

import fsspec
import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from data_prep import storage
from data_prep.remote.ranges import GAP, LARGEST
from data_prep.storage import Folder, StagedFile

DATA = bytes(range(256)) * 40


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    folder = Folder(tmp_path / "deep" if request.param == "local" else f"memory://{uuid.uuid4().hex}/deep")
    folder.write("a", DATA)
    return folder


def test_files_are_read_whole_and_in_ranges(folder):
    folder.write("b", b"")
    assert folder.read("a") == DATA and folder.read("b") == b"" and folder.size("a") == len(DATA)
    assert folder.read_range("a", 100, 300) == DATA[100:300]
    wanted = [("a", 10200, 20000), ("b", 0, 5), ("a", 0, 4), ("a", 70000, 70010), ("a", 5, 5), ("a", 2, 9)]
    assert folder.read_ranges(wanted) == [DATA[10200:], b"", DATA[:4], b"", b"", DATA[2:9]]
    assert folder.sizes() == {"a": len(DATA), "b": 0}
    for _ in range(2):
        folder.remove("b")
    assert folder.sizes() == {"a": len(DATA)} and Folder(f"{folder.url}/nowhere").sizes() == {}
    for call in (folder.read, folder.size, lambda name: folder.read_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError):
            call("absent")
    assert pickle.loads(pickle.dumps(folder)).read("a") == DATA


@pytest.mark.parametrize("url", ["/", "file:///"])
def test_the_root_is_no_other_folder(url):
    folder = Folder(url)
    assert (folder.root, folder.path("a")) == ("/", "/a") and folder.is_local
    assert set(folder.sizes()) == {name for name in os.listdir("/") if os.path.isfile(f"/{name}")}
    assert pickle.loads(pickle.dumps(folder)).root == "/"


def test_staged_files_appear_whole_or_not_at_all(folder):
    with StagedFile(folder, "c") as staged:
        staged.file.write(DATA)
        assert set(folder.sizes()) - {"a"} == (set() if not folder.is_local else {os.path.basename(staged.file.name)})
        staged.publish()
    with pytest.raises(KeyError), StagedFile(folder, "d") as staged:
        staged.file.write(DATA)
        raise KeyError
    assert folder.sizes() == {"a": len(DATA), "c": len(DATA)} and folder.read("c") == DATA


def test_files_of_killed_writers_are_removed_where_the_next_one_stages(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "staging"))
    place = tmp_path / ("deep" if folder.is_local else "staging")
    place.mkdir(exist_ok=True)
    (place / ".c.dead.tmp").write_bytes(b"half")
    os.utime(place / ".c.dead.tmp", (0, 0))
    (place / ".c.elsewhere.tmp").write_bytes(b"half")  # fresh: its writer may live on another machine, where its lock is not seen
    with open(place / ".c.living.tmp", "wb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        os.utime(place / ".c.living.tmp", (0, 0))
        with StagedFile(folder, "c"):
            pass
    assert sorted(path.name for path in place.glob(".*.tmp")) == [".c.elsewhere.tmp", ".c.living.tmp"]


def test_a_url_with_credentials_is_refused():
    with pytest.raises(ValueError, match=r"s3://\*\*\*@bucket/x: holds credentials"):
        Folder("s3://AKIA:secret@bucket/x")


class UnsteadyFileSystem(MemoryFileSystem):
    """Memory that meets each kind of call with the errors of a list before it answers."""

    protocol = "unsteady"
    errors: list[Exception | str] = []
    calls: Counter[str] = Counter()
    asked: list[tuple[int, int]] = []

    def _meet(self, call):
        type(self).calls[call] += 1
        if self.errors and isinstance(self.errors[0], Exception):
            raise self.errors.pop(0)
        return bool(self.errors) and self.errors.pop(0)

    def info(self, path, **kwargs):
        type(self).calls["info"] += 1
        return super().info(path, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.asked.append((start, end))
        short = self._meet("read")
        return super().cat_file(path, start, end, **kwargs)[: 7 if short else None]

    def pipe_file(self, path, value, **kwargs):
        self._meet("write")
        super().pipe_file(path, value, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        short = self._meet("upload")
        super().put_file(lpath, rpath, **kwargs)
        if short:
            super().pipe_file(rpath, b"half")

    def rm_file(self, path):
        self._meet("remove")
        super().rm_file(path)

    def ls(self, path, detail=True, **kwargs):
        self._meet("list")
        return super().ls(path, detail, **kwargs)


PASSING = [
    ConnectionResetError("reset"),
    OSError(errno.EBUSY, "SlowDown"),
    TimeoutError("stalled"),
    ClientPayloadError("half a body"),
    EndpointConnectionError(endpoint_url="http://host"),
]


@pytest.fixture
def unsteady(monkeypatch):
    fsspec.register_implementation("unsteady", UnsteadyFileSystem, clobber=True)
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.001)
    folder = Folder(f"unsteady://{uuid.uuid4().hex}")
    UnsteadyFileSystem.errors = []
    folder.write("a", DATA)
    monkeypatch.setattr(UnsteadyFileSystem, "calls", Counter())
    monkeypatch.setattr(UnsteadyFileSystem, "asked", [])

    def meet(*errors):
        UnsteadyFileSystem.errors = list(errors)

    return folder, meet


def test_waits_double_and_differ_between_processes(unsteady, monkeypatch):
    """All ranks meet a store that is busy at once: they must not come back at once."""
    (folder, meet), waits = unsteady, []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    for _ in range(20):
        meet(*PASSING[:3])
        assert folder.read("a") == DATA
    assert len(waits) == 60 == len(set(waits))
    for attempt in range(3):
        shares = [wait / (storage._FIRST_WAIT * 2**attempt) for wait in waits[attempt::3]]
        assert 0.5 <= min(shares) < 0.8 < 1.2 < max(shares) <= 1.5


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_calls_that_fail_for_a_passing_reason_are_repeated(unsteady, tmp_path, error):
    folder, meet = unsteady
    (tmp_path / "local").write_bytes(DATA)
    calls = {
        "read": lambda: folder.read("a") == DATA,
        "write": lambda: folder.write("b", DATA) is None,
        "upload": lambda: folder.upload(str(tmp_path / "local"), "c") is None,
        "list": lambda: set(folder.sizes()) == {"a", "b", "c"},
        "remove": lambda: folder.remove("c") is None,
    }
    for name, call in calls.items():
        meet(*[error] * 4)
        assert call() and UnsteadyFileSystem.calls[name] == 5
        meet(*[error] * 5)
        with pytest.raises(type(error)):
            call()
    assert folder.read("b") == DATA and "c" not in folder.sizes()


@pytest.mark.parametrize("error", [PermissionError("no"), NoCredentialsError(), KeyError("bug")], ids=lambda error: type(error).__name__)
def test_calls_that_fail_for_good_are_not(unsteady, error):
    folder, meet = unsteady
    meet(error)
    with pytest.raises(type(error)):
        folder.read("a")
    assert UnsteadyFileSystem.calls["read"] == 1


def test_only_the_ranges_that_failed_are_read_again(unsteady, monkeypatch):
    folder, meet = unsteady
    folder.write("far", bytes(3 * GAP))
    ranges = [("far", 2 * GAP, 2 * GAP + 10), ("a", 300, 400), ("a", 10, 20), ("far", 0, 10)]
    # Requests go out in the order of files and bytes: a, far 0, far 2 * GAP. Short bodies count as failures.
    meet(None, ConnectionResetError(), "short", None, "short")
    assert folder.read_ranges(ranges) == [bytes(10), DATA[300:400], DATA[10:20], bytes(10)]
    first = [(10, 400), (0, 10), (2 * GAP, 2 * GAP + 10)]
    assert UnsteadyFileSystem.asked == first + first[1:] + first[2:]


def test_long_files_are_read_in_pieces(unsteady):
    folder, meet = unsteady
    data = os.urandom(2 * LARGEST + 5)
    folder.write("long", data)
    meet(None, "short")
    assert folder.read("long") == data
    pieces = [(0, LARGEST), (LARGEST, 2 * LARGEST), (2 * LARGEST, 2 * LARGEST + 5)]
    assert UnsteadyFileSystem.asked == [*pieces, pieces[1]]


def test_an_upload_is_checked_and_one_that_was_forgotten_is_made_again(unsteady, tmp_path):
    folder, meet = unsteady
    (tmp_path / "local").write_bytes(DATA)
    # Complete, but the answer was lost: the store then says that there is no such upload.
    meet("short", FileNotFoundError("NoSuchUpload"))
    folder.upload(str(tmp_path / "local"), "b")
    assert folder.read("b") == DATA and UnsteadyFileSystem.calls["upload"] == 3


class StallingFileSystem(AsyncFileSystem):
    """A store that never answers."""

    protocol = "stalling"
    asked = 0

    async def _info(self, path, **kwargs):
        type(self).asked += 1
        await asyncio.sleep(3600)


def test_a_store_that_stalls_does_not_hold_a_task_for_ever(monkeypatch):
    fsspec.register_implementation("stalling", StallingFileSystem, clobber=True)
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(storage, "_SILENCE", 0.05)
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        Folder("stalling://x").read("a")
    assert StallingFileSystem.asked == 5 and time.monotonic() - begin < 5


def test_threads_and_processes_have_connections_of_their_own(tmp_path):
    fsspec.register_implementation("unsteady", UnsteadyFileSystem, clobber=True)
    seen = [fsspec.core.url_to_fs("unsteady://x")[0]]
    thread = threading.Thread(target=lambda: seen.append(fsspec.core.url_to_fs("unsteady://x")[0]))
    thread.start()
    thread.join()
    assert seen[0] is not seen[1]
    child = os.fork()
    if not child:
        os._exit(0 if fsspec.core.url_to_fs("unsteady://x")[0] is not seen[0] else 1)
    assert os.waitpid(child, 0)[1] == 0
