"""Values and gradients against the reference in float64, and against torch.nn.functional.cross_entropy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FLOAT_DTYPES, REDUCTIONS, TARGET_DTYPES, Case, Inputs, cases, make_inputs
from tolerances import FLOOR, Result, assert_as_exact_as_torch, assert_float64_equal, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import synkern

ALL = cases()
WITH_OPERANDS = [case for case in ALL if case.spec.operands]
# (N, C): both sides of every vector width, the sizes people train with, and vocabularies.
SIZES = [(5, 1), (6, 2), (32, 3), (9, 7), (64, 14), (17, 100), (8, 1000), (3, 32_000), (2, 128_000)]


def value_and_gradient(loss: Tensor, logits: Tensor, cotangent: Tensor) -> Result:
    (gradient,) = torch.autograd.grad(loss, logits, cotangent.to(loss))
    return Result(loss.detach(), gradient)


def kernel_result(case: Case, inputs: Inputs, cotangent: Tensor) -> Result:
    logits = inputs.logits.clone().requires_grad_()
    loss = case.fused(logits, inputs.target, sample_weight=inputs.sample_weight, reduction="none", **inputs.operands)
    return value_and_gradient(loss, logits, cotangent)


def eager_result(case: Case, inputs: Inputs, cotangent: Tensor, dtype: torch.dtype, leaf: torch.dtype) -> Result:
    """The reference computed in ``dtype``, its gradient rounded to ``leaf``."""
    logits = inputs.logits.to(leaf).requires_grad_()
    operands = {name: operand.to(dtype) for name, operand in inputs.operands.items()}
    weight = inputs.sample_weight.to(dtype)
    loss = case.reference(logits.to(dtype), inputs.target, sample_weight=weight, reduction="none", **operands)
    return value_and_gradient(loss, logits, cotangent)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("case", ALL, ids=str)
def test_as_exact_as_torch(case: Case, size: tuple[int, int], dtype: torch.dtype) -> None:
    n, c = size
    inputs = make_inputs(case, n, c, dtype)
    # Large enough that the softmax of a vocabulary does not vanish in float16.
    cotangent = min(c, 1000) * (0.5 + torch.rand(n, dtype=torch.float64, device=case.device))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cotangent = cotangent.to(wide)
    expected = eager_result(case, inputs, cotangent, torch.float64, torch.float64)
    torch_result = eager_result(case, inputs, cotangent, wide, dtype)
    actual = kernel_result(case, inputs, cotangent)

    assert actual.value.dtype == wide
    assert actual.gradient.dtype == dtype
    assert actual.gradient.shape == (n, c)
    assert_as_exact_as_torch(actual, torch_result, expected, inputs.target, dtype)


def scaled_gradient(
    case: Case, function: Any, inputs: Inputs, dtype: torch.dtype, reduction: str, scale: float
) -> Result:
    """Loss and gradient of ``scale * loss``, by autograd as a training step does it."""
    logits = inputs.logits.clone().requires_grad_()
    operands = {name: operand.to(dtype) for name, operand in inputs.operands.items()}
    weight = inputs.sample_weight.to(dtype)
    given = logits if function == case.fused else logits.to(dtype)
    loss = function(given, inputs.target, sample_weight=weight, reduction=reduction, **operands)
    (loss * scale).sum().backward()
    return Result(loss.detach().reshape(-1), logits.grad)


@pytest.mark.parametrize("scale", [1.0, -3.7, 2.0**16, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_scaled_losses_are_as_exact_as_torch(case: Case, dtype: torch.dtype, reduction: str, scale: float) -> None:
    """Loss scaling: a float16 gradient must not underflow before it is multiplied by the scale."""
    inputs = make_inputs(case, 16, 100, dtype)
    inputs.sample_weight.abs_()  # a mean that cancels would be as inexact in torch
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaf = Inputs(inputs.logits.double(), inputs.target, inputs.sample_weight, inputs.class_weight, inputs.operands)
    expected = scaled_gradient(case, case.reference, leaf, torch.float64, reduction, scale)
    torch_result = scaled_gradient(case, case.reference, inputs, wide, reduction, scale)
    actual = scaled_gradient(case, case.fused, inputs, wide, reduction, scale)
    assert_as_exact_as_torch(actual, torch_result, expected, inputs.target, dtype)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_16_bit_gradients_are_rounded_once(case: Case, dtype: torch.dtype, reduction: str) -> None:
    inputs = make_inputs(case, 512, 20, dtype, spread=4.0)
    leaf = Inputs(inputs.logits.double(), inputs.target, inputs.sample_weight, inputs.class_weight, inputs.operands)
    exact = scaled_gradient(case, case.reference, leaf, torch.float64, reduction, 9.7).gradient.to(dtype)
    actual = scaled_gradient(case, case.fused, inputs, torch.float32, reduction, 9.7).gradient
    # A float32 result close to the middle between two neighbours may go either way; weights applied after a first
    # rounding, or probabilities rounded before they are used, change a third of the entries.
    normal = exact.abs() >= torch.finfo(dtype).tiny
    assert normal.sum() > 100
    assert (actual == exact)[normal].double().mean().item() > 0.99


def gradients(loss: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(tensors.values()), torch.ones_like(loss), allow_unused=True)
    return {name: gradient for name, gradient in zip(tensors, found, strict=True) if gradient is not None}


def with_gradients(case: Case, function: Any, inputs: Inputs, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and its gradient for every tensor that it was given."""
    tensors = {"logits": inputs.logits, **inputs.operands}
    tensors.update({name: getattr(inputs, name) for name in arguments.pop("given", ())})
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    named = dict(tensors)
    loss = function(named.pop("logits"), inputs.target, **named, **arguments)
    return loss.detach(), gradients(loss, tensors)


