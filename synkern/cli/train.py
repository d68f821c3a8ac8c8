"""``synkern train`` and ``synkern demo``."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from synkern.recipes.settings import TrainSettings

_INTERRUPTED, _FAILED = 130, 1
_DATA = "Data"
_OPTIMISATION = "Training"
_OUTPUT = "Output"


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=True)


def train(
    ctx: typer.Context,
    out: Annotated[Path, _option("Folder for everything that is written.", _OUTPUT, "--out")],
    train: Annotated[
        str | None,
        _option(
            "Rows to train on, labels not to be trusted: .jsonl, .jsonl.gz, .csv, .parquet, or a `datasets` id "
            "as name, name:split or name@configuration:split.",
            _DATA,
            "--train",
        ),
    ] = None,
    real: Annotated[str | None, _option("A few rows with labels that can be trusted.", _DATA, "--real")] = None,
    test: Annotated[str | None, _option("Rows to test on.", _DATA, "--test")] = None,
    method: Annotated[
        str, _option("ce, focal, imp, dimp, several with commas, or all.", _OPTIMISATION, "--method")
    ] = "dimp",
    model: Annotated[
        str,
        _option(
            "bilstm (trained from scratch, nothing to download) or a transformers model by folder or id.",
            _OPTIMISATION,
            "--model",
        ),
    ] = "bilstm",
    seeds: Annotated[int, _option("Number of seeds, from 0.", _OPTIMISATION, "--seeds")] = 3,
    text_column: Annotated[str | None, _option("Default: text, or text_a with text_b.", _DATA, "--text-column")] = None,
    text_pair_column: Annotated[str | None, _option("Second text of a pair.", _DATA, "--text-pair-column")] = None,
    label_column: Annotated[str, _option("Text or whole numbers.", _DATA, "--label-column")] = "label",
    true_label_column: Annotated[
        str, _option("Right labels of the training rows, if known; used in plots only.", _DATA, "--true-label-column")
    ] = "true_label",
    labels: Annotated[
        str | None,
        _option(
            "Label names in index order, as a,b,c or a JSON file with a list `labels`. Default: those in --train.",
            _DATA,
            "--labels",
        ),
    ] = None,
    skip_bad_rows: Annotated[
        bool, _option("Leave out rows that cannot be used, and count them.", _DATA, "--skip-bad-rows")
    ] = False,
    limit_train: Annotated[int | None, _option("Use a random part of --train.", _DATA, "--limit-train")] = None,
    limit_real: Annotated[int | None, _option("Use a random part of --real.", _DATA, "--limit-real")] = None,
    limit_test: Annotated[int | None, _option("Use a random part of --test.", _DATA, "--limit-test")] = None,
    noise: Annotated[
        bool, _option("Corrupt --train: a third as it is, a third with another label, a third twice.", _DATA, "--noise")
    ] = False,
    noise_seed: Annotated[int, _option("Seed of --noise.", _DATA, "--noise-seed")] = 0,
    epochs: Annotated[int, _option("Epochs of each method.", _OPTIMISATION, "--epochs")] = 5,
    checker_epochs: Annotated[
        int,
        _option(
            "Epochs of quality and diversity checker; a BiLSTM on fewer than 500 --real rows may need more.",
            _OPTIMISATION,
            "--checker-epochs",
        ),
    ] = 5,
    batch_size: Annotated[int, _option("Rows in a step.", _OPTIMISATION, "--batch-size")] = 32,
    learning_rate: Annotated[
        float | None,
        _option(
            "Default: 1e-3, Adam, constant for the BiLSTM; 6e-5, AdamW, falling to 0 for transformers, which suits "
            "BERT-base: a small encoder such as MiniLM needs 2e-4 to 5e-4.",
            _OPTIMISATION,
            "--learning-rate",
        ),
    ] = None,
    max_length: Annotated[int, _option("Tokens at which a row is cut.", _OPTIMISATION, "--max-length")] = 128,
    weight_decay: Annotated[float, _option("Of AdamW or Adam.", _OPTIMISATION, "--weight-decay")] = 0.0,
    clip_norm: Annotated[float, _option("Greatest norm of a step's gradient.", _OPTIMISATION, "--clip-norm")] = 1.0,
    gamma: Annotated[float, _option("Exponent of the focal loss.", _OPTIMISATION, "--gamma")] = 2.0,
    max_weight: Annotated[
        float | None, _option("Greatest weight of a row in imp and dimp. Default: none.", _OPTIMISATION, "--max-weight")
    ] = None,
    device: Annotated[
        str, _option("cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.", _OPTIMISATION, "--device")
    ] = "auto",
    threads: Annotated[int | None, _option("CPU threads. Default: torch's choice.", _OPTIMISATION, "--threads")] = None,
    keep_models: Annotated[
        str, _option("Which trained models to save: those of the first seed, all or none.", _OUTPUT, "--keep-models")
    ] = "first",
    resume: Annotated[
        bool, _option("Go on with the run in --out; its settings need not be given again.", _OUTPUT, "--resume")
    ] = False,
    overwrite: Annotated[bool, _option("Replace the run in --out.", _OUTPUT, "--overwrite")] = False,
) -> None:
    """Train a text classifier on noisy or generated data, with weights from a little data that can be trusted.

    Fits the methods with every seed, tests after every epoch, and writes results.json, table.md, plots, the weight of
    every row and the trained models to --out. The BiLSTM's defaults are those of SunGen, the others those of the paper
    of IMP-Loss and DIMP-Loss.
    """
    from synkern.recipes.settings import parse_methods

    with _readable_errors(out):
        given = {**ctx.params, "methods": parse_methods(method), "out": str(out)}
        run_and_print(_settings(ctx, given, resume=resume), resume=resume, overwrite=overwrite)


def demo(
    out: Annotated[Path, _option("Folder for everything that is written.", _OUTPUT, "--out")] = Path("runs/demo"),
    threads: Annotated[int | None, _option("CPU threads. Default: torch's choice.", _OPTIMISATION, "--threads")] = None,
    resume: Annotated[bool, _option("Go on with an interrupted demo.", _OUTPUT, "--resume")] = False,
) -> None:
    """Compare all methods on film reviews with noisy labels: under four minutes on two cores."""
    from synkern.recipes.demo import demo_settings

    with _readable_errors(out):
        run_and_print(demo_settings(out, threads), resume=resume, overwrite=not resume)


def _settings(ctx: typer.Context, given: dict[str, Any], *, resume: bool) -> TrainSettings:
    """Settings from the command line; with --resume, those of the earlier run and what was given explicitly."""
    from synkern.recipes.errors import RecipeError
    from synkern.recipes.settings import TrainSettings
    from synkern.recipes.train import stored_settings

    names = {field.name for field in dataclasses.fields(TrainSettings)}
    if resume:
        explicit = {
            "methods" if name == "method" else name
            for name in given
            if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
        }
        return dataclasses.replace(
            stored_settings(Path(given["out"])), **{name: given[name] for name in (explicit | {"out"}) & names}
        )
    for name in ("train", "real", "test"):
        if given[name] is None:
            raise RecipeError(
                f"--{name}: expected a file or a `datasets` id, got none; give all of --train, --real and --test"
            )
    return TrainSettings(**{name: value for name, value in given.items() if name in names})


def run_and_print(settings: TrainSettings, *, resume: bool, overwrite: bool) -> None:
    """Train, then print the table and where the rest is."""
    from synkern.recipes.plots import FILES
    from synkern.recipes.report import TABLE
    from synkern.recipes.train import run_train

    results = run_train(settings, resume=resume, overwrite=overwrite)
    for name, part in results["data"].items():
        skipped = f", {part['rows_skipped']} skipped" if part["rows_skipped"] else ""
        typer.echo(f"{name}: {part['rows']} rows{skipped} from {part['source']}")
    typer.echo()
    typer.echo((settings.folder / TABLE).read_text(encoding="utf-8"))
    typer.echo(f"Everything is in {settings.folder}; the plots:")
    for name in FILES:
        if (settings.folder / name).exists():
            typer.echo(f"  {settings.folder / name}")


@contextlib.contextmanager
def _readable_errors(out: Path) -> Iterator[None]:
    """One line on standard error for what a user can mend; how to go on after Ctrl-C or a kill."""
    from synkern.recipes.errors import RecipeError

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        from synkern.recipes.train import RUN_FILE

        started = (out / RUN_FILE).exists()
        advice = f"go on with: synkern train --resume --out {out}" if started else "nothing was trained yet"
        signum = getattr(interrupt, "signum", signal.SIGINT)
        typer.echo(f"\ninterrupted; {advice}", err=True)
        raise typer.Exit(_INTERRUPTED if signum == signal.SIGINT else 128 + signum) from None
    except (RecipeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(_FAILED) from None
