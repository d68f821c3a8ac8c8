"""What only a GPU can show: that nothing waits for it, graphs, streams, several of them, and sizes beyond 32 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import FLOAT_DTYPES, Case, Inputs, cases, make_inputs
from test_values import eager_result, kernel_result
from tolerances import assert_as_exact_as_torch
from torch import Tensor
from torch.func import grad, jvp

import synkern
from synkern.registry import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

ALL = [case for case in cases() if case.backend != "cpu"]
DEFAULTS = [case for case in ALL if not case.options]
ONE_LOSS = [case for case in DEFAULTS if case.name == "dimp"]
# Both sides of every tile: many rows a block, a row on chip, a row that is walked.
SIZES = [(1, 1), (32, 3), (70_000, 3), (1000, 14), (300, 256), (200, 1000), (64, 8192), (16, 32_000), (8, 128_003)]


def training_step(case: Case, inputs: Inputs, **arguments: Any) -> list[Tensor]:
    """Loss, and gradients of logits and sample weights."""
    leaves = [inputs.logits.detach().requires_grad_(), inputs.sample_weight.detach().requires_grad_()]
    loss = case.fused(leaves[0], inputs.target, sample_weight=leaves[1], **inputs.operands, **arguments)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def everything(case: Case, inputs: Inputs) -> list[Tensor]:
    """The same, and tangents, Hessian-vector products and double backward, in every reduction."""
    v = torch.ones_like(inputs.logits)

    def rows(z: Tensor) -> Tensor:
        return case.fused(z, inputs.target, reduction="none", class_weight=inputs.class_weight, **inputs.operands)

    results = [x for reduction in ("mean", "weighted_mean", "sum", "none")
               for x in training_step(case, inputs, reduction=reduction)]  # fmt: skip
    results += jvp(rows, (inputs.logits,), (v,))
    results += jvp(grad(lambda z: rows(z).sum()), (inputs.logits,), (v,))
    z = inputs.logits.detach().requires_grad_()
    (first,) = torch.autograd.grad(case.fused(z, inputs.target, **inputs.operands), z, create_graph=True)
    return [*results, torch.autograd.grad(first, z, v)[0]]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", ALL, ids=str)
def test_nothing_waits_for_the_device(case: Case, request: pytest.FixtureRequest) -> None:
    inputs = make_inputs(case, 9, 7, torch.float32)
    everything(case, inputs)  # compiles
    request.getfixturevalue("no_waiting")
    everything(case, inputs)


def test_waiting_would_be_noticed(no_waiting: None) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_as_exact_as_torch_at_every_length(case: Case, size: tuple[int, int], dtype: torch.dtype) -> None:
    n, c = size
    inputs = make_inputs(case, n, c, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cotangent = (min(c, 1000) * (0.5 + torch.rand(n, dtype=torch.float64, device=case.device))).to(wide)
    expected = eager_result(case, inputs, cotangent, torch.float64, torch.float64)
    torch_result = eager_result(case, inputs, cotangent, wide, dtype)
    assert_as_exact_as_torch(kernel_result(case, inputs, cotangent), torch_result, expected, inputs.target, dtype)


@pytest.mark.parametrize("size", [(70_000, 3), (300, 1000), (16, 32_000)], ids=str)
@pytest.mark.parametrize("case", ONE_LOSS, ids=str)
def test_same_bits_every_time(case: Case, size: tuple[int, int]) -> None:
    inputs = make_inputs(case, *size, torch.float32)
    first = training_step(case, inputs)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, training_step(case, inputs), strict=True))


@pytest.mark.parametrize("size", [(32, 3), (64, 1000), (16, 32_000)], ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_a_captured_step_reads_what_its_inputs_hold(case: Case, size: tuple[int, int]) -> None:
    inputs, other = make_inputs(case, *size, torch.float32), make_inputs(case, *size, torch.float32, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step(case, inputs)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(case, inputs)
    inputs.logits.copy_(other.logits)
    inputs.target.copy_(other.target)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, training_step(case, inputs), strict=True))


@pytest.mark.parametrize("case", ONE_LOSS, ids=str)
def test_kernels_run_on_the_current_stream(case: Case) -> None:
    inputs = make_inputs(case, 4096, 1000, torch.float32)
    expected = training_step(case, inputs)
    later = Inputs(torch.zeros_like(inputs.logits), inputs.target, inputs.sample_weight, inputs.class_weight,
                   inputs.operands)  # fmt: skip
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read zeros meanwhile
        later.logits.copy_(inputs.logits)
        actual = training_step(case, later)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_tensors_of_another_device_than_the_current(case: Case) -> None:
    inputs = make_inputs(case, 9, 300, torch.float32)
    second = torch.device("cuda:1")
    moved = Inputs(
        inputs.logits.to(second), inputs.target.to(second), inputs.sample_weight.to(second),
        inputs.class_weight.to(second), {name: x.to(second) for name, x in inputs.operands.items()},
    )  # fmt: skip
    assert torch.cuda.current_device() == 0
    for a, b in zip(everything(case, moved), everything(case, inputs), strict=True):
        assert a.device == second
        assert torch.equal(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 8])
@pytest.mark.parametrize("classes", [5, 1000, 33_000])
@pytest.mark.parametrize("case", ONE_LOSS, ids=str)
def test_rows_that_are_not_aligned(case: Case, classes: int, offset: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 6, classes, dtype)
    padded = torch.full((6, classes + 9), math.nan, dtype=dtype, device=case.device)
    padded[:, offset : offset + classes] = inputs.logits
    view = Inputs(padded[:, offset : offset + classes], inputs.target, inputs.sample_weight, inputs.class_weight,
                  inputs.operands)  # fmt: skip
    actual, expected = training_step(case, view), training_step(case, inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_a_target_that_is_no_class_makes_its_row_nan(case: Case) -> None:
    inputs = make_inputs(case, 5, 300, torch.float32)
    clean = training_step(case, inputs, reduction="none")
    inputs.target[3] = 300
    hostile = training_step(case, inputs, reduction="none")
    others = [0, 1, 2, 4]
    for a, b in zip(hostile, clean, strict=True):
        assert a[3].isnan().all()
        assert torch.equal(a[others], b[others])


LARGE = 2**31


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(LARGE // 32_000 + 2, 32_000), (1, LARGE + 9)], ids=str)
@pytest.mark.parametrize("case", ONE_LOSS, ids=str)
def test_more_than_2_31_elements(case: Case, shape: tuple[int, int]) -> None:
    """Row and column offsets beyond 32 bits. The logits of all rows share memory, not so the gradient."""
    n, c = shape
    row = torch.zeros(c, dtype=torch.bfloat16, device=case.device)
    row[c - 1] = 20.0
    logits = row.expand(n, c).requires_grad_()
    target = torch.full((n,), c - 1, device=case.device)
    target[0] = c - 2
    quality = torch.full((n,), 0.5, device=case.device)
    loss = synkern.fused_dimp_loss(logits, target, quality, reduction="none", backend=case.backend)
    (gradient,) = torch.autograd.grad(loss, logits, torch.full((n,), 64.0, device=case.device))
    lse = math.log(c - 1 + math.exp(20.0))
    for i in {0, n // 2, n - 1}:
        y = int(target[i])
        t = float(row[y]) - lse
        ratio = 0.5 * math.exp(-t)
        assert loss[i].item() == pytest.approx(-ratio * t, rel=1e-5)
        for k in (0, c // 2, c - 3, c - 2, c - 1):
            expected = 64 * ratio * (math.exp(float(row[k]) - lse) - (k == y))
            assert gradient[i, k].item() == pytest.approx(expected, rel=0.01), (i, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contraction_takes_no_array_of_rows_by_outputs(dtype: torch.dtype) -> None:
    rows, width, samples = 8192, 2048, 64
    a, b, v = (torch.randn(shape, device="cuda").to(dtype) for shape in ((rows, width), (rows, width), (width, width)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scores = torch.ops.synkern.linear_contraction(a, b, v, None, None, samples)
    assert torch.cuda.max_memory_allocated() - before < rows * width * dtype.itemsize // 8
    expected = ((a.double() @ v.double().T) * b.double()).view(samples, -1).sum(1)
    assert float((scores.double() - expected).abs().max() / expected.abs().max()) < 1e-4
    assert torch.equal(scores, torch.ops.synkern.linear_contraction(a, b, v, None, None, samples))


def test_every_loss_has_a_gpu_backend() -> None:
    assert {case.name for case in DEFAULTS} == set(LOSSES)
