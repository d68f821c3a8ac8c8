"""Identities that hold for every loss, and those that tie one loss to another; inputs drawn by hypothesis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import Case, cases
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_float64_equal
from torch import Tensor

import synkern

ALL = cases()
SHIFT_INVARIANT = [case for case in ALL if case.is_shift_invariant]
BACKENDS = synkern.backends.available()


@dataclass
class Problem:
    """Rows of a drawn problem, in float64."""

    logits: Tensor
    target: Tensor
    sample_weight: Tensor
    class_weight: Tensor
    rows: dict[str, Tensor]

    def take(self, index: Tensor) -> Problem:
        """The same problem with these rows."""
        rows = {name: tensor[index] for name, tensor in self.rows.items()}
        return Problem(self.logits[index], self.target[index], self.sample_weight[index], self.class_weight, rows)

    def operands(self, case: Case) -> dict[str, Tensor]:
        return {name: self.rows[name] for name in case.spec.operands}


@st.composite
def problems(draw: st.DrawFn, min_classes: int = 1) -> Problem:
    n, c = draw(st.integers(1, 6)), draw(st.integers(min_classes, 9))

    def numbers(low: float, high: float, count: int) -> Tensor:
        drawn = st.lists(st.floats(low, high, width=32), min_size=count, max_size=count)
        return torch.tensor(draw(drawn), dtype=torch.float64)

    return Problem(
        logits=numbers(-30, 30, n * c).reshape(n, c),
        target=torch.tensor(draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))),
        sample_weight=numbers(-4, 4, n),
        class_weight=numbers(0.125, 4, c),
        rows={"quality": numbers(0.0625, 1, n), "diversity": numbers(0.0625, 1, n)},
    )


def evaluate(case: Case, problem: Problem, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient with respect to the logits."""
    logits = problem.logits.clone().requires_grad_()
    loss = case.fused(logits, problem.target, **{**problem.operands(case), **arguments})
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss.detach(), gradient


def case_of(name: str, backend: str, **options: Any) -> Case:
    return Case(synkern.registry.LOSSES[name], options, backend)


@pytest.mark.parametrize("reduction", ["sum", "weighted_mean"])
@pytest.mark.parametrize("case", ALL, ids=str)
@given(problem=problems(), data=st.data())
def test_weight_zero_is_a_dropped_row(case: Case, reduction: str, problem: Problem, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(problem.target) - 1))
    rest = torch.tensor([k for k in range(len(problem.target)) if k != i], dtype=torch.long)
    weight = problem.sample_weight.abs() + 0.5
    with_zero = weight.clone()
    with_zero[i] = 0
    loss, gradient = evaluate(case, problem, sample_weight=with_zero, reduction=reduction)
    if len(rest) == 0 and reduction == "weighted_mean":
        assert loss.isnan()
        return
    expected, expected_gradient = evaluate(case, problem.take(rest), sample_weight=weight[rest], reduction=reduction)
    assert gradient[i].count_nonzero() == 0
    assert_float64_equal((loss, gradient[rest]), (expected, expected_gradient))


@pytest.mark.parametrize("reduction", ["sum", "weighted_mean"])
@pytest.mark.parametrize("case", ALL, ids=str)
@given(problem=problems(), data=st.data())
def test_integer_weight_is_a_repeated_row(case: Case, reduction: str, problem: Problem, data: st.DataObject) -> None:
    n = len(problem.target)
    times = torch.tensor(data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)))
    repeated = torch.arange(n).repeat_interleave(times)
    loss, gradient = evaluate(case, problem, sample_weight=times.double(), reduction=reduction)
    expected, gradients = evaluate(case, problem.take(repeated), reduction=reduction)
    summed = torch.zeros_like(problem.logits).index_add(0, repeated, gradients)
    assert_float64_equal((loss, gradient), (expected, summed))


@pytest.mark.parametrize("case", SHIFT_INVARIANT, ids=str)
@given(problem=problems(), shift=st.floats(-100, 100))
def test_logits_shifted_by_a_constant(case: Case, problem: Problem, shift: float) -> None:
    shifted = Problem(**{**vars(problem), "logits": problem.logits + shift})
    # A shifted logit is rounded by up to 1.4e-14, and a DIMP weight is as exact as its exponent.
    torch.testing.assert_close(
        evaluate(case, shifted, reduction="none"), evaluate(case, problem, reduction="none"), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("case", ALL, ids=str)
@given(problem=problems(), data=st.data())
def test_permuted_rows(case: Case, problem: Problem, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(problem.target)))))
    permuted = problem.take(order)
    loss, gradient = evaluate(case, problem, sample_weight=problem.sample_weight, reduction="none")
    actual = evaluate(case, permuted, sample_weight=permuted.sample_weight, reduction="none")
    assert_float64_equal(actual, (loss[order], gradient[order]))


