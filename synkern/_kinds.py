"""The losses' numbers, constants and ranges, shared by the torch and the numpy front ends; imports neither."""

from __future__ import annotations

import enum
import math

LOG_ZERO = math.log(1e-4)  # SunGen and symmetric cross entropy take this for log 0


class LossKind(enum.IntEnum):
    """Scalar functions, numbered as in ``csrc/losses/losses.h``."""

    CROSS_ENTROPY = 0
    RCE = 1
    GCE = 2
    SCE = 3
    FOCAL = 4
    IMP = 5
    DIMP = 6


def check_range(name: str, what: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises unless low <= value <= high."""
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: {what} must be {bounds}, got {value}")
