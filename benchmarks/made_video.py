"""Videos for benchmarks that are given none."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def make_video(path: Path, seed: int, seconds: int = 20) -> Path:
    """A textured picture that the camera wanders over, with grain, and noise that swells."""
    random = np.random.default_rng(seed)
    luma = sum(np.kron(random.normal(0, 4 * cell**0.5, (720 // cell, 1280 // cell)), np.ones((cell, cell))) for cell in (2, 8, 16, 80))
    world = np.clip(120 + luma, 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as target:
        video, sound = target.add_stream("libx264", rate=30), target.add_stream("aac", rate=44100, layout="stereo")
        video.width, video.height, video.options = 640, 360, {"preset": "veryfast", "crf": "23"}
        for number in range(30 * seconds):
            top, left = round(180 + 170 * np.sin(number / 70)), round(320 + 310 * np.sin(number / 110))
            picture = np.full((540, 640), 128, np.uint8)
            picture[:360] = world[top : top + 360, left : left + 640] + random.integers(0, 4, (360, 640), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            target.mux(video.encode(frame))
        target.mux(video.encode())
        swell = 0.2 * np.abs(np.sin(np.arange(44100 * seconds) / 30000))
        noise = (random.normal(0, 0.3, (2, 44100 * seconds)) * swell).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(noise, "fltp", "stereo")
        frame.sample_rate = 44100
        target.mux(sound.encode(frame))
        target.mux(sound.encode())
    return path
