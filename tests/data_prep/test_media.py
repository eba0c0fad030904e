import io
import weakref
from fractions import Fraction

import av
import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.media import ClipError, ClipFormat, decode_audio, loudness, mux, probe, read_video, transcode
from data_prep.transcoding.encode import as_rgb, encode_flac
from data_prep.transcoding.timeline import Painter, at_constant_rate, fit, mono, place
from tests.fixtures.made_media import TICKS, decode_frames, numbers, tick_times, ticking, write_media

FORMAT = ClipFormat(short_side=48, sample_rate=16000, crf=4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """25 fps and 48 kHz sound, 2 s."""
    return write_media(tmp_path_factory.mktemp("media") / "plain.mkv")


@pytest.fixture(scope="module")
def clip(plain):
    return transcode(str(plain), 0.0, None, FORMAT)


def nearest_ok(shown, fps, start, source_fps):
    times = start + np.arange(len(shown)) / fps
    return np.abs(shown / source_fps - times).max() <= 0.5 / source_fps + 1e-3


def test_clip_counts_and_measures(clip):
    frames, sound = decode_frames(clip.mp4), decode_audio(clip.flac)
    assert (clip.duration, clip.fps, clip.width, clip.height, clip.sample_rate, clip.channels) == (2.0, 25.0, 64, 48, 16000, 1)
    assert frames.shape == (50, 48, 64, 3) and frames.dtype == np.uint8
    assert numbers(frames).tolist() == list(range(50))
    assert sound.shape == (32000,) and sound.dtype == np.float32
    assert np.abs(tick_times(sound, 16000, 3) - TICKS).max() <= 1 / 16000
    assert clip.av_offset == 0.0 and clip.source_side == 48 and clip.source_fps == pytest.approx(25.0)
    assert clip.motion == pytest.approx(5 / 255, rel=0.1)


def test_equal_input_gives_equal_bytes(plain, clip):
    again = transcode(str(plain), 0.0, None, FORMAT)
    assert again.mp4 == clip.mp4 and again.flac == clip.flac
    assert transcode(plain.read_bytes(), 0.0, None, FORMAT).mp4 == clip.mp4


def test_key_frames_are_regular_and_no_frame_waits_for_a_later_one(clip):
    with av.open(io.BytesIO(clip.mp4)) as media:
        packets = [packet for packet in media.demux(video=0) if packet.size]
        assert not media.streams.audio
        assert media.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert [packet.pts for packet in packets] == [packet.dts for packet in packets]
    assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(("start", "count"), [(0, 1), (9, 2), (10, 5), (17, 16), (49, 1), (30, None)])
def test_any_part_of_a_clip_equals_that_part_of_the_whole(clip, start, count):
    stop = None if count is None else start + count
    assert np.array_equal(decode_frames(clip.mp4, start, count), decode_frames(clip.mp4)[start:stop])


@pytest.mark.parametrize(("start", "count"), [(0, 16000), (123, 4567), (31999, 1), (20000, None)])
def test_any_part_of_the_sound_equals_that_part_of_the_whole(clip, start, count):
    stop = None if count is None else start + count
    assert np.array_equal(decode_audio(clip.flac, start, count), decode_audio(clip.flac)[start:stop])


def test_sound_is_decoded_from_the_frame_before_the_range_on():
    """Exact to the sample wherever it begins, and without the bytes before it."""
    random = np.random.default_rng(0)
    loud, quiet = random.integers(-32768, 32767, 20 * 16000), random.normal(0, 3, 20 * 16000).cumsum().clip(-30000, 30000)
    for samples in (loud.astype(np.int16), quiet.astype(np.int16)):
        flac = encode_flac(samples, 16000)
        for start in (0, 1, 1151, 1152, 1153, 319_999, 317_211, *random.integers(0, 320_000, 50).tolist()):
            assert np.array_equal(decode_audio(flac, start, 1) * 32768, samples[start : start + 1])
        assert np.array_equal(decode_audio(flac, 170_001, 100_000) * 32768, samples[170_001:270_001])
    damaged = flac[:500] + bytes(len(flac) // 4) + flac[500 + len(flac) // 4 :]
    assert np.array_equal(decode_audio(damaged, 290_000, 20_000) * 32768, samples[290_000:310_000])


def test_more_than_the_clip_has_is_an_error(clip):
    for read in (lambda: decode_frames(clip.mp4, 45, 6), lambda: decode_frames(clip.mp4, 50), lambda: decode_audio(clip.flac, 31999, 2)):
        with pytest.raises(ClipError, match="wanted") as caught:
            read()
        assert caught.value.reason == "too_short"
    with pytest.raises(ClipError) as caught:
        decode_frames(clip.mp4[: len(clip.mp4) // 2])
    assert caught.value.reason == "undecodable"


@pytest.mark.parametrize("fps", [21.5, 24.0, 30000 / 1001, 60.0])
def test_other_rates_show_the_nearest_frame(tmp_path, fps):
    path = write_media(tmp_path / "a.mp4", fps=fps, seconds=0.8, audio=None)
    shown = numbers(read_video(str(path), 25.0))
    assert len(shown) == round(round(0.8 * fps) / fps * 25) and nearest_ok(shown, 25.0, 0.0, fps)


def test_variable_frame_rate_shows_what_is_on_screen(tmp_path):
    times = [0.0, 0.03, 0.1, 0.12, 0.9, 0.95, 1.0, 1.3, 1.9]
    path = write_media(tmp_path / "a.mkv", times, audio=None)
    shown = numbers(read_video(str(path), 25.0, 0.0, 1.9))
    for index, number in enumerate(shown):
        # On screen at some moment within half a frame of the time asked for; over long pauses within one.
        appears, goes = times[number], ([*times[1:], 2.0])[number]
        assert appears - 0.0401 <= index / 25 <= goes + 0.0201


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "mov"])
def test_a_cut_keeps_picture_and_sound_in_step_in_every_container(tmp_path, suffix):
    sound = {"mp4": "aac", "ts": "mp2"}.get(suffix, "pcm_s16le")
    path = write_media(tmp_path / f"a.{suffix}", audio=sound, codec="mpeg4" if suffix == "avi" else "libx264")
    clip = transcode(str(path), 0.72, 1.84, FORMAT)
    assert clip.duration == pytest.approx(1.12)
    assert np.abs(numbers(decode_frames(clip.mp4)) - np.arange(18, 46)).max() == 0
    heard = tick_times(decode_audio(clip.flac), 16000, 2)
    # The encoder of the sound in the ts starts 10 ms ahead, and with it the file.
    assert np.abs(heard - (np.array([1.0, 1.5]) - 0.72)).max() < (0.012 if suffix == "ts" else 0.002)


@pytest.mark.parametrize(("audio_start", "video_start"), [(0.4, 0.0), (0.0, 0.4), (1.2, 0.0)])
def test_offset_between_the_streams_is_honoured(tmp_path, audio_start, video_start):
    path = write_media(tmp_path / "a.mkv", audio_start=audio_start, video_start=video_start)
    clip = transcode(str(path), 0.0, 1.6, FORMAT)
    assert clip.av_offset == pytest.approx(audio_start - video_start, abs=0.001)
    shown = numbers(decode_frames(clip.mp4))
    assert shown.tolist() == [max(0, index - round(video_start * 25)) for index in range(40)]
    sound = decode_audio(clip.flac)
    assert len(sound) == 25600 and np.abs(sound[: max(0, round(audio_start * 16000) - 20)]).max(initial=0) < 1e-3
    expected = [tick for tick in TICKS if tick > audio_start]
    assert np.abs(tick_times(sound, 16000, len(expected)) - expected).max() <= 0.001


def test_files_that_do_not_begin_at_zero_are_counted_from_their_beginning(tmp_path):
    path, _ = write_media(tmp_path / "a.mkv"), write_media(tmp_path / "late.mkv", shift=7.0)
    late, plain = (transcode(str(name), 0.5, 1.5, FORMAT) for name in (tmp_path / "late.mkv", path))
    assert np.array_equal(decode_frames(late.mp4), decode_frames(plain.mp4))
    assert np.abs(decode_audio(late.flac) - decode_audio(plain.flac)).max() < 1e-3


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "7.1"])
@pytest.mark.parametrize("codec", ["pcm_s16le", "flac"])
def test_all_channels_alike_give_that_channel(tmp_path, layout, codec):
    path = write_media(tmp_path / "a.mkv", layout=layout, audio=codec, rate=44100)
    clip = transcode(str(path), 0.0, 1.6, ClipFormat(short_side=48, sample_rate=44100))
    assert clip.channels == {"mono": 1, "stereo": 2, "5.1": 6, "7.1": 8}[layout]
    assert np.abs(decode_audio(clip.flac) - ticking(1.6, 44100)).max() < 2e-4


