"""Shards on a real S3 server behind a proxy that breaks requests: nothing lost, nothing twice, no credentials anywhere."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec.config
import pyarrow.parquet as pq
import pytest
import s3fs

from data_prep import storage
from data_prep.decoding import ClipDecoder
from data_prep.index import ShardSet, build_index
from data_prep.manifest import ManifestRow, write_manifest
from data_prep.prepare import index_shards, prepare_shards
from data_prep.remote.remote_file import RemoteFile
from data_prep.settings import PrepareConfig
from data_prep.shards import ShardWriter
from data_prep.storage import Folder
from data_prep.stream import ClipStream
from data_prep.transcoding.encode import ClipFormat
from data_prep.verification.verify import verify
from tests.fixtures.made_media import write_media
from tests.services.fault_proxy import Fault, FaultProxy
from tests.services.s3_server import s3_server

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CLIPS, PER_SHARD = 24, 4
SETTINGS = PrepareConfig(format=ClipFormat(short_side=32, sample_rate=8000, min_seconds=0.25), rows_per_shard=PER_SHARD)
# A stalled request is given up after a second or two, so that a test meets many of them.
TIMES = {"config_kwargs": {"read_timeout": 2, "connect_timeout": 2}}
WEATHER = [
    Fault("busy", 0.06), Fault("bare", 0.03), Fault("reset", 0.06), Fault("lost", 0.03), Fault("stall", 0.01, ("GET", "HEAD")),
    Fault("cut", 0.06, ("GET",)), Fault("short", 0.04, ("GET",)), Fault("slow", 0.05, ("GET",)), Fault("cut_upload", 0.06, ("PUT",)),
]  # fmt: skip
"""Three of ten reads and two of ten writes go wrong."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as server:
        yield server


@pytest.fixture
def proxy(server, monkeypatch):
    with FaultProxy(server.port, seed=1) as proxy:
        for name, value in environment(server, proxy).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "s3", TIMES)
        monkeypatch.setattr(storage, "_FIRST_WAIT", 0.05)
        s3fs.S3FileSystem.clear_instance_cache()  # a client keeps to the port of the proxy it was made for
        yield proxy


def environment(server, proxy):
    return {**server.environment(proxy.port), "FSSPEC_S3": json.dumps(TIMES)}


def contents(url):
    """Name -> bytes of the shards' files."""
    folder = Folder(url)
    return {name: folder.read(name) for name in folder.sizes() if name.startswith("shard-")}


@pytest.mark.parametrize("kind", ["busy", "bare", "reset", "lost", "cut", "short", "slow", "stall"])
def test_reads_survive(server, proxy, kind):
    data = random.Random(0).randbytes(40 << 20)
    server.filesystem().pipe_file("data/reads/long", data)
    folder = Folder("s3://data/reads")
    ranges = [("long", 30 << 20, (30 << 20) + 1000), ("long", 5, 100), ("long", (40 << 20) - 5, 50 << 20), ("long", 41 << 20, 42 << 20)]
    proxy.faults = [Fault(kind, methods=("GET",) if kind in ("cut", "short") else ("GET", "HEAD"), limit=2)]
    assert folder.read_ranges(ranges) == [data[start:stop] for _, start, stop in ranges]
    assert proxy.injected(kind) >= 2
    proxy.counts.clear()
    assert folder.read("long") == data and folder.sizes() == {"long": len(data)}
    with RemoteFile("s3://data/reads/long") as file:
        file.seek(39 << 20)
        assert file.read() == data[39 << 20 :]
    assert proxy.injected(kind) >= 2


