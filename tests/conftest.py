"""Settings of the whole suite."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A first call may import or build tables; how long an example takes says nothing about whether it is right.
settings.register_profile("foleyscale", deadline=None)
settings.load_profile("foleyscale")


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items):
    """With `--dist loadgroup` a file stays on one worker, for the sake of its fixtures; a machine has one SLURM."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slurm" if "cluster" in item.fixturenames else item.path.name))
