"""The operators of the per-sample meta-gradient against float64 sums in plain torch."""

from __future__ import annotations

import pytest
import torch
from tolerances import FLOOR
from torch import Tensor
from torch import library as torch_library

import synkern.losses  # noqa: F401  (loads the operators and their fake kernels)

OPS = torch.ops.synkern
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# rows, inputs, outputs, samples: below, at and above the kernel's tiles (6 rows, 16 columns) and blocks (96, 256)
SHAPES = [(1, 1, 1, 1), (6, 3, 5, 2), (7, 256, 16, 7), (12, 300, 17, 4), (96, 512, 64, 3), (202, 257, 33, 2)]


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_sample(rows: Tensor, sample: Tensor | None, samples: int) -> Tensor:
    if sample is None:
        return rows.view(samples, -1).sum(1)
    return rows.new_zeros(samples).index_add_(0, sample, rows)


def assert_close(actual: Tensor, dots: Tensor, magnitude: Tensor, sample: Tensor | None, dtype: torch.dtype) -> None:
    """Within rounding of float32 (or float64) sums: relative to the sum of the absolute values of all terms."""
    samples = actual.shape[0]
    expected, scale = by_sample(dots, sample, samples), by_sample(magnitude, sample, samples)
    assert actual.dtype == accumulate(dtype)
    floor = FLOOR[accumulate(dtype)] if dtype != torch.float64 else 64 * torch.finfo(dtype).eps
    error = ((actual.double() - expected).abs() / (scale + torch.finfo(torch.float64).tiny)).max().item()
    assert error <= floor, f"error {error:.3g} of the terms' size, allowed {floor:.3g}"


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype, shape: tuple[int, ...], bias: bool, with_index: bool) -> None:
    rows, inputs, outputs, samples = shape
    a, b, v = (torch.randn(s).to(dtype) for s in ((rows, inputs), (rows, outputs), (outputs, inputs)))
    v_bias = torch.randn(outputs, dtype=accumulate(dtype)) if bias else None
    sample = torch.randint(samples, (rows,)) if with_index else None
    actual = OPS.linear_contraction(a, b, v, v_bias, sample, samples)
    a, b, v = a.double(), b.double(), v.double()
    shift = 0.0 if v_bias is None else v_bias.double()
    magnitude = (b.abs() * (a.abs() @ v.abs().T + (0.0 if v_bias is None else v_bias.double().abs()))).sum(1)
    assert_close(actual, (b * (a @ v.T + shift)).sum(1), magnitude, sample, dtype)


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype, with_index: bool) -> None:
    index, b, v = torch.randint(11, (30,)), torch.randn(30, 37).to(dtype), torch.randn(11, 37).to(dtype)
    sample = torch.randint(5, (30,)) if with_index else None
    actual = OPS.embedding_contraction(index, b, v, sample, 5)
    terms = b.double() * v.double()[index]
    assert_close(actual, terms.sum(1), terms.abs().sum(1), sample, dtype)


@pytest.mark.parametrize("weight,bias,centred", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype, weight: bool, bias: bool, centred: bool) -> None:
    wide = accumulate(dtype)
    x, b = torch.randn(24, 37).to(dtype), torch.randn(24, 37).to(dtype)
    mean = x.to(wide).mean(1) if centred else None
    rstd = x.to(wide).square().mean(1).rsqrt()
    v_weight = torch.randn(37, dtype=wide) if weight else None
    v_bias = torch.randn(37, dtype=wide) if bias else None
    actual = OPS.norm_contraction(x, b, mean, rstd, v_weight, v_bias, None, 4)
    normed = (x.double() - (0 if mean is None else mean.double()[:, None])) * rstd.double()[:, None]
    zero = torch.zeros(37, dtype=torch.float64)
    v_weight, v_bias = (zero if v is None else v.double() for v in (v_weight, v_bias))
    terms = b.double() * normed * v_weight, b.double() * v_bias
    assert_close(actual, sum(terms).sum(1), sum(t.abs() for t in terms).sum(1), None, dtype)


