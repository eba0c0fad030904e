import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.readers.locate import PROBES, Located, MediaLocator, Pattern, locate_rows
from data_prep.readers.rejects import ReaderError

CUT, WHOLE = "{id}_{start:06d}.mp4", "{id}.mp4"


def rows(count):
    return [{"id": f"video-{index:05d}", "split": "train", "start": index} for index in range(count)]


def touch(root, *names):
    for name in names:
        fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True).open().close()


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return tmp_path.as_posix() if request.param == "local" else f"memory://{tmp_path.name}"


def located(root, patterns, wanted):
    locator = MediaLocator(root, patterns)
    locator.choose(wanted)
    return locator, [locator.locate(row) for row in wanted]


def test_the_custom_in_use_is_found(root):
    touch(root, *(f"train/{row['id']}_{row['start']:06d}.mp4" for row in rows(5)[2:]))
    locator, found = located(f"{root}/", [WHOLE, CUT, "{split}/" + CUT], rows(5))
    assert [pattern.text for pattern in locator.patterns] == ["{split}/" + CUT]
    assert found == [Located(f"{root}/train/video-{i:05d}_{i:06d}.mp4", cut=True) for i in range(5)]


def test_several_customs_side_by_side(root):
    touch(root, *(f"{row['id']}.webm" for row in rows(3)), *(f"{row['id']}_{row['start']:06d}.mp4" for row in rows(10)[3:]))
    touch(root, "video-00003.mp4")
    locator, found = located(root, [WHOLE, "{id}.webm", CUT], rows(11))
    assert [pattern.text for pattern in locator.patterns] == [CUT, "{id}.webm"]
    assert [one.source.removeprefix(f"{root}/") for one in found] == [
        *(f"video-{i:05d}.webm" for i in range(3)),
        *(f"video-{i:05d}_{i:06d}.mp4" for i in range(3, 10)),
        "video-00010.webm",
    ]
    assert [one.cut for one in found] == [False] * 3 + [True] * 7 + [False]
    assert locator.locate_many(rows(11)) == found


def test_one_custom_needs_no_look(root):
    touch(root, *(f"{row['id']}.mp4" for row in rows(3)))
    locator = MediaLocator(root, [CUT, WHOLE])
    locator.choose(rows(3))
    assert locator.locate(rows(100)[-1]) == Located(f"{root}/video-00099.mp4", cut=False)


def test_only_the_first_rows_are_looked_for(root):
    touch(root, f"video-{PROBES:05d}.mp4")
    with pytest.raises(ReaderError, match=f"none of the first {PROBES} rows has a file .*/video-00000.mp4; tried .*--pattern"):
        located(root, [WHOLE, CUT], rows(PROBES + 1))


class Denied(MemoryFileSystem):
    """A store that refuses access."""

    protocol = "denied"

    def info(self, path, **kwargs):
        raise PermissionError(path)


def test_folders_and_refused_access_are_no_files():
    touch("memory://folders", "video-00000.mp4/inside")
    with pytest.raises(ReaderError, match="none of the first 1 rows"):
        located("memory://folders", [WHOLE], rows(1))
    fsspec.register_implementation("denied", Denied)
    with pytest.raises(PermissionError, match="video-00000.mp4"):
        located("denied://folders", [WHOLE], rows(1))


def test_local_roots_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "media/video-00000.mp4")
    assert located("media", [WHOLE], rows(1))[1] == [Located(f"{tmp_path}/media/video-00000.mp4", cut=False)]


@pytest.mark.parametrize(
    ("text", "name", "cut"),
    [(CUT, "a_000007.mp4", True), (WHOLE, "a.mp4", False), ("{split}/{id}.mkv", "test/a.mkv", False), ("cut:Y{id}.mp4", "Ya.mp4", True),
     ("whole:{start}/{id}.mp4", "7/a.mp4", False), ("{list}/{id}-{start}.mp4", "part/a-7.mp4", True),
     ("{shard:05d}/{row:07d}.mp4", "00003/0000312.mp4", False), ("{shard:05d}/{row:07d}_{start}.mp4", "00003/0000312_7.mp4", True)],
)  # fmt: skip
def test_patterns_tell_cut_files_from_whole_videos(text, name, cut):
    pattern = Pattern.parse(text)
    assert (pattern.name({"id": "a", "split": "test", "list": "part", "start": 7, "row": 312, "shard": 3}), pattern.cut) == (name, cut)


@pytest.mark.parametrize(
    "text", ["", "video.mp4", "{}.mp4", "{id.__class__}", "{id[0]}", "{id", "{id!x}.mp4", "{start:06d}.mp4", "{other}.mp4"]
)
def test_wrong_patterns_are_named(text):
    with pytest.raises(ReaderError, match="pattern"):
        Pattern.parse(text).name({"id": "a", "start": 0.5})


@pytest.mark.parametrize("value", ["../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\b", "a\0b"])
def test_no_value_leads_out_of_the_root(tmp_path, value):
    locator = MediaLocator(tmp_path, [WHOLE])
    for find in (locator.locate, lambda row: locator.choose([row])):
        with pytest.raises(ReaderError, match="id .* cannot be part of a file's name"):
            find({"id": value})


def test_span_in_cut_files_and_whole_videos():
    assert Located("a", cut=True).span(30.1, 40.0) == {"start": 0.0, "end": 9.9}
    assert Located("a", cut=False).span(30, 40) == {"start": 30.0, "end": 40.0}


def test_rows_are_located_in_order_as_they_come(root):
    count = 2 * PROBES + 3
    wanted = rows(count)
    touch(root, *(f"{row['id']}.mp4" for row in wanted[::2]), *(f"{row['id']}.mkv" for row in wanted[1::2]))
    pairs = ((row, row["start"]) for row in wanted)
    found = list(locate_rows(pairs, root, [CUT, WHOLE, "{id}.mkv"]))
    assert [number for _, number in found] == list(range(count))
    assert [one.source for one, _ in found] == [f"{root}/video-{i:05d}.{('mp4', 'mkv')[i % 2]}" for i in range(count)]
    assert list(locate_rows([], root, [CUT])) == []


def test_without_media_the_source_is_the_address():
    assert list(locate_rows([(rows(1)[0], "x")], None, [CUT])) == [(Located("https://www.youtube.com/watch?v=video-00000", False), "x")]


def test_a_root_may_not_hold_credentials():
    with pytest.raises(ValueError, match=r"s3://\*\*\*@bucket/videos: holds credentials") as error:
        MediaLocator("s3://AKID:hidden@bucket/videos", ["{id}.mp4"])
    assert "hidden" not in str(error.value)
