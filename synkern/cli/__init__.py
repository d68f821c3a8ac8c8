"""The ``synkern`` command. Nothing heavy is imported before a command needs it, so that ``--help`` is quick."""

from __future__ import annotations

import typer

from synkern.cli.info import info
from synkern.cli.reweight import reweight
from synkern.cli.train import demo, train

app = typer.Typer(
    name="synkern",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Losses that weigh every row, and the published training methods built on them.",
)
app.command()(train)
app.command()(reweight)
app.command()(demo)
app.command()(info)
