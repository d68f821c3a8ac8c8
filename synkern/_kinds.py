"""The losses' numbers and constants, shared by the torch and the numpy front ends; imports neither."""

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
