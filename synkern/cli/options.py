"""What the commands share: options, settings from the command line, errors that a reader can use."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from synkern.recipes.settings import OUTPUT, Settings, parse_methods

AnySettings = TypeVar("AnySettings", bound=Settings)
_INTERRUPTED, _FAILED = 130, 1


def option(text: str, panel: str, *names: str) -> Any:
    """An option with its help, shown in a panel of --help."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=True)


Resume = Annotated[
    bool, option("Go on with the run in --out; its settings need not be given again.", OUTPUT, "--resume")
]
Overwrite = Annotated[bool, option("Replace the run in --out.", OUTPUT, "--overwrite")]


def takes(kind: type[Settings]) -> Callable[[Callable[[typer.Context], None]], Callable[..., None]]:
    """Gives a command the fields of its settings as options, with ``--resume`` and ``--overwrite``.

    The command itself finds them in ``ctx.params``, as :func:`settings_from` does.
    """
    hints = get_type_hints(kind)
    parameters = [_parameter(field, hints[field.name]) for field in dataclasses.fields(kind)]
    parameters += [_keyword("resume", Resume, False), _keyword("overwrite", Overwrite, False)]

    def decorate(command: Callable[[typer.Context], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(ctx: typer.Context, **_: Any) -> None:
            command(ctx)

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        wrapper.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (context, *parameters)}
        return wrapper

    return decorate


def option_of(kind: type[Settings], name: str) -> Any:
    """The option of one field, for a command that has few of them."""
    return _option(next(field for field in dataclasses.fields(kind) if field.name == name))


def _option(field: dataclasses.Field[Any]) -> Any:
    flag = f"--{_name(field).replace('_', '-')}"
    if field.default is True:
        flag += f"/--no-{flag[2:]}"
    return option(field.metadata["help"], field.metadata["panel"], flag)


def _name(field: dataclasses.Field[Any]) -> str:
    return field.metadata["name"] or field.name


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """A field as typer wants it. Where it has no default one may still be left out, under --resume."""
    default = None if field.default is dataclasses.MISSING else field.default
    if field.name == "out":
        hint, default = Path, inspect.Parameter.empty
    elif field.name == "methods":
        hint, default = str, ",".join(default or ())
    elif default is None and hint is str:
        hint = str | None
    return _keyword(_name(field), Annotated[hint, _option(field)], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def settings_from(
    ctx: typer.Context, kind: type[AnySettings], methods: Collection[str], sources: Sequence[str]
) -> AnySettings:
    """Settings from the command line; with --resume, those of the earlier run and what was given explicitly.

    Args:
        ctx: of the command.
        kind: which settings.
        methods: names that --method takes.
        sources: data that must be named.
    """
    from synkern.recipes.errors import RecipeError
    from synkern.recipes.runs import stored_settings

    params = ctx.params
    given = {**params, "methods": parse_methods(params["method"], methods), "out": str(params["out"])}
    names = {field.name for field in dataclasses.fields(kind)}
    if params["resume"]:
        explicit = {
            "methods" if name == "method" else name
            for name in params
            if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
        }
        return dataclasses.replace(
            stored_settings(params["out"], kind), **{name: given[name] for name in (explicit | {"out"}) & names}
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
