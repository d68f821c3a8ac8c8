"""The comparison itself must reject kernels that are wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tolerances import Result, assert_as_exact_as_torch, relative_error
from torch import Tensor

from synkern import reference


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, dtype: torch.dtype) -> Result:
    """Weighted cross entropy computed in ``dtype`` with the gradient rounded to the dtype of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    value = reference.cross_entropy_loss(leaf.to(dtype), target) * weight.to(dtype)
    (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return Result(value.detach(), gradient)


def zero_softmax_term(gradient: Tensor, target: Tensor) -> None:
    keep = gradient.gather(1, target[:, None])
    gradient.zero_().scatter_(1, target[:, None], keep)


def zero_last_columns(gradient: Tensor, target: Tensor) -> None:
    gradient[:, -max(1, gradient.shape[1] // 64) :] = 0


def zero_target_column(gradient: Tensor, target: Tensor) -> None:
    gradient.scatter_(1, target[:, None], 0)


def forget_weight_of_one_row(gradient: Tensor, target: Tensor) -> None:
    gradient[1] /= 1.25


def one_nan(gradient: Tensor, target: Tensor) -> None:
    gradient[0, 0] = torch.nan


MUTATIONS = [zero_softmax_term, zero_last_columns, zero_target_column, forget_weight_of_one_row, one_nan]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("c", [3, 1000, 128_000])
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_a_wrong_gradient_is_rejected(mutate: Callable[[Tensor, Tensor], None], c: int, dtype: torch.dtype) -> None:
    logits = torch.randn(4, c, dtype=torch.float64).to(dtype)
    target = torch.randint(0, c, (4,))
    # Large weights keep the small gradients of a float16 softmax above its smallest number.
    weight = torch.full((4,), min(c, 1000), dtype=torch.float64)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = cross_entropy(logits.double(), target, weight, torch.float64)
    torch_result = cross_entropy(logits, target, weight, compute)

    assert_as_exact_as_torch(torch_result, torch_result, expected, target, dtype)
    wrong = Result(torch_result.value, torch_result.gradient.clone())
    mutate(wrong.gradient, target)
    with pytest.raises(AssertionError, match="gradient of the"):
        assert_as_exact_as_torch(wrong, torch_result, expected, target, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wrong_value_is_rejected(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 7, dtype=dtype)
    target = torch.tensor([0, 3, 6, 1])
    expected = cross_entropy(logits.double(), target, torch.ones(4), torch.float64)
    right = cross_entropy(logits, target, torch.ones(4), dtype)
    wrong = Result(right.value * (1 + 1e-4), right.gradient)
    with pytest.raises(AssertionError, match="value"):
        assert_as_exact_as_torch(wrong, right, expected, target, dtype)


def test_relative_error_of_zeros() -> None:
    zeros = torch.zeros(3)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(torch.tensor([0.0, 1e-30, 0.0]), zeros) == float("inf")