@pytest.mark.parametrize(("format", "full"), [("u8", 127), ("u8p", 127), ("s16", 32767), ("s32", 2**31 - 1), ("fltp", 1.0), ("dbl", 1.0)])
def test_downmix_leaves_the_lfe_out_and_weighs_the_surround_less(format, full):
    kinds = {"u8": np.uint8, "u8p": np.uint8, "s16": np.int16, "s32": np.int32, "fltp": np.float32, "dbl": np.float64}
    weights = np.array([1, 1, 2**0.5, 0, 0.5**0.5, 0.5**0.5])
    for channel, weight in enumerate(weights / weights.sum()):
        samples = np.full((6, 4), 128 if format.startswith("u8") else 0, dtype=kinds[format])
        samples[channel] += kinds[format](full)
        packed = samples if format.endswith("p") else np.ascontiguousarray(samples.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format=format, layout="5.1")
        assert np.abs(mono(frame) - weight).max() < 0.01


@pytest.mark.parametrize(("rotation", "shape", "corner"), [(90, (64, 48), (-1, 0)), (-90, (64, 48), (0, -1)), (180, (48, 64), (-1, -1))])
def test_rotated_pictures_come_upright(tmp_path, rotation, shape, corner):
    path = write_media(tmp_path / "a.mp4", rotation=rotation, audio=None, seconds=0.4)
    frames = read_video(str(path), 25.0, short_side=48)
    assert frames.shape[1:3] == shape
    red = frames[5, corner[0], corner[1]].astype(int)
    assert red[0] > 150 and red[1:].max() < 100


