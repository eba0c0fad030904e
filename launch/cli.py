"""The command line. Heavy modules are imported inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.remote.urls import redacted
from launch.launchers import launch
from launch.prep import prep

app = typer.Typer(help="From collections of video clips to a model that gives silent video its sound.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(prep, name="prep")
app.add_typer(launch, name="launch")

Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as key=value.")]


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="autoencoder, contrastive, generative or preference.")],
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that ships: demo, vggsound.")],
    overrides: Overrides = None,
):
    """Train one stage of a recipe, or resume it."""
    from pipelines.recipes import load_recipe
    from pipelines.run import STAGES, run_chain

    if stage not in STAGES:
        raise typer.BadParameter(f"no stage {stage!r}; choose from {', '.join(STAGES)}")
    run_chain(load_recipe(recipe, overrides or ()), (stage,), typer.echo)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that ships: demo, vggsound.")],
    overrides: Overrides = None,
):
    """Run the whole chain; what is complete is skipped, what was interrupted resumes."""
    from pipelines.recipes import load_recipe
    from pipelines.run import run_chain

    folder = run_chain(load_recipe(recipe, overrides or ()), say=typer.echo)
    if _is_main():
        typer.echo(f"next: foleyscale evaluate --run {folder}, foleyscale generate --run {folder} --out sounds VIDEO...")


@app.command()
def generate(
    videos: Annotated[list[Path], typer.Argument(help="Video files of any length.")],
    run_folder: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the videos with sound.")],
    seed: Annotated[int, typer.Option(help="Another seed gives another sound.")] = 0,
    stage: Annotated[str | None, typer.Option(help="Generator to use: generative, or preference/round-N; the last by default.")] = None,
):
    """Give videos their sound; the pictures are copied, not re-encoded."""
    from pipelines.generate import SoundModel, generate_file

    for video in videos:
        if not video.is_file():
            raise ValueError(f"{video}: no such video file")
    if len({video.stem for video in videos}) < len(videos):
        raise ValueError("two of the videos have the same name, and so would their results: generate them into different folders")
    model = SoundModel.from_run(run_folder, _device(), stage)
    out.mkdir(parents=True, exist_ok=True)
    for video in videos:
        target = out / f"{video.stem}.mp4"
        generate_file(model, video, target, seed)
        typer.echo(f"{target} ({model.vocoder.name})")


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
):
    """The whole chain on rendered clips, on a CPU, in a quarter of an hour: videos that sound, and a report."""
    from launch.demo import run_demo

    _exit_by(run_demo(out, overrides or (), typer.echo))


def main() -> None:
    """Entry point: an error that a user can mend is one line, not a stack."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FOLEYSCALE_DEBUG"):
            raise
        typer.echo(f"foleyscale: {redacted(str(error))}", err=True)
        sys.exit(2)


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
