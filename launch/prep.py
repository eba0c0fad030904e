"""The commands that prepare data: `foleyscale prep ...`."""

from __future__ import annotations

import contextlib
import os
from typing import Annotated

import typer

from launch.tasks import task_from_environment

prep = typer.Typer(help="Prepare clips: manifest, shards, index.", no_args_is_help=True)
manifest = typer.Typer(help="List the clips of a collection as a manifest.", no_args_is_help=True)
prep.add_typer(manifest, name="manifest")

Out = Annotated[str, typer.Option("--out", help="Manifest to write (Parquet; a path or an fsspec URL).")]


@manifest.command("folder")
def manifest_folder(
    root: Annotated[str, typer.Argument(help="Folder or fsspec URL with video files.")],
    out: Out = "manifest.parquet",
    csv: Annotated[str | None, typer.Option(help="Table with name, and any of caption, label, start, end, split.")] = None,
    clip_seconds: Annotated[float | None, typer.Option(help="Cut each file into consecutive clips of this length.")] = None,
    heldout: Annotated[float, typer.Option(help="Share of the files kept for validation.")] = 0.05,
    dataset: Annotated[str, typer.Option(help="Name of the data set.")] = "folder",
):
    """Any video files below a folder."""
    from data_prep.readers.folder import read_folder

    _write_manifest(read_folder(root, csv=csv, dataset=dataset, heldout=heldout, clip_seconds=clip_seconds), out)


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
    _write_manifest(read_rendered(folder, clips, seed=seed, heldout=heldout, settings=settings, workers=workers), out)


@prep.command("shards")
def prep_shards(
    manifest_url: Annotated[str, typer.Argument(metavar="MANIFEST", help="Manifest made by `prep manifest`.")],
    out: Annotated[str, typer.Argument(help="Folder or fsspec URL of the shards.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as format.short_side=128 filters.min_motion=0.001.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose clip format and `prepare` section hold.")] = None,
    task: Annotated[str, typer.Option(help="This task I of N, from 0, as I/N; auto asks SLURM, AWS Batch or Kubernetes.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
):
    """Cut, transcode and filter the clips of a manifest into WebDataset shards with sidecars. Run again to resume."""
    part = _task(task)
    from data_prep.prepare import prepare_shards
    from pipelines.recipes import load_preparation

    settings = load_preparation(recipe, overrides or ())
    with _progress("clips") as advance:
        summary = prepare_shards(manifest_url, out, settings, task=part, workers=workers, progress=advance)
    typer.echo(str(summary))


@prep.command("index")
def prep_index(out: Annotated[str, typer.Argument(help="Folder or fsspec URL of the shards.")]):
    """Write index.parquet and dataset.json over all shards (after several tasks wrote them)."""
    from data_prep.prepare import index_shards

    shards = index_shards(out)
    typer.echo(f"{out}: {len(shards.shards)} shards, {len(shards)} clips")


@prep.command("verify")
def prep_verify(out: Annotated[str, typer.Argument(help="Folder or fsspec URL of the shards.")]):
    """Read every member and compare with the sidecars."""
    from data_prep.index import verify

    problems = verify(out)
    for problem in problems:
        typer.echo(problem)
    typer.echo(f"{out}: {len(problems)} problems" if problems else f"{out}: sound")
    raise typer.Exit(1 if problems else 0)


@prep.command("stats")
def prep_stats(out: Annotated[str, typer.Argument(help="Folder or fsspec URL of the shards.")]):
    """Kept, dropped and failed clips by reason, hours, bytes, labels."""
    import json

    from data_prep.index import statistics

    typer.echo(json.dumps(statistics(out), indent=1))


def _write_manifest(rows, out: str) -> None:
    from data_prep.manifest import write_manifest

    typer.echo(f"{out}: {write_manifest(rows, out)} clips")


@contextlib.contextmanager
def _progress(title: str):
    """A progress bar; yields what is told (done, total). It appears when first told, so that an early error stands alone."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True))
    shown = bar.add_task(title, total=None)

    with contextlib.ExitStack() as stack:
        def advance(done: int, total: int) -> None:
            if not bar.live.is_started:
                stack.enter_context(bar)
            bar.update(shown, completed=done, total=total)

        yield advance


def _task(text: str) -> tuple[int, int]:
    if text == "auto":
        return task_from_environment(os.environ) or (0, 1)
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--task {text!r}: write it as I/N with 0 <= I < N")
    return int(index), int(count)
