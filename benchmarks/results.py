"""What a run leaves in memory: a record for each case and peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cases import MODES, Case
from .timing import Timing

# Cores that others may use before times are called noisy. A parallel loop waits for its slowest thread, so that another
# program multiplies times by far more than its share of the machine.
NOISY = 0.1
COMPARED = ("eager", "compile", "cross_entropy", "liger", "quack", "floor")


@dataclass(frozen=True)
class Record:
    """One peer on one case.

    Attributes:
        case: what was measured.
        peer: name.
        timing: seconds per call.
        floor: name of the fastest peer that only moves the bytes; "" where none was measured.
        times: median time as a multiple of that of the peers in ``COMPARED`` that were measured.
        error: largest relative error against float64.
        peak_extra_arrays: peak extra memory in (N, C) arrays; None where it was not measured.
        cores_busy_elsewhere: what other programs used while this case was timed; None where that is not known.
    """

    case: Case
    peer: str
    timing: Timing
    floor: str
    times: dict[str, float]
    error: float
    peak_extra_arrays: float | None = None
    cores_busy_elsewhere: float | None = None

    @property
    def is_noisy(self) -> bool:
        return (self.cores_busy_elsewhere or 0.0) > NOISY

    @property
    def gigabytes_per_second(self) -> float:
        return self.case.least_bytes / self.timing.median / 1e9

    @property
    def percent_of_floor(self) -> float | None:
        """The floor's time in percent of this peer's: 100 is as fast as memory allows."""
        return 100 / self.times["floor"] if "floor" in self.times else None

    @property
    def title(self) -> str:
        return f"{self.case}, {MODES[self.case.mode].title}"


def records_of(
    case: Case,
    timings: dict[str, Timing],
    errors: dict[str, float],
    memory: dict[str, float],
    cores_busy_elsewhere: float | None,
) -> list[Record]:
    """Puts the measurements of one case together; all ratios come from the medians of this one run."""
    medians = {name: timing.median for name, timing in timings.items()}
    floor = min((name for name in MODES[case.mode].floors if name in medians), key=medians.__getitem__, default="")
    compared = {name: medians[name] for name in COMPARED if name in medians}
    if floor:
        compared["floor"] = medians[floor]
    return [
        Record(
            case, name, timing, floor, {other: timing.median / median for other, median in compared.items()},
            errors[name], memory.get(name), cores_busy_elsewhere,
        )
        for name, timing in timings.items()
    ]


def find(
    records: Sequence[Record], peer: str, *, loss: str, size: tuple[int, int], dtype: str, mode: str
) -> Record | None:
    """The record of ``peer`` on a loss with its default options, or None."""
    wanted = (loss, *size, dtype, mode, ())
    for record in records:
        case = record.case
        if record.peer == peer and (case.loss, case.rows, case.classes, case.dtype, case.mode, case.options) == wanted:
            return record
    return None
