"""Decoded clips per second: the decoders on shard clips, and the stream against loading as MMAudio and Diff-Foley do it.

    pip install decord==0.6.0 torchcodec==0.13.0 webdataset
    python -m benchmarks.stream_decoding [VIDEO...] [--clips 12] [--height 360] [--repeats 3]

VIDEO are any videos of ten seconds or more, made ones if none is given. Of each the first ten seconds are used, as a shard clip (256
pixels, key frames every ten) and, for the loaders of full-size sources, as a 16:9 file of --height with key frames every 250, as
downloaded ones have. All give 8 s as 224-pixel frames at 25 fps and sound at 16 kHz. One thread, one process.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.common import alternate, machine, show
from benchmarks.made_video import make_video
from data_prep.audio import resample
from data_prep.decoding import ClipDecoder
from data_prep.index import ShardSet, build_index
from data_prep.media import ClipFormat, transcode
from data_prep.shards import ShardWriter
from data_prep.stream import ClipStream
from data_prep.streaming.backends import BACKENDS, backend

SECONDS, FPS, SIDE, RATE, BATCH = 8.0, 25, 224, 16000, 4


def main() -> None:
    """Make the clips, decode them in turns, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.clips % BATCH:
        parser.error(f"--clips must be a multiple of {BATCH}, as our loader gives whole batches and the others every clip")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        videos = arguments.videos or [make_video(Path(folder, f"{seed}.mp4"), seed, 10) for seed in range(3)]
        shards = write(Path(folder), videos, arguments.clips, arguments.height)
        backends = {name: run for name in BACKENDS if (run := decoding(shards, name))}
        loaders = {f"foleyscale, {name}": training(shards, name, arguments.clips) for name in backends}
        sources = Path(folder) / "sources.tar"
        loaders |= {f"webdataset, full-size video, {name}": full_size(sources, name) for name in backends if name in FULL_SIZE}
        seconds = {**alternate(backends, arguments.repeats), **alternate(loaders, arguments.repeats)}
    print(machine("torch", "av", *(name for name in backends if name != "pyav")))
    rows = [[name, len(shards) / seconds[name], seconds["pyav"] / seconds[name]] for name in backends]
    show("8 s of frames of a shard clip, 256 pixels", ["decoder", "clips/s", "times PyAV"], rows)
    best = min(value for name, value in seconds.items() if name.startswith("foleyscale"))
    rows = [[name, arguments.clips / seconds[name], seconds[name] / best] for name in loaders]
    title = f"{arguments.clips} clips as a model takes them, sources of {arguments.height} lines"
    show(title, ["loader", "clips/s", "best of ours / this"], rows)


def write(folder: Path, videos: list[Path], clips: int, height: int) -> ShardSet:
    """One shard of the clips, and a tar of the full-size sources, each video in turn."""
    with ShardWriter(folder / "shards", 0) as writer, tarfile.open(folder / "sources.tar", "w") as tar:
        format = ClipFormat(fps=FPS, short_side=256, sample_rate=RATE)
        made = [(transcode(str(path), 0.0, 10.0, format), full(path, height)) for path in videos]
        for number in range(clips):
            clip, source = made[number % len(made)]
            writer.add(f"clip-{number}", {"mp4": clip.mp4, "flac": clip.flac}, **clip.columns())
            entry = tarfile.TarInfo(f"clip-{number}.mp4")
            entry.size = len(source)
            tar.addfile(entry, io.BytesIO(source))
    return build_index(folder / "shards", {})


def full(path: Path, height: int) -> bytes:
    """Ten seconds as they are downloaded: H.264 of 16:9 with reordered frames and key frames far apart, AAC sound."""
    file, width = io.BytesIO(), height * 16 // 9 // 2 * 2
    with av.open(str(path)) as media, av.open(file, "w", format="mp4") as target:
        rate, number = media.streams.video[0].average_rate, 0
        options = {"preset": "veryfast", "g": "250"}
        video = target.add_stream("libx264", rate=rate, width=width, height=height, pix_fmt="yuv420p", options=options)
        audio = target.add_stream("aac", rate=48000)
        resampler = av.AudioResampler("fltp", "stereo", 48000)
        for frame in media.decode(media.streams.video[0], media.streams.audio[0]):
            if frame.time >= 10:
                break
            if isinstance(frame, av.VideoFrame):
                frame = frame.reformat(width, height, "yuv420p")
                frame.pts, frame.time_base, frame.pict_type, number = number, 1 / rate, 0, number + 1
                target.mux(video.encode(frame))
            else:
                for part in resampler.resample(frame):
                    part.pts = None
                    target.mux(audio.encode(part))
        target.mux(video.encode(None))
        target.mux(audio.encode(None))
    return file.getvalue()


