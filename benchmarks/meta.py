"""``python -m benchmarks.meta``: the per-sample meta-gradient beside the ways it is computed elsewhere."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from synkern.recipes.files import write_json, write_text

from .__main__ import RESULTS, SMOKE_PLAN, SMOKE_RESULTS
from .checks import WrongResult
from .devices import DEVICES
from .meta_workloads import AUTOCAST_TOLERANCE, SIZES, WORKLOADS, Goal, Size, Way
from .report import duration, environment_text, markdown_table
from .runner import describe
from .timing import Plan, Timing, time_in_turns


@dataclass(frozen=True)
class Result:
    """One way's time, its peak memory beyond what is held before the call, and its distance from the reference."""

    workload: str
    way: str
    timing: Timing
    peak_bytes: int | None
    error: float | None


def precision(size: Size, device: str) -> torch.autocast:
    """What a size's forward passes run under."""
    return torch.autocast(DEVICES[device].torch_device.type, torch.bfloat16, enabled=size.autocast)


def check(workload: str, ways: dict[str, Way], least_tolerance: float = 0.0) -> dict[str, float | None]:
    """Runs every way once; the largest distance from the reference relative to the reference's largest entry.

    Raises:
        WrongResult: a way is further from the reference than it may be.
    """
    results = {name: way.run() for name, way in ways.items()}
    expected = results[WORKLOADS[workload].reference]
    assert isinstance(expected, Tensor)
    errors: dict[str, float | None] = {}
    for name, way in ways.items():
        actual = results[name]
        errors[name] = None
        if way.tolerance is None or actual is None:
            continue
        error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
        allowed = max(way.tolerance, least_tolerance)
        if not error <= allowed:
            raise WrongResult(f"{workload}, {name}: off by a relative {error:.3g}, allowed {allowed:.3g}")
        errors[name] = error
    return errors


def measure(workload: str, size: Size, device: str, threads: int, plan: Plan, memory: bool) -> list[Result]:
    """Checks, times in turns, and weighs every way in a process of its own."""
    torch.set_num_threads(threads)
    track = partial(tqdm, desc=workload, unit="round", leave=False, disable=None)
    with precision(size, device):
        ways = _able(workload, size, device)
        errors = check(workload, ways, AUTOCAST_TOLERANCE if size.autocast else 0.0)
        timings = time_in_turns({name: way.run for name, way in ways.items()}, DEVICES[device], plan, track)
    peaks: dict[str, int] = {}
    if memory:
        context = multiprocessing.get_context("spawn")
        for name in tqdm(ways, desc=f"{workload}, memory", unit="way", leave=False, disable=None):
            with ProcessPoolExecutor(1, mp_context=context) as executor:
                peaks[name] = executor.submit(_peak, workload, name, size, device, threads).result()
    return [Result(workload, name, timings[name], peaks.get(name), errors[name]) for name in ways]


def _able(workload: str, size: Size, device: str) -> dict[str, Way]:
    ways = WORKLOADS[workload].prepare(size, DEVICES[device].torch_device)
    for name, way in ways.items():
        if way.missing:
            tqdm.write(f"{workload}: {name} is left out: {way.missing}")
    return {name: way for name, way in ways.items() if not way.missing}


def _peak(workload: str, way: str, size: Size, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    with precision(size, device):
        run = WORKLOADS[workload].prepare(size, DEVICES[device].torch_device)[way].run
        for _ in range(2):
            run()
        return DEVICES[device].peak_extra_bytes(run)


def table(workload: str, results: list[Result]) -> str:
    """A row a way, relative to the workload's unit."""
    unit = next(r for r in results if r.way == WORKLOADS[workload].unit)
    rows = [
        [
            r.way,
            duration(r.timing.median),
            f"{duration(r.timing.first_quartile)} - {duration(r.timing.third_quartile)}",
            f"{r.timing.median / unit.timing.median:.2f}",
            "" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f} MB",
            "" if not r.error else f"{r.error:.1e}",
        ]
        for r in results
    ]
    head = ("way", "median", "quartiles", f"/ {unit.way}", "peak extra", "error")
    return f"## {workload}: {WORKLOADS[workload].about}\n\n{markdown_table(head, rows, left=1)}"


def judge(workload: str, results: list[Result]) -> list[list[str]]:
    """Each goal beside what was measured."""
    by_name = {r.way: r for r in results}

    def ratio(goal: Goal) -> float | None:
        ours, other = by_name[goal.way], by_name[goal.against]
        if not goal.memory:
            return ours.timing.median / other.timing.median
        return ours.peak_bytes / other.peak_bytes if ours.peak_bytes and other.peak_bytes else None

    rows = []
    for goal in WORKLOADS[workload].goals:
        if (measured := ratio(goal)) is not None:
            what = f"{workload}: {goal.way}, {'peak memory' if goal.memory else 'time'} / {goal.against}"
            rows.append([what, f"<= {goal.at_most:.3g}", f"{measured:.3g}",
                         "met" if measured <= goal.at_most else "NOT MET"])
    return rows


def main(
    workload: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and of the kernels.")] = 2,
    seconds: Annotated[float, typer.Option(min=0, help="Time to measure one workload with all its ways.")] = 60.0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    size: Annotated[str | None, typer.Option(help="full, or base: BERT-base in bf16, the default on a GPU.")] = None,
    smoke: Annotated[bool, typer.Option(help="Tiny models: does everything run?")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: benchmarks/results.")] = None,
) -> None:
    """Time the per-sample meta-gradient beside double backward, forward mode and plain training steps."""
    if device not in DEVICES:
        raise typer.BadParameter(f"unknown device {device!r}; choose from {', '.join(DEVICES)}")
    if (reason := DEVICES[device].missing()) is not None:
        raise typer.BadParameter(f"cannot measure on {device}: {reason}")
    if size is not None and size not in SIZES:
        raise typer.BadParameter(f"unknown size {size!r}; choose from {', '.join(SIZES)}")
    for name in workload or ():
        if name not in WORKLOADS:
            raise typer.BadParameter(f"unknown workload {name!r}; choose from {', '.join(WORKLOADS)}")
    plan = SMOKE_PLAN if smoke else Plan(seconds=seconds, least_rounds=5)
    chosen = SIZES["smoke" if smoke else size or ("full" if device == "cpu" else "base")]
    environment: dict[str, Any] = describe(DEVICES[device], threads, plan) | {"size": asdict(chosen)}
    results: dict[str, list[Result]] = {}
    try:
        for name in workload or WORKLOADS:
            results[name] = measure(name, chosen, device, threads, plan, memory and not smoke)
    except WrongResult as error:
        typer.echo(f"wrong result: {error}", err=True)
        raise typer.Exit(1) from error
    goals = [row for name, of in results.items() for row in judge(name, of)]
    text = "\n\n".join([
        "# The meta-gradient",
        environment_text(environment),
        *(table(name, of) for name, of in results.items()),
        "## Goals\n\n" + markdown_table(("what", "asked", "measured", "verdict"), goals, left=1),
    ]) + "\n"
    typer.echo(text)
    folder = out or (SMOKE_RESULTS if smoke else RESULTS)
    write_text(folder / f"{device}-meta.md", text)
    write_json(
        folder / f"{device}-meta.json",
        {"environment": environment, "results": [asdict(r) for of in results.values() for r in of], "goals": goals},
    )
    typer.echo(f"saved {folder / f'{device}-meta.md'} and .json")


if __name__ == "__main__":
    typer.run(main)
