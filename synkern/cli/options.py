"""What the commands share: options, settings from the command line, errors that a reader can use."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from synkern.recipes.settings import Settings

    AnySettings = TypeVar("AnySettings", bound=Settings)

_INTERRUPTED, _FAILED = 130, 1
DATA, TRAINING, OUTPUT = "Data", "Training", "Output"


def option(text: str, panel: str, *names: str) -> Any:
    """An option with its help, shown in a panel of --help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=True)


Out = Annotated[Path, option("Folder for everything that is written.", OUTPUT, "--out")]
Train = Annotated[
    str | None,
    option(
        "Rows to train on, labels not to be trusted: .jsonl, .jsonl.gz, .csv, .parquet, or a `datasets` id "
        "as name, name:split or name@configuration:split.",
        DATA,
        "--train",
    ),
]
Test = Annotated[str | None, option("Rows to test on.", DATA, "--test")]
Model = Annotated[
    str,
    option(
        "bilstm (trained from scratch, nothing to download) or a transformers model by folder or id.",
        TRAINING,
        "--model",
    ),
]
Seeds = Annotated[int, option("Number of seeds, from 0.", TRAINING, "--seeds")]
TextColumn = Annotated[str | None, option("Default: text, or text_a with text_b.", DATA, "--text-column")]
TextPairColumn = Annotated[str | None, option("Second text of a pair.", DATA, "--text-pair-column")]
LabelColumn = Annotated[str, option("Text or whole numbers.", DATA, "--label-column")]
TrueLabelColumn = Annotated[
    str,
    option("Right labels of the training rows, if known; used in tables and plots only.", DATA, "--true-label-column"),
]
Labels = Annotated[
    str | None,
    option(
        "Label names in index order, as a,b,c or a JSON file with a list `labels`. Default: those in --train.",
        DATA,
        "--labels",
    ),
]
SkipBadRows = Annotated[
    bool, option("Leave out rows that cannot be used, and count them.", DATA, "--skip-bad-rows")
]
LimitTrain = Annotated[int | None, option("Use a random part of --train.", DATA, "--limit-train")]
LimitReal = Annotated[int | None, option("Use a random part of --real.", DATA, "--limit-real")]
LimitTest = Annotated[int | None, option("Use a random part of --test.", DATA, "--limit-test")]
BatchSize = Annotated[int, option("Rows in a step.", TRAINING, "--batch-size")]
MaxLength = Annotated[int, option("Tokens at which a row is cut.", TRAINING, "--max-length")]
WeightDecay = Annotated[float, option("Of AdamW or Adam.", TRAINING, "--weight-decay")]
ClipNorm = Annotated[float, option("Greatest norm of a step's gradient.", TRAINING, "--clip-norm")]
Device = Annotated[str, option("cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.", TRAINING, "--device")]
Threads = Annotated[int | None, option("CPU threads. Default: torch's choice.", TRAINING, "--threads")]
KeepModels = Annotated[
    str, option("Which trained models to save: those of the first seed, all or none.", OUTPUT, "--keep-models")
]
Resume = Annotated[
    bool, option("Go on with the run in --out; its settings need not be given again.", OUTPUT, "--resume")
]
Overwrite = Annotated[bool, option("Replace the run in --out.", OUTPUT, "--overwrite")]


def settings_from(
    ctx: typer.Context, kind: type[AnySettings], given: dict[str, Any], sources: Sequence[str], *, resume: bool
) -> AnySettings:
    """Settings from the command line; with --resume, those of the earlier run and what was given explicitly.

    Args:
        ctx: of the command.
        kind: which settings.
        given: all parameters of the command, with ``methods`` and ``out`` in the form of the settings.
        sources: data that must be named.
        resume: whether --resume was given.
    """
    from synkern.recipes.errors import RecipeError
    from synkern.recipes.runs import stored_settings

    names = {field.name for field in dataclasses.fields(kind)}
    if resume:
        explicit = {
            "methods" if name == "method" else name
            for name in given
            if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
        }
        return dataclasses.replace(
            stored_settings(Path(given["out"]), kind), **{name: given[name] for name in (explicit | {"out"}) & names}
        )
    for name in sources:
        if given[name] is None:
            *others, last = (f"--{source}" for source in sources)
            raise RecipeError(
                f"--{name}: expected a file or a `datasets` id, got none; give all of {', '.join(others)} and {last}"
            )
    return kind(**{name: value for name, value in given.items() if name in names})


def print_results(results: dict[str, Any], folder: Path, table: str, plots: Sequence[str]) -> None:
    """Print what was read, the table and where the rest is."""
    for name, part in results["data"].items():
        skipped = f", {part['rows_skipped']} skipped" if part["rows_skipped"] else ""
        typer.echo(f"{name}: {part['rows']} rows{skipped} from {part['source']}")
    typer.echo()
    typer.echo((folder / table).read_text(encoding="utf-8"))
    typer.echo(f"Everything is in {folder}; the plots:")
    for name in plots:
        if (folder / name).exists():
            typer.echo(f"  {folder / name}")


@contextlib.contextmanager
def readable_errors(command: str, out: Path) -> Iterator[None]:
    """One line on standard error for what a user can mend; how to go on after Ctrl-C or a kill."""
    from synkern.recipes.errors import RecipeError

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        from synkern.recipes.runs import RUN_FILE

        started = (out / RUN_FILE).exists()
        advice = f"go on with: synkern {command} --resume --out {out}" if started else "nothing was trained yet"
        signum = getattr(interrupt, "signum", signal.SIGINT)
        typer.echo(f"\ninterrupted; {advice}", err=True)
        raise typer.Exit(_INTERRUPTED if signum == signal.SIGINT else 128 + signum) from None
    except (RecipeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(_FAILED) from None
