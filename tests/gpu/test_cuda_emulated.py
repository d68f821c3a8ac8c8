"""The CUDA kernels, run on the processor, against the CPU operators in float64: every kind of row, alignment and launch
plan. What needs the hardware itself (its exponential, its tensor cores, speed) is in test_gpu.py."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import emulated
import pytest
import torch
from built import once
from emulated import INDEX_TYPES, Emulator, Problem, build, compiler_here, poisoned, why_not
from tolerances import FLOOR, relative_error
from torch import Tensor

import synkern._autograd  # noqa: F401  (loads the operators)
from synkern._schema import MEAN, NONE, SUM, LossKind, accumulate_dtype

ops = torch.ops.synkern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF, NAN = float("inf"), float("nan")
# (loss, p0, p1, p2), with a ratio or without
LOSSES = {
    "cross_entropy": (LossKind.CROSS_ENTROPY, (0.0, 0.0, 0.0)),
    "rce": (LossKind.RCE, (-9.2, 0.0, 0.0)),
    "gce": (LossKind.GCE, (0.7, 0.1, 0.0)),
    "sce": (LossKind.SCE, (0.1, 1.0, -9.2)),
    "focal": (LossKind.FOCAL, (2.0, 0.0, 0.0)),
    "imp": (LossKind.IMP, (INF, 1.0, 0.0)),
    "dimp": (LossKind.DIMP, (30.0, 0.0, 1.0)),  # capped, so that float16 can hold the gradient
    "dimp_differentiated": (LossKind.DIMP, (30.0, 0.0, 0.0)),
}


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if missing := why_not(tmp_path_factory.mktemp("probe")):
        pytest.skip(f"the kernels cannot be built for this processor: {missing}")
    commands = Path(emulated.__file__).read_text()
    folder = once(request.config.cache.mkdir("synkern"), "emulated", (str(compiler_here()), commands), build)
    return Emulator(folder / "libemulated.so")


@pytest.fixture
def emulator(library: Emulator) -> Emulator:
    library.configure()
    return library


def make(
    rows: int, classes: int, dtype: torch.dtype, name: str = "cross_entropy", smooth: bool = False,
    logits: Tensor | None = None,
) -> Problem:
    accumulate, (loss, p) = accumulate_dtype(dtype), LOSSES[name]
    target = torch.randint(0, classes, (rows,))
    if rows > 2:
        target[1] = -100
    return Problem(
        torch.randn(rows, classes).mul(3).to(dtype) if logits is None else logits,
        target,
        weight=torch.rand(rows, dtype=accumulate),
        ratio=torch.rand(rows, dtype=accumulate) if loss in (LossKind.IMP, LossKind.DIMP) else None,
        class_weight=torch.rand(classes, dtype=accumulate) if smooth else None,
        loss=int(loss), p=p, label_smoothing=0.1 if smooth else 0.0, z_loss=0.01 if smooth else 0.0,
    )  # fmt: skip


def assert_close(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within what rounding the result, and a sum in another order, may do; NaN where NaN is."""
    assert actual.shape == expected.shape, what
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN elsewhere"
    actual, expected = (x.double().nan_to_num(0, posinf=1.0, neginf=-1.0) for x in (actual, expected))
    assert relative_error(actual, expected) <= 2 * FLOOR[dtype], what


