"""What the project asks of its own speed. All are ratios of medians of one run on two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .results import Record, find


@dataclass(frozen=True)
class Goal:
    """``peer`` takes at most ``at_most`` times the time of ``against`` ("floor": the mode's floor), with
    ``against="memory"`` at most that many (N, C) arrays of extra memory, with ``against="seconds"`` that time."""

    size: tuple[int, int]
    against: str
    at_most: float
    dtype: str = "float32"
    mode: str = "train"
    peer: str = "synkern"
    loss: str = "dimp"
    stretch: bool = False
    as_rate: bool = False  # spelt as a share of the other's rate


@dataclass(frozen=True)
class Verdict:
    """A goal beside what was measured. ``met`` is None where other programs disturbed the timing."""

    subject: str
    asked: str
    measured: str
    met: bool | None
    stretch: bool

    @property
    def text(self) -> str:
        if self.met is None:
            return "not judged: the machine was busy"
        return "met" if self.met else ("stretch goal not met" if self.stretch else "NOT MET")


THREADS = 2
SMALL, MIDDLE, LARGE = ((32, 3), (64, 14)), (1024, 100), ((512, 32000), (256, 128000))
# One gradient, and room for the vectors with N entries and for the rounding to pages.
GRADIENT_ALONE = 1.05

CPU_GOALS: tuple[Goal, ...] = (
    *(Goal(size, "eager", 0.65) for size in SMALL),
    *(Goal(size, "cross_entropy", 1.0, stretch=True) for size in SMALL),
    Goal(MIDDLE, "eager", 1 / 3),
    *(Goal(size, "eager", 1 / 8) for size in LARGE),
    *(Goal(size, "compile", 1 / 3) for size in LARGE),
    *(Goal(size, "floor", 2.0) for size in LARGE),
    *(Goal(size, "eager", 1 / 8, dtype="bfloat16") for size in LARGE),
    *(Goal(size, "memory", GRADIENT_ALONE, dtype=dtype) for dtype in ("float32", "bfloat16") for size in LARGE),
    Goal((256, 128000), "floor", 1.3, mode="tangent", peer="synkern kernel"),
)


# Of an H200. The floor is a device-to-device copy, so that 1 / 0.88 of its time is 88 % of its rate.
GPU_LARGE, GPU_MIDDLE, GPU_SMALL = ((8192, 32000), (4096, 128000)), (16384, 1000), (32, 3)
CUDA_GOALS: tuple[Goal, ...] = (
    *(
        Goal(size, against, at_most, dtype=dtype, as_rate=against == "floor")
        for size in GPU_LARGE
        for dtype in ("float32", "bfloat16")
        for against, at_most in (
            ("floor", 1 / 0.88), ("cross_entropy", 1.0), ("compile", 1.0), ("liger", 1.0), ("quack", 1.0),
        )
    ),
    *(Goal(GPU_MIDDLE, "floor", 1 / 0.75, dtype=dtype, as_rate=True) for dtype in ("float32", "bfloat16")),
    Goal(GPU_SMALL, "cross_entropy", 1.0),
    Goal(GPU_SMALL, "seconds", 10e-6, peer="synkern graph"),
    *(
        Goal((4096, 128000), "floor", 1 / 0.85, dtype=dtype, mode=mode, peer="synkern kernel", as_rate=True)
        for mode in ("tangent", "hvp")
        for dtype in ("float32", "bfloat16")
    ),
)
GOALS = {"cpu": CPU_GOALS, "cuda": CUDA_GOALS}


def judge(records: Sequence[Record], goals: Sequence[Goal] = CPU_GOALS) -> list[Verdict]:
    """The goals whose case and counterpart were measured, each beside what came out."""
    verdicts = []
    for goal in goals:
        ours = find(records, goal.peer, loss=goal.loss, size=goal.size, dtype=goal.dtype, mode=goal.mode)
        measured = None if ours is None else _measured(records, ours, goal)
        if ours is not None and measured is not None:
            subject = f"{goal.peer}, {ours.title}"
            unsure = ours.is_noisy and goal.against != "memory"
            met = None if unsure else measured <= goal.at_most
            verdicts.append(Verdict(subject, _asked(goal, ours), _spell(goal, measured), met, goal.stretch))
    return verdicts


def _measured(records: Sequence[Record], ours: Record, goal: Goal) -> float | None:
    if goal.against == "seconds":
        return ours.timing.median
    return ours.peak_extra_arrays if goal.against == "memory" else ours.times.get(goal.against)


def _asked(goal: Goal, ours: Record) -> str:
    against = ours.floor if goal.against == "floor" else goal.against
    if goal.against == "memory":
        return "peak extra memory: one (N, C) gradient"
    if goal.against == "seconds":
        return f"at most {goal.at_most * 1e6:g} us"
    if goal.as_rate:
        return f"at least {100 / goal.at_most:.0f} % of the rate of {against}"
    if goal.at_most < 0.5:
        return f"at least {1 / goal.at_most:.3g}x as fast as {against}"
    return f"at most {goal.at_most:g} of the time of {against}"


def _spell(goal: Goal, measured: float) -> str:
    if goal.against == "memory":
        return f"{measured:.2f} arrays"
    if goal.against == "seconds":
        return f"{measured * 1e6:.2f} us"
    if goal.as_rate:
        return f"{100 / measured:.0f} %"
    return f"{1 / measured:.2f}x" if goal.at_most < 0.5 else f"{measured:.2f}"
