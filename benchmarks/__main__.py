"""``python -m benchmarks``: the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from synkern.registry import LOSSES

from . import contraction
from .cases import DEFAULT_DTYPES, DEFAULT_MODES, DEVICE_SIZES, DTYPES, MODES, SMOKE_SIZES, cases
from .checks import WrongResult
from .devices import DEVICES
from .peers import PEERS
from .report import as_text, save
from .runner import run
from .timing import Plan

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
SMOKE_RESULTS = FOLDER.parent / "build" / "benchmarks"  # not under version control: its numbers say nothing
SMOKE_PLAN = Plan(seconds=0.5, least_rounds=5)


def _known(kind: str, names: list[str], known: Mapping[str, object]) -> tuple[str, ...]:
    """The names, "all" spelt out."""
    for name in names:
        if name != "all" and name not in known:
            raise typer.BadParameter(f"unknown {kind} {name!r}; choose from {', '.join(known)} or all")
    return tuple(known) if "all" in names else tuple(dict.fromkeys(names))


def _size(text: str) -> tuple[int, int]:
    rows, _, classes = text.partition("x")
    if not (rows.isdecimal() and classes.isdecimal() and int(rows) and int(classes)):
        raise typer.BadParameter(f"a size is rows x classes, for example 512x32000; got {text!r}")
    return int(rows), int(classes)


def main(
    loss: Annotated[list[str] | None, typer.Option(help="A loss, or all; repeatable. Default: dimp.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Rows x classes; repeatable. Default: by device.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: float32, bfloat16.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="train, forward, tangent, hvp or all; repeatable. Default: train, tangent.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help="A peer, or all; repeatable. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and of the kernels.")] = 2,
    seconds: Annotated[float, typer.Option(min=0, help="Time to measure one case with all its peers.")] = 10.0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory of loss + backward on large arrays.")] = True,
    variants: Annotated[bool, typer.Option(help="Every registered set of options, not only the defaults.")] = False,
    smoke: Annotated[bool, typer.Option(help="Small sizes and few rounds: does everything run?")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: benchmarks/results.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the files. Default: device and losses.")] = None,
) -> None:
    """Time losses and their derivatives beside what a user would write otherwise."""
    if device not in DEVICES:
        raise typer.BadParameter(f"unknown device {device!r}; choose from {', '.join(DEVICES)}")
    if (reason := DEVICES[device].missing()) is not None:
        raise typer.BadParameter(f"nothing to measure on {device!r}: {reason}")
    losses = _known("loss", loss or ["dimp"], LOSSES)
    sizes = tuple(map(_size, size)) if size else (SMOKE_SIZES if smoke else DEVICE_SIZES[device])
    dtypes = _known("dtype", dtype or list(DEFAULT_DTYPES), DTYPES)
    modes = _known("mode", mode or list(MODES if smoke or device != "cpu" else DEFAULT_MODES), MODES)
    peers = _known("peer", peer or ["all"], PEERS)
    plan = SMOKE_PLAN if smoke else Plan(seconds=seconds)
    chosen = cases(losses, sizes, dtypes, modes, variants)
    try:
        report = run(chosen, device, threads, plan, peers=peers, memory=memory and not smoke)
    except WrongResult as error:
        typer.echo(f"wrong result: {error}", err=True)
        raise typer.Exit(1) from error
    folder = out or (SMOKE_RESULTS if smoke else RESULTS)
    tqdm.write(as_text(report))
    saved = save(report, folder, name or f"{device}-{'-'.join(loss or losses)}")
    if device != "cpu" and not size:
        saved += contraction.run(device, report.environment, plan, folder, smoke)
    for path in saved:
        typer.echo(f"saved {path}")


if __name__ == "__main__":
    typer.run(main)
