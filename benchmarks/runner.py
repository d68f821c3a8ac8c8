"""One run: check, time and weigh every case."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from typing import Any

import torch
from tqdm import tqdm

import synkern

from .cases import Case, make_problem
from .checks import Expected, check
from .devices import DEVICES, Device
from .goals import GOALS, judge
from .goals import THREADS as GOAL_THREADS
from .memory import LEAST_ARRAY_BYTES, peak_extra_arrays
from .peers import Peer, peers_for
from .report import Report
from .results import Record, records_of
from .timing import Plan, time_in_turns


def run(
    cases: Sequence[Case], device: str, threads: int, plan: Plan, *, peers: tuple[str, ...], memory: bool
) -> Report:
    """Measures all cases.

    Args:
        cases: what to measure.
        device: key of ``DEVICES``.
        threads: of torch's pool, which the kernels use too.
        plan: how long to time each case.
        peers: names of those to measure.
        memory: also measure peak memory of loss + backward on arrays that are large enough.

    Returns:
        The report.

    Raises:
        WrongResult: a peer's value or derivative is wrong.
    """
    torch.set_num_threads(threads)
    environment = describe(DEVICES[device], threads, plan)
    records: list[Record] = []
    skipped: dict[str, str] = {}
    progress = tqdm(cases, desc="cases", unit="case", smoothing=0)
    for case in progress:
        progress.set_postfix_str(str(case))
        able = _able(peers_for(case.mode, peers, device), DEVICES[device].torch_device, skipped)
        if able:
            records += measure(case, able, device, threads, plan, memory=memory)
    has_goals = device != "cpu" or threads == GOAL_THREADS
    return Report(environment, records, skipped, judge(records, GOALS[device]) if has_goals else [])


def _able(peers: list[Peer], device: torch.device, skipped: dict[str, str]) -> list[Peer]:
    able = []
    for peer in peers:
        if (reason := peer.missing(device)) is None:
            able.append(peer)
        else:
            skipped[peer.name] = reason
    return able


def measure(
    case: Case, peers: Sequence[Peer], device: str, threads: int, plan: Plan, *, memory: bool
) -> list[Record]:
    """Checks every peer against float64, then times all in turns, then weighs each in a process of its own."""
    copies = DEVICES[device].copies(case.array_bytes)
    problems = [make_problem(case, DEVICES[device].torch_device, seed) for seed in range(copies)]
    steps = {peer.name: [peer.prepare(problem) for problem in problems] for peer in peers}
    expected: dict[str, Expected] = {}
    errors = {peer.name: check(peer, steps[peer.name][0], problems[0], expected) for peer in peers}
    del expected
    calls = {name: in_rotation([step.run for step in of]) for name, of in steps.items()}
    for call in calls.values():  # compiles for what differs between copies
        for _ in range(copies):
            call()
    track = partial(tqdm, desc=f"{case}, {case.mode}", unit="round", leave=False, disable=None)
    busy_elsewhere = DEVICES[device].busy_elsewhere()
    timings = time_in_turns(calls, DEVICES[device], plan, track)
    busy = busy_elsewhere()
    weights: dict[str, float] = {}
    if memory and case.mode == "train" and case.array_bytes >= LEAST_ARRAY_BYTES:
        del problems, steps, calls  # leaves the memory to the processes that measure it
        for peer in tqdm(peers, desc=f"{case}, memory", unit="peer", leave=False, disable=None):
            weights[peer.name] = peak_extra_arrays(case, peer.name, device, threads)
    return records_of(case, timings, errors, weights, busy)


def in_rotation(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call after the other, each on inputs of its own, so that the last cache does not answer for memory."""
    if len(calls) == 1:
        return calls[0]
    following = cycle(calls)
    return lambda: next(following)()


def describe(device: Device, threads: int, plan: Plan) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    build = synkern.backends.report()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "synkern": synkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "device": {"name": device.name, **device.describe()},
        "instruction_set": build["instruction_set"],
        "compiler": build["compiler"],
        "threads": threads,
        "seconds_per_case": plan.seconds,
        "environment_variables": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "KMP_AFFINITY", "LD_PRELOAD", "MALLOC_ARENA_MAX", "ATEN_CPU_CAPABILITY")
            if name in os.environ
        },
    }
