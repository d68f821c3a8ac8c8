"""``synkern info``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer


def lines(report: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A nested mapping as plain lines ``name: value``, one level of indentation for each level of the mapping."""
    for name, value in report.items():
        label = str(name).replace("_", " ")
        if isinstance(value, Mapping):
            yield f"{indent}{label}:"
            yield from lines(value, indent + "  ")
        elif isinstance(value, (list, tuple)):
            yield f"{indent}{label}: {', '.join(map(str, value))}"
        else:
            yield f"{indent}{label}: {value}"


def info() -> None:
    """Print versions, the instruction set in use, the backends, and why a missing one is missing."""
    from synkern.backends import report

    for line in lines(report()):
        typer.echo(line)
