"""The numbers of the operator schema."""

from __future__ import annotations

import torch

from ._kinds import LossKind

__all__ = [
    "DENOMINATOR_ROW", "MEAN", "NONE", "RATIO_ROW", "REDUCTIONS", "STATISTICS_ROWS", "SUM", "LossKind",
    "accumulate_dtype",
]


NONE, SUM, MEAN = 0, 1, 2
REDUCTIONS = {"none": NONE, "sum": SUM, "mean": MEAN}

STATISTICS_ROWS = 5
RATIO_ROW = 3  # row of the statistics that holds the IMP or DIMP weight
DENOMINATOR_ROW = 4  # what the row's loss was divided by


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of losses, weights and statistics: float64 for float64 logits, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32
