from __future__ import annotations

import io
import random
import uuid

import av
import fsspec
import pytest

from data_prep.remote import remote_file
from data_prep.remote.remote_file import BLOCK, RemoteFile
from tests.fixtures.made_media import write_media


@pytest.fixture
def url():
    return f"memory://{uuid.uuid4().hex}/clip.mp4"


def put(url: str, data: bytes) -> str:
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(path, data)
    return url


def test_it_reads_and_seeks_as_a_local_file_does(url, monkeypatch):
    monkeypatch.setattr(remote_file, "BLOCK", 1000)
    data = random.Random(0).randbytes(25_300)
    remote, local = RemoteFile(put(url, data)), io.BytesIO(data)
    draw = random.Random(1)
    for _ in range(300):
        whence = draw.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
        offset = draw.randrange(-25_300, 1) if whence == io.SEEK_END else draw.randrange(0, 900)
        assert remote.seek(offset, whence) == local.seek(offset, whence) == remote.tell()
        count = draw.choice([0, 1, 700, 5000])
        got = remote.read(count)
        assert got == data[local.tell() : local.tell() + len(got)] and (len(got) > 0 or count == 0 or local.tell() >= len(data))
        local.seek(len(got), io.SEEK_CUR)
    remote.seek(0)
    assert remote.read() == data and remote.read(5) == b"" and remote.size == len(data)
    assert len(remote._blocks) <= 8
    with pytest.raises(ValueError, match="cannot go 1 bytes before the beginning"):
        remote.seek(-1)


def test_only_the_blocks_that_are_read_travel(url):
    with RemoteFile(put(url, bytes(5 * BLOCK) + b"end")) as file:
        for place in (0, 10, 5 * BLOCK, 5, 5 * BLOCK + 1):
            file.seek(place)
            assert file.read(2) == (b"\0\0" if place < 11 else b"end"[place % BLOCK :][:2])
        assert {number: len(block) for number, block in file._blocks.items()} == {0: BLOCK, 5: 3}


def test_decoders_read_it(url, tmp_path):
    path = write_media(tmp_path / "clip.mp4", audio="aac")
    with RemoteFile(put(url, path.read_bytes())) as file, av.open(file) as media:
        assert sum(1 for _ in media.decode(video=0)) == 50


def test_it_must_be_there_and_open_without_credentials(url):
    with pytest.raises(FileNotFoundError):
        RemoteFile(url)
    assert str(RemoteFile(put(url, b"x"))) == url
    with pytest.raises(ValueError, match=r"s3://\*\*\*@bucket/a.mp4: holds credentials") as caught:
        RemoteFile("s3://AKIA:hidden@bucket/a.mp4")
    assert "hidden" not in str(caught.value)
