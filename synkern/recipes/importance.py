"""IMP-Loss and DIMP-Loss: Algorithms 1 and 2 of 003, with cross entropy and focal loss to compare.

003 is "Not All LLM-Generated Data Are Equal: Rethinking Data Weighting in Text Classification" (Kuo et al., 2024). D_P'
is a small data set whose labels can be trusted ("real"), D_Q a large one whose labels cannot ("train").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from synkern import fused_cross_entropy, fused_dimp_loss, fused_focal_loss, fused_imp_loss
from synkern.recipes.training import RowLoss, log_probability


class Checkers(Protocol):
    """Two models, each asked for log P(y_i|x_i) of every row of D_Q, (N,); neither changes afterwards."""

    def quality(self) -> Tensor:
        """log P'(y_i|x_i), by a model fitted with cross entropy on D_P'."""

    def diversity(self) -> Tensor:
        """log Q(y_i|x_i), by a model fitted with cross entropy on D_Q."""


@dataclass(frozen=True)
class LossOptions:
    """``gamma`` of the focal loss; ``max_weight`` caps the weights of IMP and DIMP (003 has no cap)."""

    gamma: float = 2.0
    max_weight: float | None = None


def unweighted(logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy with weight 1 for every row (003 Eq. 1 on real, Eq. 3 on generated data): fits the checkers too."""
    return fused_cross_entropy(logits, target), torch.ones(len(rows), device=logits.device)


def cross_entropy(checkers: Checkers, options: LossOptions) -> RowLoss:
    """Every row has weight 1 (003 Eq. 3)."""
    return unweighted


def focal(checkers: Checkers, options: LossOptions) -> RowLoss:
    """w_i = (1 - P(y_i|x_i; theta))^gamma (003 section 2.2)."""

    def row_loss(logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        weight = (-torch.expm1(log_probability(logits, target))) ** options.gamma
        return fused_focal_loss(logits, target, gamma=options.gamma), weight

    return row_loss


def imp(checkers: Checkers, options: LossOptions) -> RowLoss:
    """Algorithm 1: w_i = P'(y_i|x_i) / Q(y_i|x_i), constant (003 Eq. 6)."""
    log_quality = checkers.quality()  # step 1 and the numerators of step 3
    log_diversity = checkers.diversity()  # step 2 and the denominators of step 3

    def row_loss(logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # step 4
        return fused_imp_loss(
            logits,
            target,
            log_quality=log_quality[rows],
            log_diversity=log_diversity[rows],
            max_weight=options.max_weight,
            return_weights=True,
        )

    return row_loss


def dimp(checkers: Checkers, options: LossOptions) -> RowLoss:
    """Algorithm 2: w_i = P'(y_i|x_i) / P(y_i|x_i; theta_t), from the same forward pass (003 Eq. 9)."""
    log_quality = checkers.quality()  # steps 1 and 2

    def row_loss(logits: Tensor, target: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:  # step 3
        return fused_dimp_loss(
            logits, target, log_quality=log_quality[rows], max_weight=options.max_weight, return_weights=True
        )

    return row_loss


METHODS: dict[str, Callable[[Checkers, LossOptions], RowLoss]] = {
    "ce": cross_entropy,
    "focal": focal,
    "imp": imp,
    "dimp": dimp,
}
USES_QUALITY = ("imp", "dimp")
USES_DIVERSITY = ("imp",)
