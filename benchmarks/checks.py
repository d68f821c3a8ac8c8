"""No number is reported for a peer whose results are wrong: each is held against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from synkern.registry import LOSSES

from .cases import Problem
from .peers import Peer, Step

# Allowed error: of a value relative to its size, of a derivative relative to an entry's size plus the mean size in its
# group. 16-bit arithmetic, as eager PyTorch does it, rounds t = log p to 3 digits, which at t = -12 moves e^t by some
# percent; second derivatives subtract such numbers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
SECOND_DERIVATIVE = 5
SAMPLED_ROWS = 32
CHUNK_ENTRIES = 1 << 22  # of float64 at a time


class WrongResult(RuntimeError):
    """A peer's result is further from float64 than its dtype explains."""


class Expected:
    """What a problem's loss and derivatives are in float64. Value and mean tangent take all rows, the rest a sample."""

    def __init__(self, problem: Problem, computes: str) -> None:
        of_case = computes == "case"
        self.reference = problem.case.spec.reference if of_case else LOSSES[computes].reference
        self.options = problem.options if of_case else {}
        self.operands = {name: x.double() for name, x in problem.operands.items()} if of_case else {}
        self.problem, self.count = problem, problem.case.rows
        step = max(1, self.count // SAMPLED_ROWS)
        self.rows = torch.arange(0, self.count, step, device=problem.logits.device)
        self._known: dict[str, Tensor] = {}

    def __getitem__(self, quantity: str) -> Tensor:
        if quantity not in self._known:
            build = {
                "value": self._value,
                "gradient": lambda: self._gradient(self.rows)[1],
                "row tangents": self._row_tangents,
                "mean tangent": lambda: self["row tangents"].mean(),
                "hvp": self._hvp,
            }
            self._known[quantity] = build[quantity]()
        return self._known[quantity]

    def _losses(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = self.problem.logits.detach()[rows].double().requires_grad_()
        operands: dict[str, Any] = {name: x[rows] for name, x in self.operands.items()}
        return leaf, self.reference(leaf, self.problem.target[rows], **operands, **self.options)

    def _chunks(self) -> Iterator[Tensor]:
        size = max(1, CHUNK_ENTRIES // self.problem.case.classes)
        return iter(torch.arange(self.count, device=self.problem.logits.device).split(size))

    def _value(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._losses(rows)[1] for rows in self._chunks()]).mean()

    def _gradient(self, rows: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        leaf, losses = self._losses(rows)
        return leaf, torch.autograd.grad(losses.sum() / self.count, leaf, create_graph=create_graph)[0]

    def _row_tangents(self) -> Tensor:
        direction = self._direction()
        parts = [(self._gradient(rows)[1] * direction[rows].double()).sum(-1) for rows in self._chunks()]
        return torch.cat(parts) * self.count

    def _hvp(self) -> Tensor:
        leaf, gradient = self._gradient(self.rows, create_graph=True)
        return torch.autograd.grad(gradient, leaf, self._direction()[self.rows].double())[0]

    def _direction(self) -> Tensor:
        assert self.problem.direction is not None
        return self.problem.direction

    def error(self, quantity: str, actual: Tensor) -> float:
        """The largest relative error of what a peer computed."""
        actual, expected = actual.detach(), self[quantity]
        if quantity in ("gradient", "hvp"):
            return self._matrix_error(actual[self.rows].double(), expected)
        if quantity == "value":
            return _relative(actual.double(), expected, torch.zeros_like(expected))
        return _relative(actual.double(), expected, self["row tangents"].abs().mean())

    def _matrix_error(self, actual: Tensor, expected: Tensor) -> float:
        """Target's column and other columns apart: the latter are smaller by a factor of C."""
        is_target = torch.zeros_like(expected, dtype=torch.bool)
        is_target[torch.arange(len(self.rows)), self.problem.target[self.rows]] = True
        on_target = _relative(actual[is_target], expected[is_target], expected[is_target].abs().mean())
        others = expected.masked_fill(is_target, 0).abs().sum(-1, keepdim=True) / max(1, expected.shape[-1] - 1)
        elsewhere = _relative(actual.masked_fill(is_target, 0), expected.masked_fill(is_target, 0), others)
        return max(on_target, elsewhere)


def _relative(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    distance = (actual - expected).abs()
    error = torch.where(distance == 0, 0.0, distance / (expected.abs() + scale))
    return float("inf") if error.isnan().any() else error.max().item()


def _floor_outcome(problem: Problem, quantity: str) -> Tensor:
    logits = problem.logits.detach()
    return logits if quantity == "copy" or problem.direction is None else logits + problem.direction


def check(peer: Peer, step: Step, problem: Problem, expected: dict[str, Expected]) -> float:
    """Runs the peer once and returns the largest error of its results.

    Args:
        peer: whose results they are.
        step: its call.
        problem: the tensors it ran on.
        expected: references already built for this problem, by what they compute; a missing one is added.

    Raises:
        WrongResult: names peer, case, quantity, error and what was allowed.
    """
    outcome, worst = step.outcome(), 0.0
    for quantity, actual in outcome.items():
        allowed = TOLERANCE[problem.logits.dtype] * (SECOND_DERIVATIVE if quantity == "hvp" else 1)
        if peer.computes is None:
            error = 0.0 if torch.equal(actual, _floor_outcome(problem, quantity)) else float("inf")
        else:
            if peer.computes not in expected:
                expected[peer.computes] = Expected(problem, peer.computes)
            error = expected[peer.computes].error(quantity, actual)
        if not error <= allowed:
            raise WrongResult(
                f"{peer.name}, {problem.case}, {problem.case.mode}: {quantity} is off by a relative {error:.3g} from "
                f"the float64 reference, allowed {allowed:.3g}; nothing is reported until that is right"
            )
        worst = max(worst, error)
    return worst
