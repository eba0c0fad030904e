"""The command line. Heavy modules are imported inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.remote.urls import redacted
from launch.generate import generate
from launch.launchers import launch
from launch.prep import prep
from launch.sweep import sweep

app = typer.Typer(help="From collections of video clips to a model that gives silent video its sound.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(prep, name="prep")
app.add_typer(launch, name="launch")

Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")]
Profile = Annotated[int, typer.Option(help="Steps of each stage that a torch profiler trace covers, as STAGE.train.profile=N.")]


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="autoencoder, contrastive, generative or preference.")],
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that ships: demo, rendered, vggsound, mmaudio_finetune.")],
    overrides: Overrides = None,
    profile: Profile = 0,
):
    """Train one stage of a recipe, or resume it."""
    from pipelines.recipes import load_recipe
    from pipelines.run import STAGES, run_chain

    if stage not in STAGES:
        raise typer.BadParameter(f"no stage {stage!r}; choose from {', '.join(STAGES)}")
    run_chain(load_recipe(recipe, [*_profiled((stage,), profile), *(overrides or ())]), (stage,), typer.echo)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that ships: demo, rendered, vggsound, mmaudio_finetune.")],
    overrides: Overrides = None,
    profile: Profile = 0,
):
    """Run the whole chain; what is complete is skipped, what was interrupted resumes."""
    from pipelines.recipes import load_recipe
    from pipelines.run import STAGES, run_chain

    folder = run_chain(load_recipe(recipe, [*_profiled(STAGES, profile), *(overrides or ())]), say=typer.echo)
    if _is_main():
        typer.echo(f"next: foleyscale evaluate --run {folder}, foleyscale generate --run {folder} --out sounds VIDEO...")


app.command()(generate)
app.command()(sweep)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    out: Annotated[Path | None, typer.Option("--out", help="File for the generator, such as mmaudio_small_16k.pth.")] = None,
    stage: Annotated[str | None, typer.Option(help="Generator to take; the last by default.")] = None,
    vae_out: Annotated[Path | None, typer.Option("--vae-out", help="File for the autoencoder, such as v1-16.pth.")] = None,
):
    """Write a run's generator and autoencoder under the names of MMAudio's checkpoints."""
    if out is None and vae_out is None:
        raise ValueError("there is nothing to write: name --out, --vae-out or both")
    from pipelines.published import export_public, export_public_vae

    if out:
        typer.echo(f"{out}: {export_public(run_folder, out, stage)}")
    if vae_out:
        typer.echo(f"{vae_out}: {export_public_vae(run_folder, vae_out)}")


@app.command()
def evaluate(run_folder: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")]):
    """Measure a finished run on held-out clips and write its report; exits 1 where a bar of the recipe is missed."""
    from pipelines import evaluate as evaluation
    from pipelines.report import write_report

    bars = evaluation.evaluate(run_folder, _device())
    typer.echo(evaluation.table(run_folder))
    typer.echo(f"report: {write_report(run_folder)}")
    _exit_by(bars)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("demo"),
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A handful of clips and steps, about a minute: does everything run?")] = False,
):
    """The whole chain on rendered clips, on a CPU, in a quarter of an hour: videos that sound, and a report."""
    from launch.demo import run_demo

    _exit_by(run_demo(out, overrides or (), typer.echo, smoke=smoke))


@app.command()
def status(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]):
    """Say where each stage of a run stands, from any shell that sees its folder."""
    from launch.status import status_lines

    for line in status_lines(run_folder):
        typer.echo(line)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--folder", help="Folder that the run will be in.")] = Path("."),
    url: Annotated[str | None, typer.Option("--url", help="Folder of data that must be within reach, such as s3://bucket/shards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
):
    """Look at this machine before a long run: a line per check with what to do; exits 1 where something has to be mended."""
    from launch.doctor import examine, report

    checks = examine(folder, url)
    typer.echo(report(checks, as_json))
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: an error that a user can mend is one line, not a stack."""
    try:
        app()
    except SystemExit as end:
        if not end.code:
            _leave_world()
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FOLEYSCALE_DEBUG"):
            raise
        typer.echo(f"foleyscale: {redacted(str(error))}", err=True)
        sys.exit(2)


def _leave_world() -> None:
    """End the process group, if there is one: its threads, left to the end of the process, now and then abort it (torch 2.13, gloo).

    Only after success: where another process has failed, this may wait for it.
    """
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _profiled(stages: tuple[str, ...], steps: int) -> list[str]:
    return [f"{stage}.train.profile={steps}" for stage in stages] if steps else []


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _exit_by(bars) -> None:
    for bar in bars:
        typer.echo(str(bar))
    missed = [bar.name for bar in bars if not bar.passed]
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
