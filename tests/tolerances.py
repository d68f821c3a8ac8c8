"""The one place that says how close is close enough.

A kernel is judged against the reference in float64, beside PyTorch's own error in the same dtype:

    error(kernel) <= 2 * error(PyTorch) + floor(dtype)

Value, gradient of the target column and gradient of the other columns are judged separately, because they differ in
size by a factor of C: with one absolute tolerance, a kernel that writes zero to every other column passes at C =
128,000. The error of an entry is its distance from the reference, divided by the entry's own size plus the mean size
of the entries of its group: for the other columns those of its row, else all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Error that is allowed where PyTorch makes none. Rounding of the result, and of a sum over C entries in one order or
# another; for the 16-bit dtypes, whose values are computed and returned in float32, one rounding of the gradient.
FLOOR = {
    torch.float64: 2**14 * torch.finfo(torch.float64).eps,
    torch.float32: 16 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
    torch.float16: torch.finfo(torch.float16).eps / 2,
}

# For two float64 computations of the same quantity, by routes whose roundings differ.
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}


@dataclass(frozen=True)
class Result:
    """What a loss gave: unreduced value (N,), and gradient (N, C) for some cotangent."""

    value: Tensor
    gradient: Tensor


def relative_error(actual: Tensor, expected: Tensor, mean_over: int | None = None) -> float:
    """Largest error relative to an entry's size plus the mean size, the mean taken over one dimension or over all."""
    actual, expected = actual.double(), expected.double()
    if expected.numel() == 0:
        return 0.0
    size = expected.abs()
    scale = size + (size.mean() if mean_over is None else size.mean(dim=mean_over, keepdim=True))
    distance = (actual - expected).abs()
    error = torch.where(distance == 0, torch.zeros_like(distance), distance / scale)
    return float("inf") if error.isnan().any() else error.max().item()


def split_columns(gradient: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target's column (N,) and the other columns (N, C - 1) of a gradient."""
    is_target = torch.zeros_like(gradient, dtype=torch.bool)
    is_target[torch.arange(len(target)), target.long()] = True
    return gradient[is_target], gradient[~is_target].view(gradient.shape[0], gradient.shape[1] - 1)


def errors(result: Result, expected: Result, target: Tensor) -> dict[str, float]:
    on_target, elsewhere = split_columns(result.gradient, target)
    expected_on_target, expected_elsewhere = split_columns(expected.gradient, target)
    return {
        "value": relative_error(result.value, expected.value),
        "gradient of the target column": relative_error(on_target, expected_on_target),
        "gradient of the other columns": relative_error(elsewhere, expected_elsewhere, mean_over=1),
    }


def assert_as_exact_as_torch(
    kernel: Result, torch_result: Result, expected: Result, target: Tensor, dtype: torch.dtype
) -> None:
    """``error(kernel) <= 2 * error(torch) + floor(dtype)`` for value, target column and other columns."""
    kernel_errors, torch_errors = errors(kernel, expected, target), errors(torch_result, expected, target)
    for part, error in kernel_errors.items():
        # Values of 16-bit logits are float32.
        floor = FLOOR[kernel.value.dtype] if part == "value" else FLOOR[dtype]
        allowed = 2 * torch_errors[part] + floor
        assert error <= allowed, (
            f"{part}: error {error:.3g}, allowed {allowed:.3g}, PyTorch's is {torch_errors[part]:.3g}"
        )


def assert_float64_equal(actual: object, expected: object, message: str | None = None) -> None:
    """Two float64 computations agree; for tensors and trees of tensors."""
    torch.testing.assert_close(
        actual, expected, **FLOAT64, equal_nan=True, msg=message and (lambda m: f"{message}: {m}")
    )

# Scores s_i = <v, grad l_i> by an exact method against float64, in units of the largest score of the batch.
SCORES = {torch.float64: 1e-10, torch.float32: 1e-5}

# The same by differences of losses: bfloat16 means autocast, with float32 parameters.
DIFFERENCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.1}