GIVEN = [(), ("sample_weight",), ("class_weight",), ("sample_weight", "class_weight")]


@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "+".join(given) or "unweighted")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_reductions_weights_and_ignored_rows(case: Case, reduction: str, given: tuple[str, ...]) -> None:
    inputs = make_inputs(case, 9, 5)
    inputs.target[2], inputs.target[7] = -100, -100
    arguments = {"reduction": reduction, "given": given}
    assert_float64_equal(
        with_gradients(case, case.fused, inputs, **arguments),
        with_gradients(case, case.reference, inputs, **arguments),
    )


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_normalizer_replaces_the_denominator(case: Case, reduction: str, as_tensor: bool) -> None:
    inputs = make_inputs(case, 9, 5)
    normalizer = torch.tensor(3.5, dtype=torch.float64, device=case.device) if as_tensor else 3.5
    arguments = {"given": ("sample_weight", "class_weight")}
    assert_float64_equal(
        with_gradients(case, case.fused, inputs, reduction=reduction, normalizer=normalizer, **arguments),
        with_gradients(case, case.reference, inputs, reduction="mean", normalizer=3.5, **arguments),
    )


@pytest.mark.parametrize("ignore_index", [-1, 0, 2, 255])
@pytest.mark.parametrize("case", cases(variants=False), ids=str)
def test_ignore_index_may_be_any_number(case: Case, ignore_index: int) -> None:
    inputs = make_inputs(case, 9, 4)
    inputs.target[:] = torch.tensor([0, 1, 2, 3, 0, 2, 1, 3, 2])
    inputs.target[4] = ignore_index
    assert_float64_equal(
        with_gradients(case, case.fused, inputs, ignore_index=ignore_index),
        with_gradients(case, case.reference, inputs, ignore_index=ignore_index),
    )