def test_ten_bits_odd_sizes_and_oblong_pixels(tmp_path):
    ten = write_media(tmp_path / "ten.mkv", pix_fmt="yuv420p10le", seconds=0.4, audio=None)
    assert numbers(read_video(str(ten), 25.0)).tolist() == list(range(10))
    odd = write_media(tmp_path / "odd.mkv", pix_fmt="yuv444p", size=(61, 45), seconds=1.0)
    clip = transcode(str(odd), 0.0, None, FORMAT)
    assert (clip.width, clip.height) == (66, 48) and numbers(decode_frames(clip.mp4)).tolist() == list(range(25))
    wide = write_media(tmp_path / "wide.mkv", aspect=Fraction(2), seconds=0.4, audio=None)
    assert read_video(str(wide), 25.0, short_side=48).shape == (10, 48, 128, 3)


@pytest.mark.parametrize(
    ("matrix", "full_range", "weights"),
    [(1, False, (0.2126, 0.0722)), (1, True, (0.2126, 0.0722)), (6, False, (0.299, 0.114)), (2, True, (0.299, 0.114)),
     (9, False, (0.2627, 0.0593)), (3, False, (0.299, 0.114))],
)  # fmt: skip
def test_colours_of_any_matrix_and_range_come_right(matrix, full_range, weights):
    colour = np.array([200, 60, 30])
    red, blue = weights
    luma = colour @ [red, 1 - red - blue, blue]
    differences = np.array([(colour[2] - luma) / (1 - blue), (colour[0] - luma) / (1 - red)]) / 2
    levels = [luma, *(128 + differences)] if full_range else [16 + luma * 219 / 255, *(128 + differences * 224 / 255)]
    flat = np.repeat(np.rint(levels), [48 * 64, 48 * 16, 48 * 16]).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(flat.reshape(72, 64), "yuvj420p" if full_range else "yuv420p")
    frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
    rgb = as_rgb(Painter(None, 32)(frame))
    assert rgb.shape == (32, 42, 3) and np.abs(rgb.astype(int) - colour).max() <= 4


def test_crop_keeps_the_middle_square(plain):
    whole = read_video(str(plain), 25.0, 0.0, 0.4, short_side=32)
    square = read_video(str(plain), 25.0, 0.0, 0.4, short_side=32, crop=True)
    assert whole.shape == (10, 32, 42, 3) and np.array_equal(square, whole[:, :, 4:36])
    clip = transcode(str(plain), 0.0, 1.0, ClipFormat(short_side=32, crop=True))
    assert (clip.width, clip.height) == (32, 32)


def test_end_is_clipped_to_what_the_media_has(plain):
    clip = transcode(str(plain), 1.0, 7.0, FORMAT)
    assert clip.duration == 1.0 and len(decode_frames(clip.mp4)) == 25 and len(decode_audio(clip.flac)) == 16000
    assert transcode(str(plain), 0.0, 7.0, ClipFormat(short_side=48, max_seconds=1.5)).duration == 1.5


def spoilt(folder, plain):
    whole = write_media(folder / "whole.mp4", audio="aac").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    matroska = plain.read_bytes()
    (folder / "hole.mkv").write_bytes(matroska[:2000])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.mp4").write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 50)
    write_media(folder / "mute.mp4", audio=None)
    write_media(folder / "brief.mkv", seconds=0.2)
    with av.open(str(folder / "sound.wav"), "w") as target:
        stream = target.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        target.mux(stream.encode(frame))