@pytest.mark.parametrize("kind", ["busy", "bare", "reset", "lost", "cut_upload", "stall"])
def test_writes_survive(server, proxy, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(storage, "_SILENCE", 3.0)
    monkeypatch.setattr(storage, "_SLOWEST", 10e6)
    data = random.Random(kind).randbytes(40 << 20)
    (tmp_path / "local").write_bytes(data)
    folder = Folder(f"s3://data/writes-{kind}")
    for methods in (("PUT",), ("POST",)):
        proxy.faults = [Fault(kind, methods=methods, limit=2)]
        proxy.counts.clear()
        folder.upload(str(tmp_path / "local"), "long")
        assert proxy.injected(kind) == 2 or (kind, methods) == ("cut_upload", ("POST",))
    assert proxy.counts["PUT", "passed"] >= 3  # it went in parts
    proxy.faults = [Fault(kind, methods=("PUT",), limit=2)]
    folder.write("small", data[:1000])
    proxy.faults = []
    assert folder.read("long") == data and folder.read("small") == data[:1000]


def test_an_upload_whose_completion_was_not_heard_of_is_there_once(server, proxy, tmp_path):
    (tmp_path / "local").write_bytes(bytes(40 << 20))
    proxy.faults = [Fault("lost", methods=("POST",), limit=3, target="uploadId=")]
    folder = Folder("s3://data/unheard")
    folder.upload(str(tmp_path / "local"), "long")
    assert proxy.injected("lost") == 3 and folder.sizes() == {"long": 40 << 20}


FILL = """
import random, sys
from data_prep.shards import ShardWriter
with ShardWriter(sys.argv[1], 0) as writer:
    for i in range(4):
        writer.add(f"k-{i}", {"mp4": random.Random(i).randbytes(10 << 20)})
"""


def test_a_killed_upload_leaves_no_visible_object(server, proxy, tmp_path):
    def write(url):
        return subprocess.Popen([sys.executable, "-c", FILL, url], cwd=ROOT, env={**os.environ, **environment(server, proxy)})

    proxy.faults = [Fault("stall", methods=("PUT",), limit=1, target="partNumber=2")]
    process = write("s3://data/killed")
    wait_for(lambda: proxy.injected("stall") and proxy.counts["PUT", "passed"])
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert Folder("s3://data/killed").sizes() == {}
    for url in ("s3://data/killed", str(tmp_path / "local")):
        assert write(url).wait() == 0
    assert contents("s3://data/killed") == contents(tmp_path / "local")


@pytest.fixture(scope="module")
def collection(tmp_path_factory, server):
    """Media on S3 and on the disk, and a manifest whose sources are relative to either."""
    root = tmp_path_factory.mktemp("collection")
    for number in range(6):
        write_media(root / f"v{number}.mp4", audio="aac", size=(96, 64), fps=25 + number, seconds=1.6)
    spans = [(f"v{i % 6}.mp4", i // 6 * 0.4) for i in range(CLIPS)]
    rows = [
        ManifestRow(key=f"clip-{i}", dataset="made", source=source, start=start, end=start + 0.4) for i, (source, start) in enumerate(spans)
    ]
    write_manifest(rows, root / "manifest.parquet")
    filesystem = server.filesystem()
    for path in root.iterdir():
        filesystem.put_file(str(path), f"data/media/{path.name}")
    return root


PREPARE = """
import sys
from data_prep import storage
from data_prep.transcoding.encode import ClipFormat
from data_prep.prepare import prepare_shards
from data_prep.settings import PrepareConfig

if __name__ == "__main__":
    storage._FIRST_WAIT = 0.05
    settings = PrepareConfig(format=ClipFormat(short_side=32, sample_rate=8000, min_seconds=0.25), rows_per_shard=4, media_root="s3://data/media")
    task = tuple(map(int, sys.argv[2].split("/")))
    print(prepare_shards("s3://data/media/manifest.parquet", sys.argv[1], settings, task=task, workers=1))
"""


def test_preparation_killed_and_resumed_in_bad_weather_makes_the_local_shards(server, proxy, collection, tmp_path):
    local = tmp_path / "local"
    prepare_shards(collection / "manifest.parquet", local, with_root(str(collection)), workers=1)
    (tmp_path / "prepare.py").write_text(PREPARE)
    proxy.faults, url, pace = WEATHER, "s3://data/shards", random.Random(0)

    def start(task):
        log = open(tmp_path / "log", "ab")  # noqa: SIM115  the process writes to it
        command = [sys.executable, str(tmp_path / "prepare.py"), url, task]
        env = {**os.environ, **environment(server, proxy), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)

    quiet, kills = server.filesystem(), 0
    for _ in range(3):  # each time both tasks, and one of them twice at once, die once another shard is there
        running, before = [start(task) for task in ("0/2", "1/2", "1/2")], visible(quiet)
        wait_for(lambda before=before: visible(quiet) > before or len(visible(quiet)) == CLIPS // PER_SHARD)
        time.sleep(pace.random())
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    for process in [start(task) for task in ("0/2", "1/2", "0/2")]:
        assert process.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    index_shards(url)
    assert proxy.injected() > 20
    assert contents(url) == contents(local) and len(contents(url)) == 2 * CLIPS // PER_SHARD
    assert list(verify(url, "s3://data/media/manifest.parquet")) == []
    read_all(url, local, proxy)
    assert server.secret not in (tmp_path / "log").read_text()


def with_root(root):
    return PrepareConfig(format=SETTINGS.format, rows_per_shard=PER_SHARD, media_root=root)


def visible(filesystem):
    """Names of the shards that exist."""
    filesystem.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        return {path for path in filesystem.ls("data/shards", detail=False) if path.endswith(".parquet")}
    return set()


def read_all(url, local, proxy):
    """Every clip once an epoch, with the contents that it has locally, in bad weather: in this process, and in two workers."""
    sets = {place: ShardSet.open(place) for place in (url, str(local))}
    streams = {place: ClipStream(shards, ClipDecoder(sample_rate=8000), batch_size=6, seed=5, window=2) for place, shards in sets.items()}
    for workers in (0, 2):
        keys, met = Counter(), proxy.injected()
        with contextlib.ExitStack() as stack:
            batches = [stack.enter_context(contextlib.closing(stream.batches(workers))) for stream in streams.values()]
            for remote, here in itertools.islice(zip(*batches, strict=True), 2 * CLIPS // 6):
                assert remote["key"] == here["key"]
                assert (remote["frames"] == here["frames"]).all() and (remote["waveform"] == here["waveform"]).all()
                keys.update(remote["key"])
        assert keys == {f"clip-{i}": 2 for i in range(CLIPS)} and proxy.injected() > met
    assert all(stream.bad == 0 for stream in streams.values())


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_set_is_read_in_worker_processes_under_faults(server, proxy, tmp_path):
    for url in ("s3://data/made", str(tmp_path)):
        for number in range(3):
            with ShardWriter(url, number) as writer:
                for i in range(10):
                    writer.add(f"k-{number}-{i}", {"bin": random.Random(i).randbytes(5000)})
        build_index(url, {})
    proxy.faults = WEATHER
    assert list(verify("s3://data/made")) == []
    remote, local = ShardSet.open("s3://data/made"), ShardSet.open(tmp_path)
    assert remote.hash == local.hash
    for place in itertools.product(range(3), range(10)):
        assert remote.read(*place) == local.read(*place)
    assert proxy.injected() > 5


def test_credentials_are_in_no_file_and_no_log(server, proxy, collection, tmp_path):
    """Sources with each kind of credentials, good and bad ones, through the command line, with every file and line searched."""
    signed = server.filesystem().sign("data/media/v0.mp4", expiration=3600)
    assert (signature := signed.split("Signature=")[1].split("&")[0])
    port, password = proxy.port, "hunter2secret"
    sources = {
        "good": "s3://data/media/v1.mp4",
        "signed": signed,
        "forged": signed.replace("v0.mp4", "v1.mp4"),
        "gone": signed.replace("v0.mp4", "absent.mp4"),
        "keyed": f"s3://{server.key}:{server.secret}@data/media/v1.mp4",
        "named": f"http://{server.key}:{password}@127.0.0.1:{port}/data/media/v1.mp4",
        "nowhere": f"http://user:{password}@127.0.0.1:9/a.mp4?X-Amz-Signature={signature}",
    }
    rows = [ManifestRow(key=key, dataset="made", source=source, end=0.4, extra={"page": source}) for key, source in sources.items()]
    write_manifest(rows, tmp_path / "manifest.parquet")
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-m", "launch.cli", "prep", "shards", str(tmp_path / "manifest.parquet"), str(out), "--workers", "1",
         "format.short_side=32", "format.sample_rate=8000", "format.min_seconds=0.25", "rows_per_shard=4", "clip_timeout=60"],
        cwd=ROOT, env={**os.environ, **environment(server, proxy)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    refused = subprocess.run(
        [sys.executable, "-m", "launch.cli", "prep", "stats", f"s3://{server.key}:{server.secret}@data/shards"],
        cwd=ROOT, env={**os.environ, **environment(server, proxy)}, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode != 0 and "holds credentials" in " ".join((refused.stdout + refused.stderr).split())
    tables = [row for path in out.glob("shard-*.parquet") for row in pq.read_table(path).to_pylist()]
    outcomes = {row["key"]: row["status"] for row in tables}
    assert outcomes == {key: "ok" if key in ("good", "signed") else "failed" for key in sources}
    told = [run.stdout, run.stderr, refused.stdout, refused.stderr, repr(tables)]
    told += [path.read_bytes().decode("latin-1") for path in out.iterdir() if path.suffix != ".parquet"]
    for hidden in (server.secret, password, signature, server.key):
        assert [hidden in text for text in told] == [False] * len(told)
