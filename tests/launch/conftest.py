"""A SLURM for the tests that run jobs."""

import pytest

from tests.services.slurm_cluster import missing, slurm_cluster


@pytest.fixture(scope="session")
def cluster():
    if reason := missing():
        pytest.skip(reason)
    with slurm_cluster() as running:
        yield running


@pytest.fixture
def place(cluster, tmp_path, monkeypatch):
    """A working folder whose name has a space, from which jobs go to the cluster."""
    folder = tmp_path / "my project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    # Launched from inside a job, none of that job's variables may reach the new ones.
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "77")
    return folder