def test_files_that_cannot_be_used_say_why(tmp_path, plain):
    spoilt(tmp_path, plain)
    reasons = {
        "truncated.mp4": "undecodable", "empty.mp4": "undecodable", "page.mp4": "undecodable", "absent.mp4": "missing",
        "mute.mp4": "no_audio", "brief.mkv": "too_short", "sound.wav": "no_video",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ClipError, match=name) as caught:
            transcode(str(tmp_path / name), 0.0, None, FORMAT)
        assert caught.value.reason == reason, name
    with pytest.raises(ClipError) as caught:
        transcode(str(plain), 5.0, 6.0, FORMAT)
    assert caught.value.reason == "too_short"


def test_faststart_file_cut_off_in_transfer_is_not_taken_for_a_shorter_one(tmp_path):
    data = write_media(tmp_path / "fast.mp4", audio="aac", options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    assert probe(str(tmp_path / "cut.mp4")).duration == pytest.approx(2.0, abs=0.05)
    with pytest.raises(ClipError) as caught:
        transcode(str(tmp_path / "cut.mp4"), 0.0, None, FORMAT)
    assert caught.value.reason == "undecodable"


def test_probe_reads_headers(plain, tmp_path):
    info = probe(str(plain))
    assert (info.width, info.height, info.sample_rate, info.channels, info.fps) == (64, 48, 48000, 1, 25.0)
    assert info.duration == pytest.approx(2.0, abs=0.01) and info.av_offset == 0.0
    mute = probe(str(write_media(tmp_path / "mute.mp4", audio=None)))
    assert mute.audio_start is None and mute.av_offset is None and mute.duration == pytest.approx(2.0)


def test_fsspec_urls_are_read(plain):
    fsspec.filesystem("memory").pipe_file("/media/plain.mkv", plain.read_bytes())
    assert probe("memory://media/plain.mkv") == probe(str(plain))
    with pytest.raises(ClipError, match="memory://media/absent.mkv") as caught:
        probe("memory://media/absent.mkv")
    assert caught.value.reason == "missing"


def packets_of(path):
    with av.open(str(path)) as media:
        video = media.streams.video[0]
        packets = [(float(p.pts * p.time_base), bytes(p), p.is_keyframe) for p in media.demux(video) if p.size]
        return video.codec_context.extradata, packets, [stream.type for stream in media.streams]


@pytest.mark.parametrize(("name", "audio"), [("a.mp4", "aac"), ("a.mp4", None), ("a.mkv", "pcm_s16le"), ("a.mov", "pcm_s16le")])
def test_mux_copies_the_video_packet_for_packet(tmp_path, name, audio):
    video = write_media(tmp_path / name, audio=audio, rotation=90)
    sound = ticking(2.0, 16000)
    mux(str(video), sound, 16000, str(tmp_path / "new" / "out.mp4"))
    (extradata, before, _), (copied, after, kinds) = packets_of(video), packets_of(tmp_path / "new" / "out.mp4")
    assert copied == extradata and [packet[1:] for packet in after] == [packet[1:] for packet in before]
    assert np.allclose([packet[0] for packet in after], [packet[0] for packet in before], atol=1e-4)
    assert kinds == ["video", "audio"]
    clip = transcode(str(tmp_path / "new" / "out.mp4"), 0.0, None, FORMAT)
    assert np.abs(tick_times(decode_audio(clip.flac), 16000, 3) - TICKS).max() < 0.002
    assert (clip.width, clip.height, clip.channels) == (48, 64, 1)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.mp4"]


def test_mux_counts_from_the_beginning_of_the_file(tmp_path):
    video = write_media(tmp_path / "a.ts", audio="mp2", video_start=0.2)
    mux(video, ticking(2.2, 16000), 16000, tmp_path / "out.mp4")
    clip = transcode(str(tmp_path / "out.mp4"), 0.0, 2.0, FORMAT)
    assert numbers(decode_frames(clip.mp4)).tolist() == [max(0, index - 5) for index in range(50)]
    assert np.abs(tick_times(decode_audio(clip.flac), 16000, 3) - TICKS).max() < 0.002


def test_mux_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "page.mp4").write_bytes(b"<html>")
    with pytest.raises(ClipError):
        mux(tmp_path / "page.mp4", np.zeros(16000), 16000, tmp_path / "out" / "x.mp4")
    assert list((tmp_path / "out").iterdir()) == []


