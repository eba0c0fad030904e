"""The commands that prepare data: `foleyscale prep ...`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from launch import manifests
from launch.progress import progress
from launch.tasks import task_from_environment

prep = typer.Typer(help="Prepare clips: manifest, shards, index, verify, stats, subset.", no_args_is_help=True)
prep.add_typer(manifests.manifest, name="manifest")

Out = Annotated[str, typer.Argument(metavar="SHARDS", help="Folder or fsspec URL of the shards.")]


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
    redo: Annotated[list[str] | None, typer.Option(help="Make shards again where clips failed for this reason.")] = None,
):
    """Cut, transcode and filter the clips of a manifest into WebDataset shards with sidecars. Run again to resume."""
    part = _task(task)
    from data_prep.prepare import prepare_shards
    from pipelines.recipes import load_preparation

    settings = load_preparation(recipe, overrides or ())
    with progress("clips") as advance:
        summary = prepare_shards(manifest_url, out, settings, task=part, workers=workers, redo=redo or (), progress=advance)
    typer.echo(str(summary))


@prep.command("index")
def prep_index(out: Out):
    """Write index.parquet and dataset.json over all shards (after several tasks wrote them)."""
    from data_prep.prepare import index_shards

    found = index_shards(out)
    typer.echo(f"{out}: {len(found.shards)} shards, {len(found)} clips")


@prep.command("verify")
def prep_verify(
    out: Out,
    manifest: Annotated[str | None, typer.Option(help="The manifest: names rows that are missing or foreign.")] = None,
):
    """Read every byte and compare with sidecars, index and manifest; exits 1 if anything is wrong."""
    from data_prep.verification.verify import verify

    problems = 0
    with progress("shards") as advance:
        for problem in verify(out, manifest, advance):
            typer.echo(problem)
            problems += 1
    typer.echo(f"{out}: {problems} problems" if problems else f"{out}: sound")
    raise typer.Exit(1 if problems else 0)


@prep.command("stats")
def prep_stats(
    out: Out,
    chart: Annotated[str | None, typer.Option(help="Picture to draw (PNG, SVG or PDF).")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, with all labels.")] = False,
):
    """What was kept, dropped and failed and why, lengths, labels, measurements."""
    from data_prep.reports.statistics import statistics, text_tables

    with progress("shards") as advance:
        found = statistics(out, advance)
    if json:
        import json as json_module

        typer.echo(json_module.dumps(found.summary(), indent=1))
    else:
        for title, header, rows in text_tables(found):
            _print_table(title, header, rows)
    if chart:
        from data_prep.reports.chart import write_chart

        write_chart(found, chart)
        typer.echo(f"picture: {chart}", err=True)


@prep.command("subset")
def prep_subset(
    shards: Annotated[str, typer.Argument(help="Folder or fsspec URL of the shards.")],
    out: Annotated[str, typer.Argument(help="Folder or fsspec URL of the subset: sidecars and an index, no media.")],
    bounds: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Bounds of filters, such as min_motion=0.002 max_similarity=0.85.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only clips with this label; may be given again.")] = None,
    without_label: Annotated[list[str] | None, typer.Option(help="No clips with this label; may be given again.")] = None,
    keys: Annotated[str | None, typer.Option(help="Text file of the wanted keys, one a line.")] = None,
    min_seconds: Annotated[float, typer.Option(help="Shortest clip.")] = 0.0,
    max_seconds: Annotated[float | None, typer.Option(help="Longest clip.")] = None,
):
    """Choose from finished shards by other thresholds, without touching media: the tars stay where they are."""
    from data_prep.subsets.selection import Selection, read_keys
    from data_prep.subsets.subset import filters_of, make_subset
    from pipelines.recipes import change

    filters = change(filters_of(shards), bounds) if bounds else None
    wanted = Selection(labels=tuple(label or ()), without_labels=tuple(without_label or ()), keys=read_keys(keys) if keys else None,
                       min_seconds=min_seconds, max_seconds=max_seconds)  # fmt: skip
    with progress("shards") as advance:
        summary = make_subset(shards, out, filters, wanted, advance)
    typer.echo(str(summary))


def _print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _task(text: str) -> tuple[int, int]:
    if text == "auto":
        return task_from_environment(os.environ) or (0, 1)
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--task {text!r}: write it as I/N with 0 <= I < N")
    return int(index), int(count)