def check_everything(emulator: Emulator, problem: Problem, v: Tensor | None = None) -> None:
    """Every operator against the CPU's in float64."""
    dtype, wide = problem.logits.dtype, problem.double()
    accumulate, rows = accumulate_dtype(dtype), len(problem.target)
    loss, statistics, *gradients = emulator.forward(problem, MEAN, gradient=True)
    expected = ops.row_loss_and_gradient(*wide.operands, *wide.options, MEAN)
    assert_close("loss", loss, expected[0], accumulate)
    # Beside a sum that is NaN the maximum says nothing, and is not the same everywhere.
    ours, theirs = (x.masked_fill(x[1].isnan(), 0) for x in (statistics, expected[1]))
    assert_close("statistics", ours, theirs, accumulate)
    assert_close("gradient", gradients[0], expected[2], dtype)
    assert_close("gradient of the weight", gradients[1], expected[3], accumulate)

    for reduction, grad in ((SUM, torch.tensor(0.7)), (NONE, torch.rand(rows))):
        grad = grad.to(accumulate)
        loss, statistics, *_ = emulator.forward(problem, reduction)
        expected_loss, expected_statistics = ops.row_loss(*wide.operands, *wide.options, reduction)
        assert_close("loss", loss, expected_loss, accumulate)
        backward = emulator.backward(problem, grad, reduction)
        arguments = (grad.double(), *wide.operands, expected_statistics, *wide.options, reduction)
        for what, actual, wanted in zip(
            ("backward", "of weight"), backward, ops.row_loss_backward(*arguments), strict=True
        ):
            assert_close(what, actual, wanted, dtype if what == "backward" else accumulate)

    v = torch.randn(problem.logits.shape).to(dtype) if v is None else v
    k, extra = torch.rand(rows, dtype=accumulate), torch.rand(rows, dtype=accumulate)
    shared = (wide.logits, wide.target, wide.ratio, wide.class_weight, expected_statistics, *wide.options)
    assert_close("tangent", emulator.tangent(problem, v, k), ops.row_loss_tangent(v.double(), k.double(), *shared), accumulate)  # noqa: E501  # fmt: skip
    hvp = emulator.hvp(problem, v, k, extra)
    expected_hvp = ops.row_loss_hvp(v.double(), k.double(), extra.double(), *shared)
    assert_close("hvp", hvp[0], expected_hvp[0], dtype)
    assert_close("derivative along v", hvp[1], expected_hvp[1], accumulate)


