"""One finished tiny run for all tests that look at one."""

from types import SimpleNamespace

import pytest

from tests.fixtures.tiny_chain import command, finish, start, tiny_shards


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Shards, and a run of the whole chain over them: `.shards`, `.run`, `.output`."""
    folder = tmp_path_factory.mktemp("tiny")
    shards = tiny_shards(folder)
    output = finish(start(command(folder, shards)))
    return SimpleNamespace(folder=folder, shards=shards, run=folder / "run", output=output)
