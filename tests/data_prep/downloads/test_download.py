import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.downloads.download import DownloadConfig, Downloader, file_name
from data_prep.media import ClipFormat, decode_audio, transcode
from data_prep.transcoding.container import ClipError, probe
from tests.fixtures.made_media import decode_frames, numbers, tick_times, write_media
from tests.services.http_server import Answer, web_server

pytest.importorskip("yt_dlp")

ROOT = Path(__file__).parents[3]
PAGE = b"<!DOCTYPE html><html><head><title>Sorry</title></head><body>Not here.</body></html>"
FETCH = """
import json, sys
from data_prep.downloads.download import DownloadConfig, Downloader
print(Downloader(DownloadConfig(**json.loads(sys.argv[1]))).fetch(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """The bytes of a real mp4 of 2 s, 140 kB."""
    path = write_media(tmp_path_factory.mktemp("video") / "a.mp4", audio="aac", size=(320, 240), options={"movflags": "faststart"})
    return path.read_bytes() + bytes(100_000)  # a trailing box is no part of the film, and a long download to interrupt


@pytest.fixture
def web():
    with web_server() as server:
        yield server


def config(path, **fields):
    return DownloadConfig(**{"folder": str(path), "pause": 0.0, "retries": 0, "timeout": 5.0, "time_limit": 30.0, **fields})


def fetch(folder, url, **fields):
    return Downloader(config(folder, **fields)).fetch(url)


def failure(folder, url, **fields):
    with pytest.raises(ClipError) as caught:
        fetch(folder, url, **fields)
    return caught.value


def started(folder, url, **fields):
    arguments = json.dumps({"folder": str(folder), "pause": 0.0, **fields})
    return subprocess.Popen([sys.executable, "-c", FETCH, arguments, url], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".turn")


def wait_for(ready, seconds=20.0):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_video_comes_once_and_is_the_same_to_the_byte(tmp_path, web, video, capfd):
    url = web.serve("/a.mp4", Answer(video))
    path = fetch(tmp_path, url)
    asked = len(web.requests)
    assert path.read_bytes() == video and path.suffix == ".mp4" and probe(path).duration == pytest.approx(2.0, abs=0.05)
    assert fetch(tmp_path, url) == path and len(web.requests) == asked == 2  # one asks for the type, one downloads
    assert names(tmp_path) == sorted([path.name, f"{path.stem}.json"])
    path.write_bytes(video[:1000])
    assert fetch(tmp_path, url).read_bytes() == video
    assert capfd.readouterr() == ("", "")


def test_a_redirect_leads_to_the_video(tmp_path, web, video):
    web.serve("/far.mp4", Answer(video))
    url = web.serve("/near", Answer(status=302, headers={"Location": "/far.mp4?Signature=secret"}))
    assert fetch(tmp_path, url).read_bytes() == video
    assert "secret" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(status=404), "removed"),
        (Answer(status=410), "removed"),
        (Answer(status=401), "restricted"),
        (Answer(status=403), "blocked"),
        (Answer(status=429), "blocked"),
        (Answer(status=503), "network"),
        (Answer(PAGE, headers={"Content-Type": "text/html"}), "not_media"),
        (Answer(PAGE.replace(b"Not", b"<video src='/a.mp4'></video>"), headers={"Content-Type": "text/html"}), "not_media"),
        (Answer(PAGE), "not_media"),
        (Answer(b"\0" * 50_000), "not_media"),
    ],
)
def test_what_is_no_video_says_why_and_is_not_asked_for_again(tmp_path, web, video, answer, reason):
    web.serve("/a.mp4", Answer(video))
    url = web.serve("/clip.mp4?Signature=secret&v=1", answer)
    error = failure(tmp_path, url)
    assert error.reason == reason and "\n" not in str(error)
    assert str(error).startswith(f"http://127.0.0.1:{web.port}/clip.mp4?Signature=***&v=1: ")
    asked = len(web.requests)
    again = failure(tmp_path, url)
    assert (again.reason, str(again), len(web.requests)) == (reason, str(error), asked)
    record = tmp_path / f"{file_name(url)}.json"
    assert names(tmp_path) == [record.name]
    assert "secret" not in str(error) + record.read_text()


@pytest.mark.parametrize(("reason", "status", "hours"), [("removed", 404, 1e5), ("not_media", 200, 24), ("blocked", 403, 1 / 6)])
def test_failures_are_remembered_as_long_as_they_tend_to_last(tmp_path, web, video, reason, status, hours):
    url = web.serve("/a.mp4", Answer(PAGE, status=status, headers={"Content-Type": "text/html"}))
    assert failure(tmp_path, url).reason == reason
    web.serve("/a.mp4", Answer(video))
    record = tmp_path / f"{file_name(url)}.json"
    told = json.loads(record.read_text())
    record.write_text(json.dumps(told | {"asked": time.time() - 3600 * hours + 60}))
    assert failure(tmp_path, url).reason == reason
    record.write_text(json.dumps(told | {"asked": time.time() - 3600 * hours - 60}))
    if reason == "removed":
        assert failure(tmp_path, url).reason == reason
        record.unlink()
    assert fetch(tmp_path, url).read_bytes() == video


def test_addresses_where_nobody_answers_are_network_errors(tmp_path, web):
    url = web.serve("/a.mp4", Answer())
    assert failure(tmp_path / "a", "http://127.0.0.1:1/a.mp4").reason == "network"
    assert failure(tmp_path / "b", "http://no-such-host.invalid/a.mp4").reason == "network"
    silent = web.serve("/a.mp4", Answer(b"x", headers={"Content-Length": "1000"}, bytes_per_second=1000))
    assert silent == url and failure(tmp_path / "c", url, timeout=0.3).reason == "network"


@pytest.mark.parametrize("first", [Answer(status=429, headers={"Retry-After": "1"}), Answer(status=500)])
def test_passing_failures_are_tried_again(tmp_path, web, video, first):
    began = time.monotonic()
    assert fetch(tmp_path, web.serve("/a.mp4", first, Answer(video)), retries=1).read_bytes() == video
    assert time.monotonic() - began > (1.0 if first.status == 429 else 0.25)
    assert failure(tmp_path, web.serve("/b.mp4", first, Answer(video)), retries=0).reason in ("blocked", "network")


def test_a_reset_in_mid_body_is_resumed_where_it_broke_off(tmp_path, web, video):
    url = web.serve("/a.mp4", Answer(video), Answer(video, reset_after=80_000), Answer(video))
    assert fetch(tmp_path, url, retries=1).read_bytes() == video
    ranges = [int(request.headers["Range"][6:-1]) for request in web.requests if "Range" in request.headers]
    assert len(ranges) == 1 and 0 < ranges[0] <= 80_000
    stuck = web.serve("/b.mp4", Answer(video, reset_after=80_000))
    assert failure(tmp_path, stuck).reason == "network" and not list(tmp_path.glob(f"{file_name(stuck)}.mp4*"))


def test_halves_of_different_versions_are_never_put_together(tmp_path, web, video):
    other = video[:-100_000] + b"\1" * 100_000
    dates = ["Thu, 02 Jan 2020 00:00:00 GMT", ""]
    for number, date in enumerate(dates):
        broken = Answer(video, reset_after=80_000, headers={"Last-Modified": "" if not date else "Wed, 01 Jan 2020 00:00:00 GMT"})
        whole = Answer(other, headers={"Last-Modified": date})
        url = web.serve(f"/{number}.mp4", broken, broken, whole)
        assert failure(tmp_path, url).reason == "network"
        (tmp_path / f"{file_name(url)}.json").unlink()
        assert fetch(tmp_path, url).read_bytes() == other


def test_a_killed_download_is_finished_by_the_next(tmp_path, web, video):
    url = web.serve("/a.mp4", Answer(video), Answer(video, bytes_per_second=40_000))
    killed = started(tmp_path, url)
    part = tmp_path / f".{file_name(url)}"
    wait_for(lambda: sum(path.stat().st_size for path in part.glob("*.part")) > 20_000)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert names(tmp_path) == [part.name]
    web.serve("/a.mp4", Answer(video))
    path = fetch(tmp_path, url)
    assert path.read_bytes() == video and len(names(tmp_path)) == 2
    assert int(web.requests[-1].headers["Range"][6:-1]) > 20_000 - 8192


def test_processes_that_want_the_same_video_download_it_once(tmp_path, web, video):
    url = web.serve("/a.mp4", Answer(video), Answer(video, bytes_per_second=200_000))
    processes = [started(tmp_path, url) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == video
    assert len(web.requests) == 2 and len(names(tmp_path)) == 2


def test_a_video_that_takes_too_long_goes_on_where_it_stopped(tmp_path, web, video):
    url = web.serve("/a.mp4", Answer(video), Answer(video, bytes_per_second=40_000))
    began = time.monotonic()
    error = failure(tmp_path, url, time_limit=1.5)
    assert error.reason == "too_slow" and "time_limit of 1.5 s" in str(error) and time.monotonic() - began < 10
    web.serve("/a.mp4", Answer(video))
    assert fetch(tmp_path, url).read_bytes() == video
    assert int(web.requests[-1].headers["Range"][6:-1]) > 0


def test_who_waits_for_another_process_waits_no_longer_than_the_limit(tmp_path, web, video):
    url = web.serve("/a.mp4", Answer(video), Answer(video, bytes_per_second=20_000))
    busy = started(tmp_path, url)
    try:
        wait_for(lambda: len(web.requests) == 2)
        error = failure(tmp_path, url, time_limit=0.5)
        assert error.reason == "too_slow" and "another process" in str(error)
    finally:
        busy.kill()
        busy.communicate()


def test_a_video_above_the_limit_is_not_downloaded(tmp_path, web, video):
    url = web.serve("/a.mp4", Answer(video))
    error = failure(tmp_path, url, max_megabytes=0.05)
    assert error.reason == "too_large" and "max_megabytes is 0.05" in str(error) and len(names(tmp_path)) == 1
    unknown = web.serve("/b.mp4", Answer(video, headers={"Content-Length": "", "Connection": "close"}))
    assert failure(tmp_path, unknown, max_megabytes=0.05).reason == "too_large"


def test_rate_and_pause_slow_downloads_down(tmp_path, web, video):
    began = time.monotonic()
    fetch(tmp_path, web.serve("/a.mp4", Answer(video)), rate_limit=2 * len(video))
    assert time.monotonic() - began > 0.35
    began = time.monotonic()
    for name in "bcd":  # objects of their own, as in three processes
        fetch(tmp_path, web.serve(f"/{name}.mp4", Answer(video)), pause=0.3)
    assert time.monotonic() - began > 2 * 0.15
    error = failure(tmp_path, web.serve("/e.mp4", Answer(video)), pause=100.0, time_limit=1.0)
    assert error.reason == "too_slow" and "shorter pause" in str(error)


def test_cookies_are_sent_and_left_as_they_are(tmp_path, web, video):
    cookies = tmp_path / "cookies.txt"
    cookies.write_text("# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\tsesame\n")
    before = cookies.read_bytes(), cookies.stat().st_mtime_ns
    url = web.serve("/a.mp4", Answer(status=401), Answer(video, headers={"Set-Cookie": "more=1; Path=/"}))
    assert failure(tmp_path / "videos", url).reason == "restricted"
    assert fetch(tmp_path / "videos", url, cookies=str(cookies)).read_bytes() == video  # a refusal without cookies says nothing about them
    assert [request.headers.get("Cookie", "").split("; ")[0] for request in web.requests] == ["", "session=sesame", "session=sesame"]
    assert (cookies.read_bytes(), cookies.stat().st_mtime_ns) == before
    refused = web.serve("/b.mp4", Answer(status=403))
    assert "sesame" not in str(failure(tmp_path / "videos", refused, cookies=str(cookies)))
    assert not any(b"sesame" in path.read_bytes() for path in (tmp_path / "videos").rglob("*") if path.is_file())


def test_separate_streams_are_joined_without_ffmpeg(tmp_path, web):
    both = write_media(tmp_path / "both.ts", audio="aac")
    pictures, sound = separated(both, "video", tmp_path / "v.ts"), separated(both, "audio", tmp_path / "s.ts")
    listing = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.0,\n{}\n#EXT-X-ENDLIST\n"
    media = '#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="a",NAME="a",URI="s.m3u8"\n'
    master = f'#EXTM3U\n{media}#EXT-X-STREAM-INF:BANDWIDTH=9000,RESOLUTION=64x48,CODECS="avc1.4d401f,mp4a.40.2",AUDIO="a"\nv.m3u8\n'
    kind = {"Content-Type": "application/vnd.apple.mpegurl"}
    for name, part in {"v": pictures, "s": sound}.items():
        web.serve(f"/{name}.m3u8", Answer(listing.format(part.name).encode(), headers=kind))
        web.serve(f"/{part.name}", Answer(part.read_bytes()))
    path = fetch(tmp_path / "videos", web.serve("/all.m3u8", Answer(master.encode(), headers=kind)))
    form = ClipFormat(short_side=48, sample_rate=16000, crf=4)
    clip, never_apart = transcode(path, 0.0, 1.8, form), transcode(both, 0.0, 1.8, form)
    assert path.suffix == ".mkv" and numbers(decode_frames(clip.mp4)).tolist() == numbers(decode_frames(never_apart.mp4)).tolist()
    heard = tick_times(decode_audio(clip.flac), 16000, 3)
    assert np.abs(heard - tick_times(decode_audio(never_apart.flac), 16000, 3)).max() < 0.002
    web.serve("/s.ts", Answer(status=404))
    failure(tmp_path / "again", f"http://127.0.0.1:{web.port}/all.m3u8")
    assert not list((tmp_path / "again").glob("*.mkv"))  # a missing piece is no video with a hole


def separated(source, kind, out):
    with av.open(str(source)) as media, av.open(str(out), "w", options={"muxdelay": "0"}) as target:
        stream = next(stream for stream in media.streams if stream.type == kind)
        copy = target.add_stream_from_template(stream, opaque=True)
        for packet in media.demux(stream):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
    return out


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://www.youtube.com/watch?v=-abcdefghi_", "-abcdefghi_"),
        ("http://m.youtube.com/watch?list=x&v=abcdefghijk&t=3", "abcdefghijk"),
        ("https://youtu.be/abcdefghijk?t=1", "abcdefghijk"),
        ("https://www.youtube.com/shorts/abcdefghijk", "abcdefghijk"),
    ],
)
def test_videos_of_youtube_are_named_by_their_id(url, name):
    assert file_name(url) == name


@given(st.text(max_size=40), st.text(max_size=40))
def test_other_videos_have_names_of_their_own(a, b):
    urls = [f"https://example.org/{path}?v=abcdefghijk" for path in (a, b)]
    first, second = (file_name(url) for url in urls)
    assert (first == second) == (a == b) and len(first) == 32 and first.isalnum()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("folder", ""), ("folder", "s3://bucket/videos"), ("short_side", 0), ("rate_limit", 0), ("pause", -1.0),
        ("timeout", 0.0), ("time_limit", -1.0), ("retries", -1), ("max_megabytes", 0.0), ("time_limit", float("nan")),
    ],
)  # fmt: skip
def test_config_checks_its_fields(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"DownloadConfig.{field}"):
        config(tmp_path, **{field: value})


def test_what_is_missing_is_said_before_the_first_video(tmp_path):
    with pytest.raises(ValueError, match=r"cookies: .*absent.txt: No such file"):
        Downloader(config(tmp_path, cookies=str(tmp_path / "absent.txt")))
    (tmp_path / "cookies.json").write_text('{"session": "sesame"}')
    with pytest.raises(ValueError, match="Netscape format") as caught:
        Downloader(config(tmp_path, cookies=str(tmp_path / "cookies.json")))
    assert "sesame" not in str(caught.value)
    with pytest.raises(ValueError, match="DownloadConfig.folder"):
        Downloader(config(tmp_path / "cookies.json" / "videos"))


def test_ytdlp_is_asked_for_only_when_videos_are_downloaded(tmp_path):
    code = "import sys; from data_prep.downloads.download import *; assert 'yt_dlp' not in sys.modules; sys.modules['yt_dlp'] = None"
    code += f"\ntry: Downloader(DownloadConfig(folder={str(tmp_path)!r}))\nexcept ValueError as error: print(error)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install 'foleyscale[download]'" in told and told.count("\n") == 1
