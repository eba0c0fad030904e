"""No clip of a video that is evaluated on reaches a training manifest, whichever list names it and whichever data set it comes in."""

import json
import tracemalloc

import pytest

from data_prep.exclusion import ExcludedVideos, youtube_id
from data_prep.manifest import ManifestRow, write_manifest
from data_prep.readers.rejects import ReaderError

SHARED, DASH, OTHER = "aB3dE-gHi_k", "-_0PQM4-hqg", "zzzzzzzzzzZ"


def row(video_id, dataset="audioset", split="train", source=None, start=0):
    extra = {} if source else {"video_id": video_id}
    source = source or f"/media/{video_id}.mp4"
    return ManifestRow(key=f"{dataset}_{video_id}_{start}", dataset=dataset, split=split, source=source, extra=extra)


def kept(guard, *rows):
    return [clip.key for clip in guard.apply(rows)]


@pytest.fixture
def vggsound(tmp_path):
    path = tmp_path / "vggsound.csv"
    path.write_text(
        f'{DASH},1,people marching,test\n{SHARED},30,"railroad car, train wagon",test\n{OTHER},20,"bird chirping, tweeting",train\n'
    )
    return path


def test_audioset_clips_of_vggsounds_test_videos_are_dropped_and_counted(vggsound, tmp_path):
    (tmp_path / "eval_segments.csv").write_text(
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=1, num_segs=1\n# YTID, start_seconds, end_seconds, positive_labels\n"
        f'{DASH}, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
    )
    guard = ExcludedVideos.read([vggsound, tmp_path / "eval_segments.csv"])
    rows = [row(SHARED), row(SHARED, start=10), row(DASH), row(OTHER), row(DASH, "vggsound"), row(SHARED, "vggsound", "test")]
    assert kept(guard, *rows) == [f"audioset_{OTHER}_0", f"vggsound_{SHARED}_0"]
    assert guard.report() == (
        "dropped 4 of 6 clips whose video is excluded: vggsound.csv 4, eval_segments.csv 2 (audioset: 3 of 4; vggsound: 1 of 2)"
    )


@pytest.mark.parametrize(
    "line",
    [
        DASH,
        f"https://www.youtube.com/watch?v={DASH}",
        f"http://youtube.com/watch?list=x&v={DASH}&t=30",
        f"https://youtu.be/{DASH}?t=5",
        f"https://www.youtube.com/shorts/{DASH}",
        f"{DASH}_000030",
        f"{DASH}_000030.mp4,playing hammond organ",
        f"{DASH}_30000_40000.webm",
        f"vggsound_{DASH}_30000",
        f"test/Y{DASH}.wav",
        f"Marching band [{DASH}].mkv",
        f"{DASH}\tplaying, hammond organ",
        f'"{DASH}",Train',
        f"id,label\n{DASH},dog",
        f"# held out\n\n{DASH}",
        f"videoID,url,timestamp\n{DASH},https://www.youtube.com/watch?v={DASH},\"[['0:00:01.000', '0:00:02.000']]\"",
    ],
)
def test_lists_of_every_form(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"{line}\n")
    guard = ExcludedVideos.read([tmp_path / "list.txt"])
    assert kept(guard, row(DASH), row(OTHER), row(SHARED)) == [f"audioset_{OTHER}_0", f"audioset_{SHARED}_0"]


@pytest.mark.parametrize("text", ["short", "https://example.org/a.mp4", "twelve_chars", f"{DASH}x.mp4", f"https://youtu.be/{DASH}x", ""])
def test_what_holds_no_id(text):
    assert youtube_id(text) is None


def test_a_line_without_an_id_is_refused_rather_than_leaked(tmp_path):
    (tmp_path / "list.txt").write_text(f"{DASH}\nnot a video\n")
    with pytest.raises(ReaderError, match=r"list.txt:2: 'not a video' names no video"):
        ExcludedVideos.read([tmp_path / "list.txt"])


