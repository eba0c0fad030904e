"""The commands that list the clips of a collection: `foleyscale prep manifest ...`."""

from __future__ import annotations

from typing import Annotated

import typer

manifest = typer.Typer(help="List the clips of a collection as a manifest.", no_args_is_help=True)

Out = Annotated[str, typer.Option("--out", help="Manifest to write (Parquet; a path or an fsspec URL).")]
Media = Annotated[str | None, typer.Option(help="Folder or fsspec URL of the media files; without it sources are addresses on YouTube.")]
Patterns = Annotated[list[str] | None, typer.Option(
    "--pattern", help="How files are named below --media, such as '{id}_{start:06d}.mp4'; 'cut:' or 'whole:' before it says whether a "
    "file is the clip or the whole video. Usual names are tried by themselves. May be given again.")]  # fmt: skip
Exclude = Annotated[list[str] | None, typer.Option(
    help="List of videos to leave out of training: a manifest, a data set's list or ids, one a line. Rows of its evaluation splits "
    "count, all rows with ':all' after the path. May be given again.")]  # fmt: skip
Malformed = Annotated[float, typer.Option("--max-malformed", help="Share of malformed rows that may be set aside.")]


@manifest.command("folder")
def manifest_folder(
    root: Annotated[str, typer.Argument(help="Folder or fsspec URL with video files.")],
    out: Out = "manifest.parquet",
    csv: Annotated[str | None, typer.Option(help="Table with name, and any of caption, label, start, end, split.")] = None,
    clip_seconds: Annotated[float | None, typer.Option(help="Cut each file into consecutive clips of this length.")] = None,
    heldout: Annotated[float, typer.Option(help="Share of the files kept for validation.")] = 0.05,
    dataset: Annotated[str, typer.Option(help="Name of the data set.")] = "folder",
    exclude: Exclude = None,
):
    """Any video files below a folder."""
    from data_prep.readers.folder import read_folder

    _write(read_folder(root, csv=csv, dataset=dataset, heldout=heldout, clip_seconds=clip_seconds), out, exclude)


