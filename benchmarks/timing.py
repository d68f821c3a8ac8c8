"""Peers timed in turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .devices import Device


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        seconds: for one case, all its peers together.
        sample_seconds: calls shorter than this are timed in batches of about this length.
        least_rounds: even where they take longer than ``seconds``.
        most_rounds: no more than these.
    """

    seconds: float = 10.0
    sample_seconds: float = 2e-3
    least_rounds: int = 9
    most_rounds: int = 200


@dataclass(frozen=True)
class Timing:
    """Seconds per call: quartiles over the rounds, each round's sample a mean over ``repeats`` calls."""

    first_quartile: float
    median: float
    third_quartile: float
    minimum: float
    repeats: int
    rounds: int


def time_in_turns(
    calls: dict[str, Callable[[], Any]],
    device: Device,
    plan: Plan,
    track: Callable[[Sequence[int]], Any] = iter,
) -> dict[str, Timing]:
    """Times every call once a round, in an order drawn anew for each round.

    Args:
        calls: by name. They must have run before, so that nothing is compiled here.
        device: its clock is used.
        plan: how long to measure.
        track: wraps the rounds, for a progress bar.

    Returns:
        Timings by name.
    """
    repeats = {name: _repeats(call, device, plan.sample_seconds) for name, call in calls.items()}
    warm = {name: device.seconds_per_call(call, repeats[name]) for name, call in calls.items()}
    round_seconds = sum(warm[name] * repeats[name] for name in calls)
    rounds = max(plan.least_rounds, min(plan.most_rounds, int(plan.seconds / max(round_seconds, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in track(range(rounds)):
            shuffle(order)
            for name in order:
                samples[name].append(device.seconds_per_call(calls[name], repeats[name]))
    finally:
        if was_enabled:
            gc.enable()
    return {name: _summary(samples[name], repeats[name]) for name in calls}


def _repeats(call: Callable[[], Any], device: Device, sample_seconds: float) -> int:
    """The fewest calls in a power of two that fill a sample; the doubling also warms up."""
    repeats = 1
    while repeats < 1 << 16:
        if (seconds := device.seconds_per_call(call, repeats)) * repeats >= sample_seconds / 2:
            return max(1, math.ceil(sample_seconds / seconds)) if repeats > 1 else 1
        repeats *= 2
    return repeats


def _summary(samples: list[float], repeats: int) -> Timing:
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(first, median, third, min(samples), repeats, len(samples))