@pytest.mark.parametrize("case", ALL, ids=str)
@given(problem=problems(), data=st.data())
def test_permuted_classes(case: Case, problem: Problem, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(problem.logits.shape[1]))))
    logits, target = problem.logits[:, order], order.argsort()[problem.target]
    permuted = Problem(logits, target, problem.sample_weight, problem.class_weight[order], problem.rows)
    loss, gradient = evaluate(case, problem, class_weight=problem.class_weight, reduction="none")
    actual, actual_gradient = evaluate(case, permuted, class_weight=permuted.class_weight, reduction="none")
    assert_float64_equal((actual, actual_gradient), (loss, gradient[:, order]))


@pytest.mark.parametrize("case", SHIFT_INVARIANT, ids=str)
@given(problem=problems())
def test_gradient_rows_sum_to_zero(case: Case, problem: Problem) -> None:
    _, gradient = evaluate(case, problem, sample_weight=problem.sample_weight, reduction="sum")
    # Where the target is all but certain, 1 - p is as exact as p, not as itself.
    assert (gradient.sum(dim=1).abs() <= 1e-12 * gradient.abs().sum(dim=1) + 1e-13).all()


@pytest.mark.parametrize("case", ALL, ids=str)
@given(problem=problems(), data=st.data())
def test_mean_over_shards(case: Case, problem: Problem, data: st.DataObject) -> None:
    """Gradient accumulation: shards that share the whole's denominator add up to the mean over the whole."""
    n = len(problem.target)
    cut = data.draw(st.integers(0, n))
    normalizer = data.draw(st.sampled_from([n, float(n), torch.tensor(n), torch.tensor(float(n), dtype=torch.float64)]))
    whole, gradient = evaluate(case, problem, sample_weight=problem.sample_weight)
    shards = [problem.take(index) for index in (torch.arange(cut), torch.arange(cut, n))]
    parts = [evaluate(case, shard, sample_weight=shard.sample_weight, normalizer=normalizer) for shard in shards]
    assert_float64_equal(sum(loss for loss, _ in parts), whole)
    assert_float64_equal(torch.cat([part for _, part in parts]), gradient)


@pytest.mark.parametrize("case", ALL, ids=str)
@given(problem=problems())
def test_gradient_of_a_weight_is_the_loss_of_its_row(case: Case, problem: Problem) -> None:
    rows = case.fused(problem.logits, problem.target, reduction="none", **problem.operands(case))
    weight = problem.sample_weight.clone().requires_grad_()
    total = case.fused(problem.logits, problem.target, sample_weight=weight, reduction="sum", **problem.operands(case))
    assert_float64_equal(torch.autograd.grad(total, weight)[0], rows)
    assert_float64_equal(total.detach(), (rows * problem.sample_weight).sum())


@pytest.mark.parametrize("case", ALL, ids=str)
@given(problem=problems())
def test_class_weight_scales_rows(case: Case, problem: Problem) -> None:
    """Without smoothing or z-loss, which do not scale with the class of the row, a class weight is a row weight."""
    if case.effective_options.get("label_smoothing") or case.effective_options.get("z_loss"):
        plain = Case(case.spec, {}, case.backend)
    else:
        plain = case
    of_class = evaluate(plain, problem, class_weight=problem.class_weight, reduction="sum")
    of_row = evaluate(plain, problem, sample_weight=problem.class_weight[problem.target], reduction="sum")
    assert_float64_equal(of_class, of_row)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("focal", {"gamma": 0.0}, 0.0),
        ("focal", {"gamma": 0.0, "detach_modulation": True}, 0.0),
        ("cross_entropy", {"label_smoothing": 0.0, "z_loss": 0.0}, 0.0),
        # (1 - p^q) / q = -t (1 + q t / 2 + ...) with t down to -60.
        ("gce", {"q": 1e-10}, 1e-8),
        ("sce", {"alpha": 1.0, "beta": 0.0}, 0.0),
    ],
)
@given(problem=problems())
def test_equals_cross_entropy(
    name: str, options: dict[str, Any], tolerance: float, backend: str, problem: Problem
) -> None:
    weight = problem.sample_weight
    actual = evaluate(case_of(name, backend, **options), problem, sample_weight=weight)
    expected = evaluate(case_of("cross_entropy", backend), problem, sample_weight=weight)
    tolerance = max(tolerance, 1e-12)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems())
