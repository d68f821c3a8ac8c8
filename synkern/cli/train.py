"""``synkern train`` and ``synkern demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synkern.cli import options
from synkern.cli.options import DATA, OUTPUT, TRAINING, option

if TYPE_CHECKING:
    from synkern.recipes.settings import TrainSettings


def train(
    ctx: typer.Context,
    out: options.Out,
    train: options.Train = None,
    real: Annotated[str | None, option("A few rows with labels that can be trusted.", DATA, "--real")] = None,
    test: options.Test = None,
    method: Annotated[
        str, option("ce, focal, imp, dimp, several with commas, or all.", TRAINING, "--method")
    ] = "dimp",
    model: options.Model = "bilstm",
    seeds: options.Seeds = 3,
    text_column: options.TextColumn = None,
    text_pair_column: options.TextPairColumn = None,
    label_column: options.LabelColumn = "label",
    true_label_column: options.TrueLabelColumn = "true_label",
    labels: options.Labels = None,
    skip_bad_rows: options.SkipBadRows = False,
    limit_train: options.LimitTrain = None,
    limit_real: options.LimitReal = None,
    limit_test: options.LimitTest = None,
    noise: Annotated[
        bool, option("Corrupt --train: a third as it is, a third with another label, a third twice.", DATA, "--noise")
    ] = False,
    noise_seed: Annotated[int, option("Seed of --noise.", DATA, "--noise-seed")] = 0,
    epochs: Annotated[int, option("Epochs of each method.", TRAINING, "--epochs")] = 5,
    checker_epochs: Annotated[
        int,
        option(
            "Epochs of quality and diversity checker; a BiLSTM on fewer than 500 --real rows may need more.",
            TRAINING,
            "--checker-epochs",
        ),
    ] = 5,
    batch_size: options.BatchSize = 32,
    learning_rate: Annotated[
        float | None,
        option(
            "Default: 1e-3, Adam, constant for the BiLSTM; 6e-5, AdamW, falling to 0 for transformers, which suits "
            "BERT-base: a small encoder such as MiniLM needs 2e-4 to 5e-4.",
            TRAINING,
            "--learning-rate",
        ),
    ] = None,
    max_length: options.MaxLength = 128,
    weight_decay: options.WeightDecay = 0.0,
    clip_norm: options.ClipNorm = 1.0,
    gamma: Annotated[float, option("Exponent of the focal loss.", TRAINING, "--gamma")] = 2.0,
    max_weight: Annotated[
        float | None, option("Greatest weight of a row in imp and dimp. Default: none.", TRAINING, "--max-weight")
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    keep_models: options.KeepModels = "first",
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Train a text classifier on noisy or generated data, with weights from a little data that can be trusted.

    Fits the methods with every seed, tests after every epoch, and writes results.json, table.md, plots, the weight of
    every row and the trained models to --out. The BiLSTM's defaults are those of SunGen, the others those of the paper
    of IMP-Loss and DIMP-Loss.
    """
    from synkern.recipes.settings import TrainSettings, parse_methods

    with options.readable_errors("train", out):
        given = {**ctx.params, "methods": parse_methods(method), "out": str(out)}
        settings = options.settings_from(ctx, TrainSettings, given, ("train", "real", "test"), resume=resume)
        run_and_print(settings, resume=resume, overwrite=overwrite)


def demo(
    out: Annotated[Path, option("Folder for everything that is written.", OUTPUT, "--out")] = Path("runs/demo"),
    threads: options.Threads = None,
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
