"""Images without Docker and without a registry: buildah in a chroot, on a base that debootstrap makes of Debian's packages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
"""Python of the interpreter that runs the tests -> Debian's suite with the same, so that wheels fetched here fit there."""


def missing() -> str:
    """Why no image can be built here; empty where one can."""
    if os.geteuid() != 0:
        return "building an image in a chroot needs root"
    if lacking := [name for name in ("buildah", "debootstrap") if not shutil.which(name)]:
        return f"{', '.join(lacking)} not installed (apt-get install buildah debootstrap)"
    return "" if sys.version_info[:2] in _SUITES else f"no Debian with Python {sys.version_info[0]}.{sys.version_info[1]} is known"


@dataclass(frozen=True)
class ImageBuilder:
    """Builds and runs images below `folder`, which is all that is written."""

    folder: Path

    def base(self, tag: str) -> str:
        """A bare Debian as an image; its name."""
        tree = self.folder / "debian"
        _run("debootstrap", "--variant=minbase", _SUITES[sys.version_info[:2]], str(tree))
        with self._container("scratch") as container:
            self._buildah("add", "--quiet", container, str(tree), "/")
            self._buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
            self._buildah("commit", "--quiet", container, f"localhost/{tag}")
        shutil.rmtree(tree)
        return f"localhost/{tag}"

    def build(self, context: Path, tag: str, arguments: Mapping[str, str], secrets: Mapping[str, Path], mounts: Mapping[Path, str]) -> str:
        """Build a folder's Dockerfile; the image's name. `mounts` are seen by its commands, read-only, and are in no layer."""
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        options += [f"--secret=id={name},src={path}" for name, path in secrets.items()]
        options += [f"--volume={path}:{inside}:ro" for path, inside in mounts.items()]
        self._buildah("build", "--isolation=chroot", "--pull-never", *options, f"--tag=localhost/{tag}", str(context))
        return f"localhost/{tag}"

    def config(self, image: str) -> dict:
        """The image's own settings: user, entry point, environment."""
        return json.loads(self._buildah("inspect", "--type=image", image))["OCIv1"]["config"]

    @contextlib.contextmanager
    def started(self, image: str) -> Iterator[Container]:
        """A container of an image; several commands may run in it, one after the other."""
        with self._container("--pull-never", image) as name:
            yield Container(self, name)

    @contextlib.contextmanager
    def _container(self, *image: str) -> Iterator[str]:
        name = self._buildah("from", *image).strip()
        try:
            yield name
        finally:
            self._buildah("rm", name)

    def _buildah(self, *arguments: str) -> str:
        return _run("buildah", f"--root={self.folder / 'root'}", f"--runroot={self.folder / 'run'}", *arguments)


@dataclass(frozen=True)
class Container:
    """A container that was made; nothing runs in it between the commands."""

    builder: ImageBuilder
    name: str

    def run(self, *command: str) -> str:
        """What a command says, as the image's user and in its folder; AssertionError with that where it fails."""
        return self.builder._buildah("run", "--isolation=chroot", self.name, "--", *command)


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}"
    return done.stdout