def test_loudness_of_known_sounds():
    sine = np.sin(2 * np.pi * 100 * np.arange(16000) / 16000).astype(np.float32)
    assert loudness(sine, 16000, -60.0) == pytest.approx({"loudness": -3.0103, "peak": 0.0, "silence": 0.0}, abs=1e-3)
    half = np.concatenate([0.1 * sine, np.zeros(16000, np.float32)])
    assert loudness(half, 16000, -60.0) == pytest.approx({"loudness": -26.0206, "peak": -20.0, "silence": 0.5}, abs=1e-3)
    assert loudness(np.zeros(1000, np.float32), 16000, -60.0) == {"loudness": -120.0, "peak": -120.0, "silence": 1.0}


@given(st.floats(1, 120), st.floats(1, 60), st.floats(0, 3), st.integers(1, 200))
def test_constant_rates_show_the_nearest_picture_once_they_are_fast_enough(source_fps, fps, start, count):
    pictures = [(index / source_fps, 1 / source_fps, index) for index in range(count)]
    shown = np.array(list(at_constant_rate(pictures, start, None, fps)))
    assert len(shown) == max(0, round((count / source_fps - start) * fps))
    if len(shown):
        times = start + np.arange(len(shown)) / fps
        assert np.all(np.diff(shown) >= 0)
        if fps <= 2 * source_fps:
            wanted = times <= (count - 1) / source_fps
            assert np.all(np.abs(shown / source_fps - times)[wanted] <= 0.5 / source_fps + 1e-5)
        assert np.all(shown / source_fps - times <= 1 / fps + 1e-5) or start == 0.0


@given(st.lists(st.floats(0.001, 2.0), min_size=2, max_size=40), st.floats(1, 60), st.floats(0, 2))
def test_variable_rates_never_show_a_picture_long_before_its_time(gaps, fps, start):
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    pictures = [(time, 0.04, index) for index, time in enumerate(times)]
    shown = list(at_constant_rate(pictures, start, float(times[-1]), fps))
    assert len(shown) == max(0, round((float(times[-1]) - start) * fps))
    for index, number in enumerate(shown):
        time = start + index / fps
        assert times[number] - time <= 1 / fps + 1e-5
        if number + 1 < len(times):
            assert time <= times[number + 1] + 1e-5


def test_pictures_that_are_not_shown_are_let_go():
    class Picture:
        pass

    alive = weakref.WeakSet()

    def pictures():
        for index in range(300):  # 100 a second; the clip begins after two seconds
            alive.add(picture := Picture())
            yield index / 100, 0.01, picture
            del picture
            assert len(alive) <= 4

    assert sum(1 for _ in at_constant_rate(pictures(), 2.0, None, 10.0)) == 10


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.floats(-0.5, 1.0), st.integers(0, 5))
def test_chunks_of_sound_are_laid_where_their_times_say(lengths, begin, seed):
    rate, random = 1000, np.random.default_rng(seed)
    whole = random.standard_normal(sum(lengths)).astype(np.float32)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    # Timestamps rounded to 5 ms, as containers round them.
    chunks = [(round(a / rate * 200) / 200, rate, whole[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    line, line_rate = place(chunks, begin, begin + 1.0)
    first = round(-begin * rate)
    expected = np.zeros(round(1.0 * rate), np.float32)
    source = np.arange(len(expected)) - first
    inside = (source >= 0) & (source < len(whole))
    expected[inside] = whole[source[inside]]
    assert line_rate == rate and np.array_equal(line, expected)


def test_gaps_in_the_sound_stay_silent():
    ones = np.ones(100, np.float32)
    line, _ = place([(0.0, 1000, ones), (0.3, 1000, ones)], 0.0, 0.5)
    assert np.flatnonzero(line).tolist() == [*range(100), *range(300, 400)]
    with pytest.raises(ClipError, match="from 1000 to 2000 Hz"):
        place([(0.0, 1000, ones), (0.1, 2000, ones)], 0.0, 0.5)


@given(st.integers(2, 8000), st.integers(2, 8000), st.integers(8, 300).map(lambda half: 2 * half))
def test_fit_gives_even_sides_and_the_short_side_asked(width, height, short_side):
    fitted = fit(width, height, short_side)
    assert min(fitted) == short_side and all(side % 2 == 0 for side in fitted)
    assert abs(max(fitted) - short_side * max(width, height) / min(width, height)) <= 1


@pytest.mark.parametrize(
    ("field", "value"), [("fps", 0), ("short_side", 255), ("sample_rate", 100), ("gop", 0), ("crf", 60), ("max_seconds", 0.5)]
)
def test_format_checks_its_fields(field, value):
    with pytest.raises(ValueError, match=field):
        ClipFormat(**{field: value})