# Rows in registers of a part of a warp, in shared memory of a warp, of a block.
@pytest.mark.parametrize("shape", [(6, 3), (4, 1), (9, 100), (3, 129), (5, 1001), (2, 5000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smooth", [False, True])
def test_operators_agree_with_the_cpu(
    emulator: Emulator, shape: tuple[int, int], dtype: torch.dtype, smooth: bool
) -> None:
    check_everything(emulator, make(*shape, dtype, "dimp", smooth))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [14, 300])
def test_losses_agree_with_the_cpu(emulator: Emulator, name: str, classes: int) -> None:
    check_everything(emulator, make(5, classes, torch.float32, name))


# Shared memory of a multiprocessor, whether it has clusters, and what 5000 bfloat16 classes (10 kB) are taken by.
PLANS = {
    "block": (40_000, True, 1), "2 blocks": (16_000, True, 2), "4 blocks": (10_000, True, 4),
    "8 blocks": (4_500, True, 8), "8 full blocks": (1_400, True, 8), "all of one": (12_000, False, 1),
    "read again": (1_000, True, 1), "read again by one": (9_000, False, 1),
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("offset", [0, 3])
def test_every_launch_plan(emulator: Emulator, plan: str, offset: int) -> None:
    shared_bytes, clusters, cluster = PLANS[plan]
    emulator.configure(1, shared_bytes, clusters)
    logits = torch.randn(3, 5003)[:, offset : offset + 5000].mul(3).bfloat16()
    problem = make(3, 5000, torch.bfloat16, logits=logits, smooth=offset > 0)
    emulator.forward(problem, SUM, gradient=True)
    assert max(launch.cluster for launch in emulator.launches()) == cluster
    emulator.configure(1, shared_bytes, clusters)
    check_everything(emulator, problem)


def test_few_long_rows_fill_the_device(emulator: Emulator) -> None:
    problem = make(2, 40_000, torch.bfloat16)
    _, statistics, gradient, _ = emulator.forward(problem, MEAN, gradient=True)
    assert max(launch.cluster for launch in emulator.launches()) == 4
    wide = problem.double()
    expected = ops.row_loss_and_gradient(*wide.operands, *wide.options, MEAN)
    assert_close("statistics", statistics, expected[1], torch.float32)
    assert_close("gradient", gradient, expected[2], torch.bfloat16)
    backward = emulator.backward(problem, torch.tensor(1.0), MEAN)[0]
    assert max(launch.parts for launch in emulator.launches()) > 1
    assert torch.equal(backward, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [7, 500, 2100])
@pytest.mark.parametrize("z_offset, v_offset, padding", [(1, 1, 0), (2, 5, 3), (0, 0, 8), (7, 0, 1), (0, 1, 0)])
def test_rows_anywhere(
    emulator: Emulator, dtype: torch.dtype, classes: int, z_offset: int, v_offset: int, padding: int
) -> None:
    def placed(offset: int) -> Tensor:
        flat = poisoned((3 * (classes + padding) + 16,), dtype)
        start = -flat.data_ptr() % 16 // flat.element_size() + offset
        rows = flat.as_strided((3, classes), (classes + padding, 1), start)
        return rows.copy_(torch.randn(3, classes) * 3)

    emulator.configure(shared_bytes=30_000)
    check_everything(emulator, make(3, classes, dtype, logits=placed(z_offset)), placed(v_offset))


def test_rows_far_apart(emulator: Emulator) -> None:
    """Distances beyond 32 bits; most of the memory is never touched."""
    try:
        memory = torch.empty(2 * 2**31 + 5000, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 8 GB of address space")
    for classes in (5, 300, 4000):
        near = torch.randn(3, classes).bfloat16()
        far = memory.as_strided((3, classes), (2**31, 1)).copy_(near)
        problem, other = make(3, classes, torch.bfloat16, logits=far), None
        other = Problem(near, problem.target, problem.weight)
        for actual, expected in zip(
            emulator.forward(problem, MEAN, gradient=True), emulator.forward(other, MEAN, gradient=True), strict=True
        ):
            assert torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1))
        k = torch.ones(3)
        assert torch.equal(emulator.tangent(problem, far, k), emulator.tangent(other, near, k))
        assert torch.equal(emulator.hvp(problem, far, k, None)[0], emulator.hvp(other, near, k, None)[0])


SPECIAL = {
    "nan": (NAN, 0.0), "inf": (INF, 0.0), "masked": (-INF, 0.0), "all masked": (-INF, -INF), "ties": (2.0, 2.0),
    "large": (3e4, -3e4),
}  # fmt: skip


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("classes", [5, 300, 3000])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_special_values(emulator: Emulator, special: str, classes: int, dtype: torch.dtype) -> None:
    one, others = SPECIAL[special]
    logits = torch.full((4, classes), others)
    logits[:2, classes // 2] = one
    logits[2:, 0] = 1.0
    problem = make(4, classes, dtype, logits=logits.to(dtype))
    problem.target = torch.tensor([classes // 2, 0, 1, classes - 1])
    check_everything(emulator, problem)


@pytest.mark.parametrize("classes", [3, 300, 3000])
def test_digits_of_a_confident_row(emulator: Emulator, classes: int) -> None:
    problem = Problem(torch.full((1, classes), -40.0), torch.tensor([classes - 1]))
    problem.logits[0, -1] = 0.0
    loss, statistics, gradient, _ = emulator.forward(problem, SUM, gradient=True)
    rest = (classes - 1) * math.exp(-40)
    assert loss.item() == pytest.approx(rest, rel=1e-6, abs=0)
    assert statistics[1].item() == pytest.approx(rest, rel=1e-6, abs=0)
    assert gradient[0, -1].item() == pytest.approx(-rest, rel=1e-6, abs=0)


@pytest.mark.parametrize("classes", [3, 300, 3000])
def test_a_weight_of_zero_is_exact(emulator: Emulator, classes: int) -> None:
    problem = make(4, classes, torch.float32)
    problem.logits[2] = INF
    problem.weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    loss, _, gradient, _ = emulator.forward(problem, MEAN, gradient=True)
    assert loss.isfinite() and gradient.isfinite().all()
    assert not gradient[1:3].any()


@pytest.mark.parametrize("classes", [3, 300, 3000])
@pytest.mark.parametrize("target", [-1, 2**40, "classes"])
def test_a_target_out_of_range_makes_its_row_nan(emulator: Emulator, classes: int, target: int | str) -> None:
    problem = make(4, classes, torch.float32)
    assert problem.weight is not None
    problem.target[2] = classes if target == "classes" else target
    problem.weight[2] = 0.0
    losses, _, _, _ = emulator.forward(problem, NONE)
    _, _, gradient, grad_weight = emulator.forward(problem, MEAN, gradient=True)
    bad = torch.tensor([False, False, True, False])
    results = [losses, gradient, grad_weight, *emulator.backward(problem, torch.ones(4), NONE)]
    results += [emulator.tangent(problem, problem.logits, None)]
    results += emulator.hvp(problem, problem.logits, torch.ones(4), None)
    for result in results:
        assert torch.equal(result.isnan().reshape(4, -1).all(-1), bad)
        assert not result[~bad].isnan().any()


@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("class_weighted", [False, True])
def test_reductions_over_many_rows(emulator: Emulator, classes: int, class_weighted: bool) -> None:
    """One block, several partial sums, and two rounds of them; the same bits on a device of another size."""
    for rows in (0, 1, 5000, 17_000) if classes == 3 else (0, 5):
        problem = make(rows, classes, torch.float32)
        problem.class_weight = torch.rand(classes) if class_weighted else None
        emulator.configure(multiprocessors=3)
        loss = emulator.forward(problem, MEAN)[0]
        wide = problem.double()
        assert_close("loss", loss, ops.row_loss(*wide.operands, *wide.options, MEAN)[0], torch.float32)
        emulator.configure(multiprocessors=200)
        assert torch.equal(emulator.forward(problem, MEAN)[0].nan_to_num(-1), loss.nan_to_num(-1))


def test_a_small_batch_takes_one_launch(emulator: Emulator) -> None:
    problem = make(32, 3, torch.float32)
    emulator.forward(problem, MEAN, gradient=True)
    assert len(emulator.launches()) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 300])
def test_rescaling(emulator: Emulator, dtype: torch.dtype, classes: int) -> None:
    accumulate = accumulate_dtype(dtype)
    problem = make(5, classes, dtype)
    _, _, gradient, grad_weight = emulator.forward(problem, MEAN, gradient=True)
    before = gradient.clone(), grad_weight.clone()
    emulator.rescale(problem, torch.ones((), dtype=accumulate), gradient, grad_weight)
    assert torch.equal(gradient, before[0]) and torch.equal(grad_weight, before[1])
    factor = torch.tensor(0.37, dtype=accumulate)
    emulator.rescale(problem, factor, gradient, grad_weight)
    expected = emulator.backward(problem, factor, MEAN)
    assert_close("gradient", gradient, expected[0], dtype)
    assert_close("gradient of the weight", grad_weight, expected[1], accumulate)


@pytest.mark.parametrize("index", INDEX_TYPES, ids=str)
def test_types_of_targets(emulator: Emulator, index: torch.dtype) -> None:
    problem = make(6, 100, torch.float32)
    problem.target, problem.ignore_index = problem.target.clamp(min=7).to(index), 7
    problem.__post_init__()
    check_everything(emulator, problem)


CONTRACTIONS = [(5, 3, 4, 5), (130, 40, 129, 10), (64, 33, 140, 8), (6, 0, 3, 2), (6, 5, 0, 2), (0, 5, 3, 0)]


def sums(rows: Tensor, samples: int, sample: Tensor | None) -> Tensor:
    index = torch.arange(len(rows)) // max(len(rows) // max(samples, 1), 1) if sample is None else sample
    return torch.zeros(samples, dtype=torch.float64).index_add_(0, index, rows)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("rows, inputs, outputs, samples", CONTRACTIONS)
@pytest.mark.parametrize(
    "dtype, v_dtype", [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)], ids=str
)
def test_linear_contraction(
    emulator: Emulator, dtype: torch.dtype, v_dtype: torch.dtype, rows: int, inputs: int, outputs: int, samples: int,
    indexed: bool,
) -> None:
    accumulate = accumulate_dtype(dtype)
    a, b, v = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype), torch.randn(outputs, inputs)
    v, v_bias = v.to(v_dtype), torch.randn(outputs, dtype=accumulate)
    sample = torch.randint(0, max(samples, 1), (rows,)) if indexed else None
    out = emulator.contraction("linear", samples, b, a=a, v=v, v_bias=v_bias, sample=sample)
    by_row = (b.double() * (a.double() @ v.double().T + v_bias.double())).sum(1)
    size = ((b.double().abs() * (a.double().abs() @ v.double().abs().T)).sum(1)).max() if rows else torch.tensor(0.0)
    error = (out.double() - sums(by_row, samples, sample)).abs()
    assert (error <= 8 * torch.finfo(accumulate).eps * (size + 1)).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_and_norm_contraction(emulator: Emulator, dtype: torch.dtype, offset: int) -> None:
    accumulate, rows, size, samples = accumulate_dtype(dtype), 21, 77, 4
    b, x, v = (torch.randn(rows, size + offset)[:, offset:].to(dtype).contiguous() for _ in range(3))
    b = torch.nn.functional.pad(b, (offset, 0))[:, offset:]
    sample, index = torch.randint(0, samples, (rows,)), torch.randint(0, rows, (rows,))
    bound = 64 * torch.finfo(accumulate).eps * rows
    out = emulator.contraction("embedding", samples, b, a=index, v=v, sample=sample)
    expected = sums((b.double() * v.double()[index]).sum(1), samples, sample)
    assert ((out.double() - expected).abs() <= bound * (1 + expected.abs())).all()

    mean, rstd = torch.randn(rows, dtype=accumulate), torch.rand(rows, dtype=accumulate)
    v_weight, v_bias = torch.randn(size, dtype=accumulate), torch.randn(size, dtype=accumulate)
    for of_mean, of_weight, of_bias in ((mean, v_weight, v_bias), (None, v_weight, None), (mean, None, v_bias)):
        out = emulator.contraction(
            "norm", samples, b, a=x, v=of_weight, v_bias=of_bias, mean=of_mean, rstd=rstd, sample=sample
        )
        centred = x.double() - (0 if of_mean is None else of_mean.double()[:, None])
        change = (0 if of_weight is None else of_weight.double()) * centred * rstd.double()[:, None]
        expected = sums((b.double() * (change + (0 if of_bias is None else of_bias.double()))).sum(1), samples, sample)
        assert ((out.double() - expected).abs() <= bound * (1 + expected.abs())).all()


def test_contraction_indices_out_of_range_are_nan(emulator: Emulator) -> None:
    b, v = torch.randn(6, 8), torch.randn(3, 8)
    out = emulator.contraction("embedding", 3, b, a=torch.tensor([0, 1, 2, 3, 0, 0]), v=v)
    assert out.isnan().tolist() == [False, True, False]
    out = emulator.contraction("embedding", 3, b, a=torch.zeros(6, dtype=torch.long), v=v, sample=torch.arange(6))
    assert out.isnan().all()


def test_reductions_have_one_order(emulator: Emulator) -> None:
    problem = make(40, 3000, torch.float32)
    runs = [emulator.forward(problem, MEAN, gradient=True) for _ in range(3)]
    for first, second in pairwise(runs):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
