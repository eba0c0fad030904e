"""Scenes: pure functions of their seed, with a truth that can be seen and heard."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.rendering.acts import spaced_times
from data_prep.rendering.config import RenderConfig
from data_prep.rendering.scene import KINDS, Scene

IMPULSIVE = ["ball", "drum", "clap", "bell", "keys", "metronome", "firework", "bird", "frog", "drop", "camera"]
FRAME = 1 / 25


def alone(kind, index=0, **options):
    return Scene.cast(RenderConfig(kinds=(kind,), multi_share=0.0, **options), 5, "train", index)


def first_rise(waveform, time, rate=16000):
    """Seconds from `time` to where 2 ms of sound first hold a seventh of the power found within 60 ms."""
    power = np.convolve(np.square(waveform.astype(float)), np.ones(32) / 32)[: len(waveform)]
    start = max(0, int((time - 0.06) * rate))
    near = power[start : int((time + 0.06) * rate)]
    return (start + np.argmax(near > 0.15 * near.max())) / rate - time


def brightening(frames):
    """How much light each frame adds to the one before (T,)."""
    return np.diff(frames.astype(float).mean(-1), axis=0, prepend=frames[:1].mean(-1)).clip(min=0).mean((1, 2))


def test_there_are_many_kinds():
    assert len(KINDS) >= 10 and set(IMPULSIVE) < set(KINDS)


@pytest.mark.parametrize("kind", IMPULSIVE)
def test_sound_starts_at_the_event(kind):
    for index in range(4):
        scene = alone(kind, index)
        waveform = scene.play()
        assert all(abs(first_rise(waveform, event["time"])) < 0.01 for event in scene.events)


@pytest.mark.parametrize("kind", [*IMPULSIVE, "engine", "siren", "rain"])
@pytest.mark.parametrize("size", [32, 48])
def test_the_frame_of_the_event_lights_up(kind, size):
    scene = alone(kind, 1, size=size)
    rise = brightening(scene.draw())
    for event in scene.events:
        frame = int(event["time"] / FRAME + 1e-6)
        near = range(max(0, frame - 4), min(len(rise), frame + 5))
        assert abs(max(near, key=lambda i: rise[i]) - frame) <= 1
        assert rise[frame] > 4 * np.median(rise)


@pytest.mark.parametrize("kind", ["engine", "rain", "siren"])
def test_lasting_kinds_get_louder_at_their_onsets(kind):
    scene = alone(kind, 2, noise_floor=-90.0)
    power = np.square(scene.play().astype(float))
    for event in scene.events:
        start = round(event["time"] * 16000)
        before, after = power[max(0, start - 160) : start].mean(), power[start + 160 : start + 480].mean()
        assert after > 3 * before


def test_rain_is_as_loud_as_it_is_dense():
    scene = alone("rain", 3)
    frames, waveform, cloud = scene.draw(), scene.play(), scene.acts[0]
    level = np.sqrt(np.square(waveform.reshape(96, 640).astype(float)).mean(1))
    density = cloud.density((np.arange(96) + 0.5) / 25)
    assert np.corrcoef(level, density)[0, 1] > 0.95
    streaks = frames[:, 24:].astype(float).std((1, 2, 3))
    assert np.corrcoef(level, streaks)[0, 1] > 0.85


def test_engine_spin_is_its_pitch():
    engine = alone("engine", 1).acts[0]
    clock = np.arange(0, 3.84, 0.01)
    throttle = engine.throttle(clock)
    after = throttle[np.searchsorted(clock, engine.times)]
    assert (after > 0.9).all() and throttle[clock < engine.times[0]].max() == 0


def test_car_is_loudest_when_it_passes():
    scene = alone("car", 0)
    level = np.square(scene.play().reshape(-1, 640).astype(float)).mean(1)
    smooth = np.convolve(level, np.ones(9) / 9, "same")
    assert abs(smooth.argmax() * FRAME - scene.events[0]["time"]) < 0.25
    assert scene.events[0]["onset"] is False


def test_larger_is_lower():
    def centroid(index_size):
        scene = alone("bell", 0, noise_floor=-90.0)
        scene.acts[0].size = index_size
        power = np.abs(np.fft.rfft(scene.play()))
        return (power * np.arange(len(power))).sum() / power.sum()

    assert centroid(0.0) > 1.8 * centroid(1.0)


def test_a_scene_is_a_pure_function_of_seed_split_and_index():
    config = RenderConfig()
    first, again = (Scene.cast(config, 3, "train", 7) for _ in range(2))
    assert np.array_equal(first.draw(), again.draw()) and np.array_equal(first.play(), again.play())
    assert np.array_equal(first.draw(), again.draw()), "drawing twice must not use up random numbers"
    others = [Scene.cast(config, 3, "heldout", 7), Scene.cast(config, 3, "train", 8), Scene.cast(config, 4, "train", 7)]
    assert all(not np.array_equal(first.play(), other.play()) for other in others)


def test_shapes_levels_and_background():
    config = RenderConfig(size=32, seconds=5.12)
    for index in range(8):
        scene = Scene.cast(config, 0, "train", index)
        frames, waveform = scene.draw(), scene.play()
        assert frames.shape == (128, 32, 32, 3) and frames.dtype == np.uint8
        assert waveform.shape == (81920,) and waveform.dtype == np.float32
        assert 0.02 < np.abs(waveform).max() < 0.95
        quietest = np.square(waveform.reshape(-1, 1024).astype(float)).mean(1).min()
        assert 10 * np.log10(quietest) > -81.5
        assert np.percentile(frames, 5) < 0.2 * 255


def test_share_of_clips_with_several_kinds():
    counts = [len(Scene.cast(RenderConfig(), 0, "train", i).acts) for i in range(400)]
    assert 0.28 < np.mean(np.array(counts) > 1) < 0.42 and max(counts) == 3
    assert all(len(Scene.cast(RenderConfig(multi_share=1.0), 0, "train", i).acts) > 1 for i in range(20))


def test_shuffled_clips_agree_rarely():
    scenes = [Scene.cast(RenderConfig(), 0, "train", i) for i in range(300)]
    onsets = [np.array([e["time"] for e in s.events if e["onset"]]) for s in scenes]
    hits = [np.mean(np.abs(a[:, None] - b[None]).min(1) < 0.1) for a, b in zip(onsets, onsets[1:], strict=False) if len(a) and len(b)]
    assert np.mean(hits) < 0.25


def test_truth_is_in_order_and_in_the_picture():
    for index in range(60):
        scene = Scene.cast(RenderConfig(), 1, "heldout", index)
        times = [event["time"] for event in scene.events]
        assert times == sorted(times) and times[0] >= 0 and times[-1] < 3.84
        assert {event["kind"] for event in scene.events} == set(scene.kinds)
        assert all(0 <= event["x"] <= 1 and 0 <= event["y"] <= 1 for event in scene.events)
        assert scene.caption[0].isupper() and scene.caption.endswith(".") and scene.caption.isascii()


@settings(max_examples=60, deadline=None)
@given(
    index=st.integers(0, 10**6), seconds=st.sampled_from([1.52, 2.56, 3.84, 5.12, 10.0]), density=st.floats(0.2, 5),
    gap=st.sampled_from([0.1, 0.35, 0.56]),
)
def test_gap_holds_between_all_impulsive_events(index, seconds, density, gap):
    kinds = tuple(kind for kind in IMPULSIVE if kind != "metronome")
    config = RenderConfig(seconds=seconds, density=density, min_gap=gap, kinds=kinds, multi_share=0.7)
    scene = Scene.cast(config, 0, "train", index)
    times = [event["time"] for event in scene.events]
    assert all(len(act.times) for act in scene.acts)
    assert np.diff(times).min(initial=1.0) >= gap - 2e-4 and times[0] > 0.1 and times[-1] < seconds - 0.2


@given(seed=st.integers(0, 1000), count=st.integers(1, 8))
def test_spaced_times(seed, count):
    times = spaced_times(np.random.default_rng(seed), count, 0.2, 3.5, 0.4)
    assert len(times) == count and times[0] >= 0.2 and times[-1] <= 3.5 + 1e-9
    assert np.diff(times).min(initial=1.0) >= 0.4 - 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 33}, "size is 33: choose an even number"),
        ({"seconds": 3.85}, "whole frames at 25.0 fps"),
        ({"multi_share": 2}, "multi_share is 2"),
        ({"min_gap": 2.0}, r"min_gap is 2.0: choose 0.05 to 1.72"),
        ({"noise_floor": 0.0}, "or the events drown"),
        ({"density": 0}, "density is 0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RenderConfig(**options)


@pytest.mark.parametrize(
    ("kind", "size", "tint", "caption"),
    [
        ("ball", 0.1, 0.0, "A small red ball bounces twice."),
        ("ball", 0.5, 0.1, "An orange ball bounces twice."),
        ("frog", 0.9, 0.8, "A large blue-eyed frog croaks twice."),
        ("camera", 0.5, 1.0, "A camera with a violet lens flashes twice."),
        ("rain", 0.5, 1.0, "Rain falls in 2 showers."),
    ],
)
def test_captions_say_what_is_seen(kind, size, tint, caption):
    scene = alone(kind)
    act = scene.acts[0]
    act.size, act.tint, act.times = size, tint, np.array([1.0, 2.0])
    assert scene.caption == caption


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="kinds has trumpet: choose from ball, drum"):
        Scene.cast(RenderConfig(kinds=("ball", "trumpet")), 0, "train", 0)