def test_gce_at_one_is_half_of_mae(backend: str, problem: Problem) -> None:
    value, gradient = evaluate(case_of("mae", backend), problem, reduction="none")
    assert_float64_equal(evaluate(case_of("gce", backend, q=1.0), problem, reduction="none"), (value / 2, gradient / 2))


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(), log_zero=st.floats(-20, -0.5))
def test_rce_is_a_multiple_of_mae(backend: str, problem: Problem, log_zero: float) -> None:
    value, gradient = evaluate(case_of("mae", backend), problem, reduction="none")
    assert_float64_equal(
        evaluate(case_of("rce", backend, log_zero=log_zero), problem, reduction="none"),
        (-log_zero / 2 * value, -log_zero / 2 * gradient),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(), alpha=st.floats(0, 8), beta=st.floats(0, 8))
def test_sce_is_a_sum(backend: str, problem: Problem, alpha: float, beta: float) -> None:
    ce = evaluate(case_of("cross_entropy", backend), problem, reduction="none")
    rce = evaluate(case_of("rce", backend), problem, reduction="none")
    expected = tuple(alpha * a + beta * b for a, b in zip(ce, rce, strict=True))
    assert_float64_equal(evaluate(case_of("sce", backend, alpha=alpha, beta=beta), problem, reduction="none"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(), max_weight=st.one_of(st.none(), st.floats(0.25, 8)))
def test_dimp_is_cross_entropy_weighted_by_the_ratio(backend: str, problem: Problem, max_weight: float | None) -> None:
    ratio = problem.rows["quality"] / problem.logits.softmax(dim=1).gather(1, problem.target[:, None]).squeeze(1)
    if max_weight is not None:
        ratio = ratio.clamp(max=max_weight)
    actual = evaluate(case_of("dimp", backend, max_weight=max_weight), problem, reduction="none")
    expected = evaluate(case_of("cross_entropy", backend), problem, sample_weight=ratio, reduction="none")
    assert_float64_equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(), max_weight=st.one_of(st.none(), st.floats(0.25, 8)))
def test_imp_is_cross_entropy_weighted_by_the_ratio(backend: str, problem: Problem, max_weight: float | None) -> None:
    ratio = problem.rows["quality"] / problem.rows["diversity"]
    if max_weight is not None:
        ratio = ratio.clamp(max=max_weight)
    actual = evaluate(case_of("imp", backend, max_weight=max_weight), problem, reduction="none")
    expected = evaluate(case_of("cross_entropy", backend), problem, sample_weight=ratio, reduction="none")
    assert_float64_equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(), gamma=st.floats(0, 4))
def test_detached_focal_is_cross_entropy_weighted_by_the_modulation(
    backend: str, problem: Problem, gamma: float
) -> None:
    log_p = problem.logits.log_softmax(dim=1).gather(1, problem.target[:, None]).squeeze(1)
    weight = (-torch.expm1(log_p)).pow(gamma)
    actual = evaluate(case_of("focal", backend, gamma=gamma, detach_modulation=True), problem, reduction="none")
    expected = evaluate(case_of("cross_entropy", backend), problem, sample_weight=weight, reduction="none")
    assert_float64_equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(), truncation=st.floats(0.05, 0.95))
def test_truncated_gce_is_gce_or_constant(backend: str, problem: Problem, truncation: float) -> None:
    q = 0.7
    value, gradient = evaluate(case_of("gce", backend, q=q, truncation=truncation), problem, reduction="none")
    plain, plain_gradient = evaluate(case_of("gce", backend, q=q), problem, reduction="none")
    p = problem.logits.softmax(dim=1).gather(1, problem.target[:, None]).squeeze(1)
    constant = p < truncation - 1e-9
    assert_float64_equal(value[constant], torch.full_like(value[constant], -math.expm1(q * math.log(truncation)) / q))
    assert gradient[constant].count_nonzero() == 0
    kept = p > truncation + 1e-9
    assert_float64_equal((value[kept], gradient[kept]), (plain[kept], plain_gradient[kept]))
