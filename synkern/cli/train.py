"""``synkern train`` and ``synkern demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synkern.cli import options
from synkern.cli.options import option
from synkern.recipes.settings import OUTPUT, TrainSettings


@options.takes(TrainSettings)
def train(ctx: typer.Context) -> None:
    """Train a text classifier on noisy or generated data, with weights from a little data that can be trusted.

    Fits the methods with every seed, tests after every epoch, and writes results.json, table.md, plots, the weight of
    every row and the trained models to --out. The BiLSTM's defaults are those of SunGen, the others those of the paper
    of IMP-Loss and DIMP-Loss.
    """
    with options.readable_errors("train", ctx.params["out"]):
        from synkern.recipes.importance import METHODS

        settings = options.settings_from(ctx, TrainSettings, METHODS, ("train", "real", "test"))
        run_and_print(settings, resume=ctx.params["resume"], overwrite=ctx.params["overwrite"])


def demo(
    out: Annotated[Path, option("Folder for everything that is written.", OUTPUT, "--out")] = Path("runs/demo"),
    threads: Annotated[int | None, options.option_of(TrainSettings, "threads")] = None,
    resume: Annotated[bool, option("Go on with an interrupted demo.", OUTPUT, "--resume")] = False,
) -> None:
    """Compare all methods on film reviews with noisy labels: a few minutes on two cores."""
    from synkern.recipes.demo import demo_settings

    with options.readable_errors("train", out):
        run_and_print(demo_settings(out, threads), resume=resume, overwrite=not resume)


def run_and_print(settings: TrainSettings, *, resume: bool, overwrite: bool) -> None:
    """Train, then print the table and where the rest is."""
    from synkern.recipes.plots import FILES
    from synkern.recipes.report import TABLE
    from synkern.recipes.train import run_train

    results = run_train(settings, resume=resume, overwrite=overwrite)
    options.print_results(results, settings.folder, TABLE, FILES)