def test_direction_in_float32_beside_16_bit_activations() -> None:
    a, b, v = torch.randn(8, 40).bfloat16(), torch.randn(8, 24).bfloat16(), torch.randn(24, 40)
    actual = OPS.linear_contraction(a, b, v, None, None, 2)
    terms = b.double() * (a.double() @ v.double().T)
    assert_close(actual, terms.sum(1), (b.double().abs() * (a.double().abs() @ v.double().abs().T)).sum(1), None,
                 torch.bfloat16)


def test_strided_operands_are_read_where_they_lie() -> None:
    a, b, v = torch.randn(12, 80)[:, 8:48], torch.randn(24, 24)[::2], torch.randn(40, 24).T
    expected = (b.double() * (a.double() @ v.double().T)).sum(1).view(3, 4).sum(1)
    torch.testing.assert_close(OPS.linear_contraction(a, b, v, None, None, 3).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("live", [[], [0], [1, 2, 97, 98, 250], list(range(3, 290, 2))], ids=len)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_gradient_add_nothing(dtype: torch.dtype, live: list[int]) -> None:
    a, b, v = torch.randn(300, 40).to(dtype), torch.zeros(300, 24).to(dtype), torch.randn(24, 40).to(dtype)
    b[live] = torch.randn(len(live), 24).to(dtype)
    bias = torch.randn(24, dtype=accumulate(dtype))
    actual = OPS.linear_contraction(a, b, v, bias, None, 10)
    moved, size = a.double() @ v.double().T + bias.double(), a.double().abs() @ v.double().abs().T + bias.double().abs()
    assert_close(actual, (b.double() * moved).sum(1), (b.double().abs() * size).sum(1), None, dtype)
    a[b.eq(0).all(1)] = float("inf")
    assert torch.equal(OPS.linear_contraction(a, b, v, bias, None, 10), actual)


@pytest.mark.parametrize("rows,samples", [(0, 0), (0, 3)])
def test_no_rows(rows: int, samples: int) -> None:
    result = OPS.linear_contraction(torch.randn(rows, 4), torch.randn(rows, 5), torch.randn(5, 4), None, None, samples)
    assert result.tolist() == [0.0] * samples


def test_same_bits_for_any_number_of_threads() -> None:
    a, b, v = torch.randn(500, 130), torch.randn(500, 70), torch.randn(70, 130)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OPS.linear_contraction(a, b, v, None, None, 10))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: OPS.linear_contraction(torch.ones(4, 3), torch.ones(5, 2), torch.ones(2, 3), None, None, 1), "a must"),
        (lambda: OPS.linear_contraction(torch.ones(4, 3), torch.ones(4, 2), torch.ones(3, 2), None, None, 1), "v must"),
        (lambda: OPS.linear_contraction(torch.ones(4, 3), torch.ones(4, 2), torch.ones(2, 3), None, None, 3), "equal"),
        (
            lambda: OPS.linear_contraction(
                torch.ones(2, 3), torch.ones(2, 2), torch.ones(2, 3), None, torch.tensor([0, 9]), 2
            ),
            r"sample\[1\] is 9",
        ),
        (
            lambda: OPS.embedding_contraction(torch.tensor([0, 7]), torch.ones(2, 3), torch.ones(4, 3), None, 1),
            r"index\[1\] is 7",
        ),
        (
            lambda: OPS.norm_contraction(
                torch.ones(2, 3), torch.ones(2, 4), None, torch.ones(2), None, None, None, 1
            ),
            "same shape",
        ),
        (
            lambda: OPS.linear_contraction(torch.ones(4, 3).int(), torch.ones(4, 2), torch.ones(2, 3), None, None, 1),
            "dtype of b",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_kernels_fit(dtype: torch.dtype) -> None:
    a, b, v = torch.randn(6, 3).to(dtype), torch.randn(6, 5).to(dtype), torch.randn(5, 3).to(dtype)
    rstd, sample = torch.rand(6, dtype=accumulate(dtype)), torch.tensor([0, 1, 1, 0, 2, 2])
    for operator, arguments in (
        (OPS.linear_contraction, (a, b, v, None, sample, 3)),
        (OPS.embedding_contraction, (sample, b, torch.randn(4, 5).to(dtype), None, 2)),
        (OPS.norm_contraction, (b, b, None, rstd, torch.rand(5, dtype=accumulate(dtype)), None, None, 2)),
    ):
        torch_library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