def decoding(shards: ShardSet, name: str) -> Callable[[], object] | None:
    """Decodes the pictures of all clips; None where the package is missing."""
    try:
        decode = backend(name)
    except ValueError as error:
        print(error)
        return None
    clips = [shards.read(0, row, ("mp4",))["mp4"] for row in range(len(shards))]
    return lambda: [sum(map(len, decode(clip, 10, round(SECONDS * FPS)))) for clip in clips]


def training(shards: ShardSet, name: str, clips: int) -> Callable[[], object]:
    """This project's stream, in this process."""
    decode = ClipDecoder(seconds=SECONDS, fps=FPS, sample_rate=RATE, size=SIDE, random_crop=True, backend=name)

    def run() -> None:
        batches = ClipStream(ShardSet.open(shards.url), decode, batch_size=BATCH).batches()
        for _ in range(clips // BATCH):
            check(next(batches))

    return run


def full_size(tar: Path, name: str) -> Callable[[], object]:
    """webdataset over the sources, the frames that are needed decoded at full size, then made smaller."""
    import webdataset

    def run() -> None:
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            frames = torch.from_numpy(FULL_SIZE[name](sample["mp4"])).permute(0, 3, 1, 2)
            check({"frames": smaller(frames)[None], "waveform": sound(sample["mp4"])[None]})

    return run


def _decord(mp4: bytes) -> np.ndarray:
    import decord

    reader = decord.VideoReader(io.BytesIO(mp4), num_threads=1)
    return reader.get_batch(wanted(len(reader), reader.get_avg_fps())).asnumpy()


def _torchcodec(mp4: bytes) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(mp4, dimension_order="NHWC", num_ffmpeg_threads=1)
    return reader.get_frames_at(wanted(len(reader), reader.metadata.average_fps)).data.numpy()


FULL_SIZE = {"decord": _decord, "torchcodec": _torchcodec}


def smaller(frames: torch.Tensor) -> torch.Tensor:
    """As torchvision's Resize and CenterCrop, by torch's kernel for bytes."""
    width = round(frames.shape[-1] * SIDE / frames.shape[-2])
    left = (width - SIDE) // 2
    return torch.nn.functional.interpolate(frames, (SIDE, width), mode="bicubic", antialias=True)[..., left : left + SIDE]


def wanted(frames: int, fps: float) -> list[int]:
    """Frames at 25 a second for 8 s from 0.4 s on."""
    return [min(frames - 1, round((0.4 + number / FPS) * fps)) for number in range(round(SECONDS * FPS))]


def sound(mp4: bytes) -> torch.Tensor:
    """The same 8 s of sound, 16 kHz mono."""
    with av.open(io.BytesIO(mp4)) as media:
        chunks = [frame.to_ndarray().mean(0) for frame in media.decode(audio=0)]
        rate = media.streams.audio[0].rate
    waveform = np.concatenate(chunks)[round(0.4 * rate) : round((0.4 + SECONDS) * rate)]
    return torch.as_tensor(resample(waveform, rate, RATE))


def check(batch: dict) -> None:
    """All loaders must give the same shapes."""
    frames, waveform = batch["frames"], batch["waveform"]
    if frames.shape[1:] != (round(SECONDS * FPS), 3, SIDE, SIDE) or abs(waveform.shape[1] - SECONDS * RATE) > 1:
        raise RuntimeError(f"frames {tuple(frames.shape)} and waveform {tuple(waveform.shape)} came instead")


if __name__ == "__main__":
    main()