@pytest.mark.parametrize("dtype", TARGET_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(variants=False), ids=str)
def test_every_target_dtype(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 8, 200)
    inputs.target[0] = 199
    narrow = Inputs(inputs.logits, inputs.target.to(dtype), inputs.sample_weight, inputs.class_weight, inputs.operands)
    actual, expected = (with_gradients(case, case.fused, some, given=("class_weight",)) for some in (narrow, inputs))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_leading_dimensions(case: Case, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    n = torch.Size(lead).numel()
    flat = make_inputs(case, n, 5, dtype)
    rows = {"sample_weight": flat.sample_weight, **flat.operands}
    shaped = {name: tensor.reshape(lead) for name, tensor in rows.items()}
    arguments = {"class_weight": flat.class_weight, "reduction": "none"}
    expected = case.fused(flat.logits, flat.target, **rows, **arguments)
    logits = flat.logits.reshape(*lead, 5).clone().requires_grad_()
    actual = case.fused(logits, flat.target.reshape(lead), **shaped, **arguments)

    assert actual.shape == lead
    torch.testing.assert_close(actual.detach(), expected.reshape(lead), rtol=0, atol=0)
    actual.sum().backward()
    assert logits.grad.shape == logits.shape
    flat_logits = flat.logits.clone().requires_grad_()
    case.fused(flat_logits, flat.target, **rows, **arguments).sum().backward()
    torch.testing.assert_close(logits.grad.reshape(n, 5), flat_logits.grad, rtol=0, atol=0)


def log_forms(case: Case) -> list[tuple[str, ...]]:
    """Every choice of operands that are given as logs."""
    names = case.spec.operands
    return [some for k in range(1, len(names) + 1) for some in itertools.combinations(names, k)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "logs"), [(c, logs) for c in WITH_OPERANDS for logs in log_forms(c)], ids=str)