def test_a_manifest_gives_its_evaluation_rows(tmp_path):
    write_manifest([row(SHARED, split="test"), row(DASH, split="heldout"), row(OTHER)], tmp_path / "m.parquet")
    rows = [row(video, "panda70m", split) for video in (SHARED, DASH, OTHER) for split in ("train", "val")]
    guard = ExcludedVideos.read([tmp_path / "m.parquet"])
    assert [(clip.extra["video_id"], clip.split) for clip in guard.apply(rows)] == [
        (SHARED, "val"), (DASH, "val"), (OTHER, "train"), (OTHER, "val"),
    ]  # fmt: skip
    everything = ExcludedVideos.read([f"{tmp_path}/m.parquet:all"])
    assert kept(everything, *rows) == [] and "6 of 6" in everything.report()


def test_lists_without_evaluation_rows_are_refused(tmp_path, vggsound):
    write_manifest([row(SHARED)], tmp_path / "train.parquet")
    with pytest.raises(ReaderError, match="no row of an evaluation split.*train.parquet:all takes all its rows"):
        ExcludedVideos.read([tmp_path / "train.parquet"])
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ReaderError, match="empty.txt: no videos to exclude$"):
        ExcludedVideos.read([f"{tmp_path}/empty.txt:all"])
    with pytest.raises(ReaderError, match="gone.csv: cannot be read"):
        ExcludedVideos.read([tmp_path / "gone.csv"])


def test_training_on_vggss_and_evaluating_on_vggsound(tmp_path, vggsound):
    (tmp_path / "vggss.json").write_text(json.dumps([{"file": f"{DASH}_000001", "class": "people marching", "bbox": [[0, 0, 1, 1]]}]))
    clip = row(DASH, "vggss")
    guard = ExcludedVideos.read([vggsound])
    assert kept(guard, clip) == []
    assert "VGG-SS is a part of VGGSound's test split" in guard.report() and "--exclude vggss.json:all" in guard.report()

    tests = [row(DASH, "vggsound", "test"), row(SHARED, "vggsound", "test")]
    evaluation = list(ExcludedVideos.read([f"{tmp_path}/vggss.json:all"]).apply(tests))
    assert [clip.extra["video_id"] for clip in evaluation] == [SHARED]
    write_manifest(evaluation, tmp_path / "test.parquet")
    assert kept(ExcludedVideos.read([tmp_path / "test.parquet"]), clip, row(SHARED, "vggss")) == [clip.key]
    assert kept(ExcludedVideos.read([tmp_path / "vggss.json"]), row(DASH), row(DASH, split="test", start=1)) == [f"audioset_{DASH}_1"]


def test_json_that_is_no_list_of_clips(tmp_path):
    for text, message in (("{", "cannot be read as JSON"), ("{}", "holds no list"), ('[{"file": 3}]', r"\[0\]: '3' names no video")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ReaderError, match=message):
            ExcludedVideos.read([tmp_path / "x.json"])


def test_clips_without_a_stated_video_are_known_by_their_file(tmp_path):
    held_out = [
        row("1", "mine", "heldout", source="/mine/clip_000001.mp4"),
        row("2", "mine", "heldout", source=f"/mine/{SHARED}_000030.mp4"),
        row("3", "mine", "heldout", source=f"https://www.youtube.com/watch?v={DASH}"),
    ]
    write_manifest(held_out, tmp_path / "m.parquet")
    rows = [
        row("4", "mine", source="/mine/clip_000001.mp4"),
        row("5", "yours", source="/yours/clip_000001.mp4"),  # another video of a common name
        row("6", "yours", source=f"/yours/{SHARED}.mkv"),
        row(DASH),
    ]
    assert kept(ExcludedVideos.read([tmp_path / "m.parquet"]), *rows) == ["yours_5_0"]


def test_no_lists_drop_nothing():
    guard = ExcludedVideos.read([])
    assert kept(guard, row(DASH)) == [f"audioset_{DASH}_0"]
    assert guard.report() == "dropped 0 of 1 clips whose video is excluded: no list given (audioset: 0 of 1)"


def test_memory_of_thirty_bytes_a_video(tmp_path):
    count = 30_000
    (tmp_path / "ids.txt").write_text("".join(f"{number:011d}\n" for number in range(count)))
    tracemalloc.start()
    guard = ExcludedVideos.read([tmp_path / "ids.txt"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * count + 1e6
    numbers = [-1, 0, 5, count - 1, count, 7 * count]
    assert kept(guard, *(row(f"{number:011d}") for number in numbers)) == [f"audioset_{number:011d}_0" for number in (-1, count, 7 * count)]
