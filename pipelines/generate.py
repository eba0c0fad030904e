"""From videos and prompts to sound: many of them in batches, each as a file beside a record of how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data_prep.media import ClipError, mux, probe
from data_prep.transcoding.encode import encode_flac, pcm16
from models.conditioning import Conditions
from pipelines.engine.saving import write_atomically
from pipelines.sounding import SoundModel
from pipelines.windows import cross_fade, window_starts

__all__ = ["GenerateOptions", "GenerationError", "SoundModel", "generate_file", "generate_files"]

OVERLAP = 0.64
"""Seconds by which the windows of a long video overlap at least."""
_TICKS = 25
"""Windows begin on multiples of 1 / 25 s."""
_WAITING = 8
"""Batches' worth of windows that may wait for others of their shape."""
_CAPTIONS = 1024
"""Captions whose tokens are kept: at CLIP's 77 x 1024 they take 0.3 GB."""


class GenerationError(RuntimeError):
    """Some of the videos have got no sound; the message says how many."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What is asked of a model."""

    prompt: str = ""
    """What is to be heard, for a model with a text encoder."""
    negative_prompt: str = ""
    """What is not to be heard."""
    duration: float | None = None
    """Seconds that get sound, in one piece from the beginning. None: all of a video, in windows of the training length."""
    steps: int | None = None
    """Euler steps; None: as the model is set."""
    guidance: float | None = None
    """Strength of classifier-free guidance; None: as the model is set."""
    seed: int = 0
    """Another seed gives another sound. Window n of a video takes seed + n."""
    mask_away_clip: bool = False
    """Hide the pictures from the semantic condition; the timing is still seen."""
    batch_size: int = 4
    """Windows that are generated together."""
    overwrite: bool = False
    """Make files again that are there already."""

    def __post_init__(self):
        for name, least in (("duration", 0), ("steps", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and (value < least or not value):
                raise ValueError(f"{name} is {value}: give a value above 0")

    def described(self) -> dict:
        """Everything that changes the sound."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch_size", "overwrite")}


@dataclass(frozen=True)
class Job:
    """One file that is wanted."""

    video: Path | None
    """None: sound from the prompt alone."""
    target: Path
    options: GenerateOptions
    """With the prompts of this file."""


@dataclass
class Sounding:
    """One file in the making."""

    job: Job
    seconds: float
    windows: int
    pieces: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    """First sample and waveform by number of the window."""

    def write(self, model: SoundModel) -> np.ndarray:
        """The whole sound, written under its video or as a file of its own; then the record beside it."""
        video, target = self.job.video, self.job.target
        waveform = cross_fade([self.pieces[number] for number in sorted(self.pieces)], round(self.seconds * model.sample_rate))
        if video is None:
            temporary = target.with_name(f".{target.name}.part")
            temporary.write_bytes(encode_flac(pcm16(waveform), model.sample_rate))
            temporary.replace(target)
        else:
            mux(str(video), waveform, model.sample_rate, str(target))
        write_atomically(record_of(target), json.dumps(_record(self, model), indent=1))
        return waveform


@dataclass
class Piece:
    """One window of a file."""

    sounding: Sounding
    number: int
    start: float
    seconds: float
    conditions: Conditions
    negative: torch.Tensor | None
    """Tokens (1, Tt, Dt) of what is not to be heard; None from a model without text encoder."""


def generate_file(model: SoundModel, video: Path, out: Path, options: GenerateOptions | None = None) -> np.ndarray:
    """Give one video its sound; the waveform. Its pictures are copied packet by packet, not re-encoded."""
    options = options or GenerateOptions()
    pieces = list(_pieces(model, [Job(Path(video), Path(out), options)], _raise))
    for batch in batches(pieces, options.batch_size):
        _sound(model, batch, options)
    return pieces[0].sounding.write(model)


def generate_files(model: SoundModel, videos: Sequence[Path], out: Path, options: GenerateOptions, share: tuple[int, int] = (0, 1),
                   say: Callable[[str], None] = print, prompts: Mapping[Path, Mapping[str, str]] | None = None) -> None:
    """Give videos their sound as `out`/NAME.mp4, or without videos the prompt as `out`/PROMPT.flac.

    Process r of `share` = (r, n) makes every n-th file. One that is there is skipped; a video that cannot be read is told, and the
    others go on: GenerationError at the end. A video in `prompts` has its own prompt, negative_prompt or both, in place of those of
    the options.
    """
    found = targets(videos, out, options.prompt)[share[0]::share[1]]
    jobs = [Job(video, target, replace(options, **(prompts or {}).get(video, {}))) for video, target in found]
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    wanted = [job for job in jobs if not _skipped(model, job, say)]

    def fail(video: Path, error: Exception) -> None:
        failed.append(str(video))
        say(f"{video}: {error}")

    for batch in batches(_pieces(model, wanted, fail), options.batch_size):
        _sound(model, batch, options)
        for sounding in {id(piece.sounding): piece.sounding for piece in batch}.values():
            if len(sounding.pieces) == sounding.windows:
                try:
                    sounding.write(model)
                    say(f"{sounding.job.target} ({model.vocoder.name})")
                except (ClipError, ValueError) as error:
                    fail(sounding.job.video or sounding.job.target, error)
                sounding.pieces.clear()
    if failed:
        raise GenerationError(f"{len(failed)} of {len(jobs)} videos have got no sound, for the reasons above")


def targets(videos: Sequence[Path], out: Path, prompt: str) -> list[tuple[Path | None, Path]]:
    """Each video with its result, or None with that of the prompt; ValueError where two would be the same file."""
    if not videos:
        if not prompt:
            raise ValueError("name videos, or a --prompt to make sound from alone")
        return [(None, out / f"{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:80] or 'prompt'}.flac")]
    for video in videos:
        if not video.is_file():
            raise ValueError(f"{video}: no such video file")
    found = [(video, out / f"{video.stem}.mp4") for video in videos]
    if len({target for _, target in found}) < len(found):
        raise ValueError("two of the videos have the same name, and so would their results: generate them into different folders")
    for video, target in found:
        if target.exists() and target.samefile(video):
            raise ValueError(f"{video} would be replaced by its result: choose another --out")
    return found


def record_of(target: Path) -> Path:
    """Where the record of a result lies."""
    return target.with_suffix(".json")


def precision(model: SoundModel) -> str:
    """"bf16" where the generator's weights are bfloat16, else "fp32"."""
    return "bf16" if model.generator.latent_mean.dtype == torch.bfloat16 else "fp32"


def batches(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces in batches of equal shapes. Where too many wait for their like, those that wait longest go in a smaller batch."""
    waiting: dict[tuple, list[Piece]] = {}
    count = 0
    for piece in pieces:
        shapes = (piece.seconds, *(tuple(value.shape) for value in piece.conditions.filled().values()))
        waiting.setdefault(shapes, []).append(piece)
        count += 1
        if len(waiting[shapes]) < size:
            if count <= _WAITING * size:
                continue
            shapes = next(iter(waiting))  # the oldest: a shape that comes back after its batch stands at the end again
        batch = waiting.pop(shapes)
        count -= len(batch)
        yield batch
    yield from waiting.values()


def _pieces(model: SoundModel, jobs: Iterable[Job], fail: Callable[[Path, Exception], None]) -> Iterator[Piece]:
    """The windows of all jobs, seen; a video is either whole or not there. What the prompts share is encoded once."""

    @lru_cache(_CAPTIONS)
    def tokens(caption: str) -> torch.Tensor | None:
        with _encoding(model):
            return model.text([caption])

    for job in jobs:
        text, negative = tokens(job.options.prompt), tokens(job.options.negative_prompt)
        try:
            yield from list(_windows(model, job, text, negative))
        except (ClipError, ValueError) as error:
            fail(job.video or job.target, error)


def _windows(model: SoundModel, job: Job, text: torch.Tensor | None, negative: torch.Tensor | None) -> Iterator[Piece]:
    options = job.options
    if job.video is None:
        seconds = options.duration or model.seconds
        yield Piece(Sounding(job, seconds, 1), 0, 0.0, seconds, Conditions(text=text), negative)
        return
    length = probe(str(job.video)).duration
    spans = _spans(length, model, options)
    sounding = Sounding(job, min(length, options.duration or length), len(spans))
    for number, (start, seconds) in enumerate(spans):
        pictures, shown = model.read(str(job.video), model.views, start, seconds)
        with _encoding(model):
            conditions = model.see(pictures)
        clip = None if options.mask_away_clip else conditions.clip
        yield Piece(sounding, number, start, shown, Conditions(clip=clip, sync=conditions.sync, text=text), negative)


def _encoding(model: SoundModel) -> torch.autocast:
    """Arithmetic of the encoders, as exact as the generator's. They run once, so that autocast may cast their weights each time."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision(model) == "bf16")


def _spans(length: float, model: SoundModel, options: GenerateOptions) -> list[tuple[float, float]]:
    """(start, seconds) of each window over a video of `length` seconds."""
    if options.duration:
        return [(0.0, options.duration)]
    window = round(model.seconds * _TICKS)
    starts = window_starts(round(length * _TICKS), window, round(OVERLAP * _TICKS))
    return [(start / _TICKS, model.window(length)) for start in starts]


def _sound(model: SoundModel, batch: list[Piece], options: GenerateOptions) -> None:
    """Generate a batch of pieces of equal shapes; what the prompts in `options` say is in the pieces already."""
    parts = [piece.conditions.filled() for piece in batch]
    conditions = Conditions(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    noise = torch.cat([model.noise(1, piece.seconds, options.seed + piece.number) for piece in batch])
    negative = None if batch[0].negative is None else torch.cat([piece.negative for piece in batch])
    latents = model.latents(conditions, noise, negative, options.steps, options.guidance, batch[0].seconds)
    waveforms = model.waveform(latents).cpu().numpy()
    for piece, waveform in zip(batch, waveforms, strict=True):
        piece.sounding.pieces[piece.number] = (round(piece.start * model.sample_rate), waveform)


def _skipped(model: SoundModel, job: Job, say: Callable[[str], None]) -> bool:
    """Whether a result is there and stays; said with a warning where it was made in another way."""
    target, options = job.target, job.options
    if options.overwrite or not target.exists() or not record_of(target).exists():
        return False
    known = json.loads(record_of(target).read_text())
    made = (known.get("options"), known.get("weights"), known.get("precision", "fp32"))  # older records name no precision: it was fp32
    same = made == (options.described(), model.provenance, precision(model))
    say(f"{target}: there already, skipped" + ("" if same else "; it was made with other settings or weights, --overwrite makes it again"))
    return True


def _record(sounding: Sounding, model: SoundModel) -> dict:
    """How a sound was made."""
    video, options = sounding.job.video, sounding.job.options
    effort = {"steps": options.steps or model.steps, "guidance": model.guidance if options.guidance is None else options.guidance}
    return {"video": video and str(video), "seconds": sounding.seconds, "windows": sounding.windows, "vocoder": model.vocoder.name,
            "sample_rate": model.sample_rate, **effort, "precision": precision(model), "options": options.described(),
            "weights": model.provenance}


def _raise(video: Path, error: Exception) -> None:
    raise error