def test_operands_as_logs(case: Case, logs: tuple[str, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 16, 7, dtype)
    operands = {
        ("log_" + name if name in logs else name): (operand.log() if name in logs else operand)
        for name, operand in inputs.operands.items()
    }
    in_logs = Inputs(inputs.logits, inputs.target, inputs.sample_weight, inputs.class_weight, operands)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = Inputs(
        inputs.logits.double(),
        inputs.target,
        inputs.sample_weight.double(),
        inputs.class_weight.double(),
        {name: operand.double() for name, operand in operands.items()},
    )
    actual, actual_gradients = with_gradients(case, case.fused, in_logs, reduction="none")
    expected, expected_gradients = with_gradients(case, case.reference, exact, reduction="none")

    assert set(actual_gradients) == set(expected_gradients) == {"logits", *operands}
    assert relative_error(actual, expected) <= 4 * FLOOR[wide]
    for name, gradient in expected_gradients.items():
        floor = FLOOR[dtype] if name == "logits" else FLOOR[wide]
        assert relative_error(actual_gradients[name], gradient) <= 4 * floor, name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", WITH_OPERANDS, ids=str)
def test_return_weights(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 6, 5, dtype)
    logits = inputs.logits.reshape(2, 3, 5).clone().requires_grad_()
    operands = {name: operand.reshape(2, 3).requires_grad_() for name, operand in inputs.operands.items()}
    target = inputs.target.reshape(2, 3)
    plain = case.fused(logits, target, **operands)
    loss, weight = case.fused(logits, target, **operands, return_weights=True)

    torch.testing.assert_close(loss, plain, rtol=0, atol=0)
    assert weight.shape == (2, 3)
    assert not weight.requires_grad
    options = {name: value for name, value in case.options.items() if name == "max_weight"}
    exact = {name: operand.double().reshape(-1) for name, operand in inputs.operands.items()}
    if "diversity" in exact:
        expected = synkern.reference.imp_weight(**exact, **options)
    else:
        log_p = synkern.reference.log_prob_of_target(inputs.logits.double(), inputs.target)
        expected = synkern.reference.dimp_weight(log_p, **exact, **options)
    assert relative_error(weight.reshape(-1), expected) <= 2 * FLOOR[weight.dtype]
    loss.backward()
    assert logits.grad.count_nonzero() > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", cases(variants=False), ids=str)
def test_backward_twice(case: Case, reduction: str) -> None:
    """A retained graph gives the same gradient again, also after the first one was changed in place."""
    inputs = make_inputs(case, 6, 5)
    logits, weight = inputs.logits.clone().requires_grad_(), inputs.sample_weight.abs().requires_grad_()
    loss = case.fused(logits, inputs.target, sample_weight=weight, reduction=reduction, **inputs.operands).sum()
    loss.backward(retain_graph=True)
    first = logits.grad.clone(), weight.grad.clone()
    logits.grad.zero_()
    weight.grad.zero_()
    (2 * loss).backward(retain_graph=True)
    assert_float64_equal((logits.grad, weight.grad), (2 * first[0], 2 * first[1]))
    again = torch.autograd.grad(loss, (logits, weight), create_graph=True)
    assert_float64_equal(tuple(g.detach() for g in again), first)
    loss.backward()
    assert_float64_equal((logits.grad, weight.grad), (3 * first[0], 3 * first[1]))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("changed", ["logits", "sample_weight", "target"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", cases(variants=False), ids=str)
def test_a_change_in_place_before_backward_is_noticed(case: Case, reduction: str, changed: str) -> None:
    inputs = make_inputs(case, 6, 5)
    leaf = inputs.logits.clone().requires_grad_()
    tensors = {"logits": leaf * 1, "sample_weight": inputs.sample_weight, "target": inputs.target}
    loss = case.fused(
        tensors["logits"], inputs.target, sample_weight=inputs.sample_weight, reduction=reduction, **inputs.operands
    )
    tensors[changed].mul_(0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_activation_checkpointing(case: Case, use_reentrant: bool) -> None:
    inputs = make_inputs(case, 6, 5)

    def step(logits: Tensor) -> Tensor:
        return case.fused(logits * 2, inputs.target, sample_weight=inputs.sample_weight, **inputs.operands)

    ours, theirs = inputs.logits.clone().requires_grad_(), inputs.logits.clone().requires_grad_()
    checkpoint(step, ours, use_reentrant=use_reentrant).backward()
    step(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_without_gradients(case: Case, mode: Any) -> None:
    inputs = make_inputs(case, 6, 5)
    logits = inputs.logits.clone().requires_grad_()
    expected = case.fused(logits, inputs.target, sample_weight=inputs.sample_weight, **inputs.operands)
    with mode():
        actual = case.fused(logits, inputs.target, sample_weight=inputs.sample_weight, **inputs.operands)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected.detach())


CE = [case for case in cases(["cross_entropy"]) if not case.options]


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "class_weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CE, ids=str)
def test_equals_torch_argument_for_argument(
    case: Case, dtype: torch.dtype, reduction: str, weighted: bool, label_smoothing: float, ignored: str
) -> None:
    inputs = make_inputs(case, 11, 6, dtype)
    target = inputs.target
    if ignored != "none":
        target[slice(None) if ignored == "all" else slice(1, None, 3)] = 4
    weight = inputs.class_weight.to(dtype) if weighted else None
    arguments = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "ignore_index": 4 if ignored != "none" else -7,
    }
    ours, theirs = inputs.logits.clone().requires_grad_(), inputs.logits.clone().requires_grad_()
    actual = case.fused(ours, target, class_weight=weight, **arguments)
    expected = F.cross_entropy(theirs, target, weight=weight, **arguments)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    actual.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


@pytest.mark.parametrize("case", CE, ids=str)
def test_equals_torch_for_a_single_row_and_for_leading_dimensions(case: Case) -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, device=case.device)
    target = torch.randint(0, 5, (2, 3), device=case.device)
    assert_float64_equal(case.fused(logits[0, 0], target[0, 0]), F.cross_entropy(logits[0, 0], target[0, 0]))
    assert_float64_equal(case.fused(logits, target), F.cross_entropy(logits.movedim(-1, 1), target))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_defaults_of_the_reference_are_those_of_the_function(case: Case) -> None:
    import inspect

    public = inspect.signature(case.spec.function).parameters
    for name, parameter in inspect.signature(case.spec.reference).parameters.items():
        assert name in public, name
        assert public[name].default == parameter.default, name
        assert public[name].kind == parameter.kind, name
