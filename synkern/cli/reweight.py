"""``synkern reweight``."""

from __future__ import annotations

from typing import Annotated

import typer

from synkern.cli import options
from synkern.cli.options import DATA, OUTPUT, TRAINING, option

_WEIGHTS = "Weights (sungen)"


def reweight(
    ctx: typer.Context,
    out: options.Out,
    train: options.Train = None,
    test: options.Test = None,
    real: Annotated[
        str | None,
        option(
            "A few rows with labels that can be trusted, as outer rows. Default: a random sample of --train, as in the "
            "paper.",
            DATA,
            "--real",
        ),
    ] = None,
    method: Annotated[
        str,
        option(
            "sungen, zerogen (plain training), l2rw, meta-weight-net, hu2019, confidence, co-teaching, "
            "label-smoothing, temporal-ensembling, one-level-rce, several with commas, or all.",
            TRAINING,
            "--method",
        ),
    ] = "sungen,zerogen",
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
    flip_labels: Annotated[
        float, option("Give this share of --train another label, and report how it is found.", DATA, "--flip-labels")
    ] = 0.0,
    noise_seed: Annotated[
        int, option("Seed of --flip-labels, and of the choice of the outer rows.", DATA, "--noise-seed")
    ] = 0,
    iterations: Annotated[int, option("Outer iterations.", _WEIGHTS, "--iterations")] = 50,
    inner_epochs: Annotated[
        int | None,
        option(
            "Epochs of the task model in an iteration. Default: 1, as in the paper; for the BiLSTM on less than 2,400 "
            "rows more, to make 400 steps.",
            _WEIGHTS,
            "--inner-epochs",
        ),
    ] = None,
    inner_batch_size: Annotated[
        int | None,
        option(
            "Rows in a step of the task model. Default: --batch-size; for the BiLSTM on less than 9,600 rows 16 or 8, "
            "to make 400 steps an epoch.",
            _WEIGHTS,
            "--inner-batch-size",
        ),
    ] = None,
    outer_loss: Annotated[str, option("rce, mae, gce or ce.", _WEIGHTS, "--outer-loss")] = "rce",
    outer_size: Annotated[
        int | None,
        option(
            "Rows in the outer sample. Default: 5 % of --train as in the paper, but from 1,000 (or all) to 50,000.",
            _WEIGHTS,
            "--outer-size",
        ),
    ] = None,
    outer_top: Annotated[
        float,
        option(
            "Share of the outer rows, those of greatest weight, that count in the outer loss; the released code has an "
            "option for 0.9.",
            _WEIGHTS,
            "--outer-top",
        ),
    ] = 1.0,
    outer_learning_rate: Annotated[
        float, option("Of Adam on the weights, with cosine decay.", _WEIGHTS, "--outer-learning-rate")
    ] = 0.25,
    parametrization: Annotated[
        str, option("sigmoid, or clamp (the weights themselves, kept in 0 to 1).", _WEIGHTS, "--parametrization")
    ] = "sigmoid",
    temperature: Annotated[float, option("Of the sigmoid.", _WEIGHTS, "--temperature")] = 1.0,
    restart: Annotated[
        str,
        option(
            "Where the task model of an iteration starts: fresh (new random parameters), same (those of the first "
            "iteration, as in the released code) or continue (where the last one ended).",
            _WEIGHTS,
            "--restart",
        ),
    ] = "fresh",
    class_balance: Annotated[
        bool,
        option(
            "Take each class's scores from their mean, so that no class as a whole gains or loses weight; not in the "
            "paper.",
            _WEIGHTS,
            "--class-balance/--no-class-balance",
        ),
    ] = True,
    paper_scale: Annotated[
        bool,
        option(
            "Scores times rate / batch size and Adam's epsilon 1e-8, as in the paper. By default scores are divided by "
            "their mean magnitude and epsilon is 3 / sqrt(rows): on small data the former are under epsilon, or count "
            "with their sign alone.",
            _WEIGHTS,
            "--paper-scale",
        ),
    ] = False,
    score_method: Annotated[
        str,
        option(
            "difference (two passes without gradients, good to four digits), contraction or forward (exact), "
            "double_backward (exact, slow), or auto (the cheapest exact one).",
            _WEIGHTS,
            "--score-method",
        ),
    ] = "difference",
    score_in_training: Annotated[
        bool,
        option(
            "Take the scores out of the task model's own steps, along the direction of the iteration before: quicker, "
            "but not what the paper does. Needs --restart same or continue.",
            _WEIGHTS,
            "--score-in-training",
        ),
    ] = False,
    test_every: Annotated[
        int, option("Test the task model after each so many iterations.", _WEIGHTS, "--test-every")
    ] = 5,
    budget: Annotated[
        float,
        option(
            "Size of the subset: a share of --train, or above 1 a number of rows; also of what confidence keeps.",
            OUTPUT,
            "--budget",
        ),
    ] = 0.5,
    train_on_subset: Annotated[
        bool,
        option(
            "Train the final model of sungen on the subset, rather than on all rows with their weights.",
            TRAINING,
            "--train-on-subset",
        ),
    ] = False,
    epochs: Annotated[
        int | None,
        option(
            "Epochs of the final model of each method. Default: 5 for the BiLSTM, 3 for transformers.",
            TRAINING,
            "--epochs",
        ),
    ] = None,
    batch_size: options.BatchSize = 32,
    learning_rate: Annotated[
        float | None,
        option(
            "Default: 1e-3, Adam, constant for the BiLSTM; 2e-5, AdamW, falling to 0 for transformers, which suits "
            "DistilBERT: a small encoder such as MiniLM needs 2e-4 to 5e-4.",
            TRAINING,
            "--learning-rate",
        ),
    ] = None,
    max_length: options.MaxLength = 128,
    weight_decay: options.WeightDecay = 0.0,
    clip_norm: options.ClipNorm = 1.0,
    label_smoothing: Annotated[float, option("Of label-smoothing.", TRAINING, "--label-smoothing")] = 0.1,
    noise_rate: Annotated[
        float, option("Share of wrong labels that co-teaching is told.", TRAINING, "--noise-rate")
    ] = 0.3,
    device: options.Device = "auto",
    threads: options.Threads = None,
    keep_models: options.KeepModels = "first",
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Find out which training rows deserve trust, from the rows alone, and train on the result.

    SunGen (Gao et al., 2023) learns a weight for every row of a data set that a language model wrote: it trains a small
    model with the weights, looks at a robust loss of that model on a sample of the same rows, and moves the weights
    along the meta-gradient. Writes results.json, table.md, plots, the weight of every row, rows.md (rows of least and
    greatest weight), subset.jsonl and the trained models to --out; where the right labels are known, also how well
    wrong ones are found. The paper has a million rows; what small data change is said at --outer-size,
    --inner-batch-size, --class-balance and --paper-scale.
    """
    from synkern.recipes.settings import ReweightSettings, parse_methods

    with options.readable_errors("reweight", out):
        from synkern.recipes.reweight import METHODS, run_reweight
        from synkern.recipes.reweight_plots import FILES
        from synkern.recipes.reweight_report import TABLE

        given = {**ctx.params, "methods": parse_methods(method, METHODS), "out": str(out)}
        settings = options.settings_from(ctx, ReweightSettings, given, ("train", "test"), resume=resume)
        results = run_reweight(settings, resume=resume, overwrite=overwrite)
        options.print_results(results, settings.folder, TABLE, FILES)
