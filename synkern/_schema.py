"""The numbers of the operator schema."""

from __future__ import annotations

import enum

import torch


class LossKind(enum.IntEnum):
    """Scalar functions, numbered as in ``csrc/losses/losses.h``."""

    CROSS_ENTROPY = 0
    RCE = 1
    GCE = 2
    SCE = 3
    FOCAL = 4
    IMP = 5
    DIMP = 6


NONE, SUM, MEAN = 0, 1, 2
REDUCTIONS = {"none": NONE, "sum": SUM, "mean": MEAN}

STATISTICS_ROWS = 5
RATIO_ROW = 3  # row of the statistics that holds the IMP or DIMP weight
DENOMINATOR_ROW = 4  # what the row's loss was divided by


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of losses, weights and statistics: float64 for float64 logits, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32
