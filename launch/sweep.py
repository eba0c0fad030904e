"""`foleyscale sweep`: variants of the preference rounds over one run, with figures of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run whose generative stage is complete.")],
    sweep_file: Annotated[str, typer.Argument(metavar="SWEEP", help="Sweep file, or the name of one that ships: preference.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the sweep, as key=value.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Variant to run now, again for another; all by default.")] = None,
):
    """Run variants of the preference rounds over one run, with several seeds, and draw the paper's figures from their results."""
    from pipelines.sweep import load_sweep, run_sweep

    run_sweep(run_folder, load_sweep(sweep_file, overrides or ()), only or (), typer.echo)