@manifest.command("rendered")
def manifest_rendered(
    folder: Annotated[str, typer.Argument(help="Folder to draw the clips into.")],
    out: Out = "manifest.parquet",
    clips: Annotated[int, typer.Option(help="Training clips.")] = 256,
    heldout: Annotated[int, typer.Option(help="Held-out clips.")] = 64,
    size: Annotated[int, typer.Option(help="Side of the picture, pixels.")] = 48,
    seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 3.84,
    seed: Annotated[int, typer.Option(help="Another seed draws other clips.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
):
    """Draw and synthesise sounding events with known truth, as mp4 files."""
    from data_prep.readers.rendered import read_rendered
    from data_prep.rendering.config import RenderConfig

    settings = RenderConfig(size=size, seconds=seconds)
    _write(read_rendered(folder, clips, seed=seed, heldout=heldout, settings=settings, workers=workers), out)


@manifest.command("vggsound")
def manifest_vggsound(
    csv: Annotated[str, typer.Argument(help="vggsound.csv: id, start, label, split.")],
    out: Out = "manifest.parquet",
    media: Media = None,
    pattern: Patterns = None,
    exclude: Exclude = None,
    max_malformed: Malformed = 0.01,
):
    """VGGSound: ten-second clips of 309 classes."""
    from data_prep.readers.rejects import Rejects
    from data_prep.readers.vggsound import read_vggsound

    rejects = Rejects(max_malformed)
    _write(read_vggsound(csv, media, patterns=pattern, rejects=rejects), out, exclude, rejects)


@manifest.command("vggss")
def manifest_vggss(
    json: Annotated[str, typer.Argument(help="vggss.json: file, class, bbox.")],
    out: Out = "manifest.parquet",
    media: Media = None,
    split: Annotated[str, typer.Option(help="Split of all rows; train, where they are trained on.")] = "test",
    pattern: Patterns = None,
    exclude: Exclude = None,
    max_malformed: Malformed = 0.01,
):
    """VGG-SS: clips of VGGSound's test split with boxes around what sounds."""
    from data_prep.readers.rejects import Rejects
    from data_prep.readers.vggsound import read_vggss

    rejects = Rejects(max_malformed)
    _write(read_vggss(json, media, split=split, patterns=pattern, rejects=rejects), out, exclude, rejects)


@manifest.command("audioset")
def manifest_audioset(
    segments: Annotated[list[str], typer.Argument(help="Segment lists, such as balanced_train_segments.csv.")],
    labels: Annotated[str | None, typer.Option(help="class_labels_indices.csv: names of the classes.")] = None,
    ontology: Annotated[str | None, typer.Option(help="ontology.json: names of the classes, and their parents.")] = None,
    ancestors: Annotated[bool, typer.Option("--ancestors", help="Add the names of all parents of a class; needs --ontology.")] = False,
    split: Annotated[str | None, typer.Option(help="Split of all rows; by default train or test by the name of the list.")] = None,
    out: Out = "manifest.parquet",
    media: Media = None,
    pattern: Patterns = None,
    exclude: Exclude = None,
    max_malformed: Malformed = 0.01,
):
    """AudioSet: segments of up to ten seconds with several of 527 classes."""
    from data_prep.readers.audioset import read_audioset
    from data_prep.readers.rejects import Rejects

    rejects = Rejects(max_malformed)
    rows = read_audioset(segments, labels, media, ontology=ontology, ancestors=ancestors, split=split, patterns=pattern, rejects=rejects)
    _write(rows, out, exclude, rejects)


@manifest.command("panda70m")
def manifest_panda70m(
    csv: Annotated[str, typer.Argument(help="A list such as panda70m_training_2m.csv.")],
    out: Out = "manifest.parquet",
    media: Media = None,
    split: Annotated[str, typer.Option(help="Split of all rows: a list does not tell which it is.")] = "train",
    min_score: Annotated[float | None, typer.Option(help="Least matching score of a caption.")] = None,
    desirable: Annotated[bool, typer.Option("--desirable", help="Only clips that the data set's own filter calls desirable.")] = False,
    clips_per_video: Annotated[int | None, typer.Option(help="At most so many clips of a video, those of the highest scores.")] = None,
    min_seconds: Annotated[float, typer.Option(help="Shortest clip.")] = 0.0,
    max_seconds: Annotated[float | None, typer.Option(help="Longest clip.")] = None,
    pattern: Patterns = None,
    exclude: Exclude = None,
    max_malformed: Malformed = 0.01,
):
    """Panda-70M: captioned clips of long videos."""
    from data_prep.readers.panda70m import ClipChoice, read_panda70m
    from data_prep.readers.rejects import Rejects

    choice = ClipChoice(min_score=min_score, classes=("desirable",) if desirable else None, clips_per_video=clips_per_video,
                        min_seconds=min_seconds, max_seconds=max_seconds)  # fmt: skip
    rejects = Rejects(max_malformed)
    _write(read_panda70m(csv, media, split=split, choice=choice, patterns=pattern, rejects=rejects), out, exclude, rejects)


def _write(rows, out: str, exclude: list[str] | None = None, rejects=None) -> None:
    """Write the manifest less the excluded videos, and say what did not go in and why."""
    from data_prep.exclusion import ExcludedVideos
    from data_prep.manifest import write_manifest

    repeated: list[str] = []
    guard = ExcludedVideos.read(exclude) if exclude else None
    try:
        count = write_manifest(guard.apply(rows) if guard else rows, out, lambda row: repeated.append(row.key))
    except ValueError as error:
        raise ValueError(f"{error}; {guard.report()}" if guard and guard.dropped else error) from error
    typer.echo(f"{out}: {count:,} clips")
    if rejects and rejects.rejected:
        typer.echo("\n".join([str(rejects), *rejects.lines[3:]]), err=True)
    if repeated:
        typer.echo(f"{len(repeated):,} rows repeat the key of an earlier one and were set aside, such as {repeated[0]}", err=True)
    if guard:
        typer.echo(guard.report(), err=True)
