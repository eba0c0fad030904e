"""The image: its Dockerfile by the rules of hadolint, and built for real."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.image_builder import Container, ImageBuilder, missing

REPOSITORY = Path(__file__).resolve().parents[2]


def test_hadolint_finds_nothing():
    found = subprocess.run([Path(sys.executable).parent / "hadolint", REPOSITORY / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.fixture(scope="module")
def container(tmp_path_factory) -> Iterator[Container]:
    if why := missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("image")
    builder = ImageBuilder(folder)
    # The build gets its packages as it gets a mirror: from a pip.conf that comes as a secret.
    (folder / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    image = builder.build(REPOSITORY, "foleyscale", arguments={"BASE": builder.base("debian")},
                          secrets={"pip.conf": folder / "pip.conf"}, mounts={fetched(folder / "wheels"): "/wheels"})  # fmt: skip
    with builder.started(image) as made:
        yield made
    shutil.rmtree(folder)  # pytest would keep gigabytes


def fetched(folder: Path) -> Path:
    """All that pip installs in the image, fetched with the settings that pip has here."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-build-isolation", "--constraint", REPOSITORY / "constraints.txt"]
    wanted = ["torch", "numpy", "setuptools", "wheel", "packaging", "deepspeed", f"{REPOSITORY}[s3]"]
    subprocess.run([*pip, "--dest", folder, *wanted], env=os.environ | {"DS_BUILD_OPS": "0"}, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_runs_the_whole_chain_as_an_ordinary_user(container):
    config = container.builder.config("localhost/foleyscale")
    assert (config["Entrypoint"], config["User"], config["WorkingDir"]) == (["foleyscale"], "10001", "/work")
    assert container.run("id", "-u").strip() == "10001"
    said = container.run("foleyscale", "doctor")
    assert "0 to mend" in said and "DeepSpeed" in said
    said = container.run("foleyscale", "demo", "--smoke")
    assert "report: demo/smoke/run/report.html" in said
    assert int(container.run("stat", "--format=%s", "demo/smoke/run/report.html")) > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_holds_no_secret_and_nothing_of_the_build(container):
    assert container.run("sh", "-c", "ls /etc/pip.conf /src /dist 2>&1 || true").count("No such file") == 3
    assert container.run("ls", "-A", "/wheels") == ""  # where they were mounted
    environment = container.builder.config("localhost/foleyscale")["Env"]
    assert {line.partition("=")[0] for line in environment} == {"PATH", "HOME", "USER", "LANG"}
    assert "missing" in container.run("sh", "-c", "command -v g++ || echo missing")
