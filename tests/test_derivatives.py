"""Every derivative, in float64: by finite differences where the loss is a function that they apply to, and beside the
reference's derivatives always."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from cases import FLOAT_DTYPES, REDUCTIONS, Case, cases, make_inputs
from tolerances import FLOOR, assert_float64_equal, relative_error
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

ALL = cases()
DEFAULTS = cases(variants=False)
Function = Callable[..., Tensor]


# With respect to what: of logits and sample weights the kernels take every derivative themselves; operands and class
# weights that are differentiated too go another way.
KERNEL, EVERYTHING = "logits and sample_weight", "everything"
WRT = pytest.mark.parametrize("wrt", [KERNEL, EVERYTHING])


def both(case: Case, wrt: str, reduction: str = "none") -> tuple[Function, Function, tuple[Tensor, ...]]:
    """Kernel and reference as functions of tensors alone, and a point. What is not differentiated is constant."""
    inputs = make_inputs(case, 4, 5)
    named = inputs.named()
    names = list(named)[:2] if wrt == KERNEL else list(named)

    def of_tensors(function: Any) -> Function:
        def loss(*tensors: Tensor) -> Tensor:
            arguments = {**named, **dict(zip(names, tensors, strict=True))}
            return function(arguments.pop("logits"), inputs.target, reduction=reduction, **arguments)

        return loss

    return of_tensors(case.fused), of_tensors(case.reference), tuple(named[name] for name in names)


def requiring_grad(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def directions(tensors: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in tensors)


def for_finite_differences(case: Case, wrt: str, reduction: str = "none") -> tuple[Function, tuple[Tensor, ...]]:
    """The loss as a function of what finite differences apply to: not the logits, where a factor is held constant."""
    fused, _, point = both(case, wrt, reduction)
    if case.is_detached:
        return (lambda *rest: fused(point[0], *rest)), requiring_grad(point[1:])
    return fused, requiring_grad(point)


@WRT
@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradcheck(case: Case, wrt: str) -> None:
    function, point = for_finite_differences(case, wrt)
    assert torch.autograd.gradcheck(
        function, point, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@WRT
@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradgradcheck(case: Case, wrt: str) -> None:
    function, point = for_finite_differences(case, wrt)
    assert torch.autograd.gradgradcheck(function, point, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("reduction", "wrt"), [("mean", KERNEL), ("sum", KERNEL), ("weighted_mean", KERNEL), ("weighted_mean", EVERYTHING)]
)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_gradcheck_of_reductions(case: Case, reduction: str, wrt: str) -> None:
    function, point = for_finite_differences(case, wrt, reduction)
    assert torch.autograd.gradcheck(
        function, point, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, point, check_fwd_over_rev=True)


def reverse(function: Function, point: tuple[Tensor, ...], cotangent: Tensor) -> Any:
    leaves = requiring_grad(point)
    return torch.autograd.grad(function(*leaves), leaves, cotangent)


def reverse_over_reverse(function: Function, point: tuple[Tensor, ...], cotangent: Tensor) -> Any:
    leaves, cotangent = requiring_grad(point), cotangent.clone().requires_grad_()
    first = torch.autograd.grad(function(*leaves), leaves, cotangent, create_graph=True)
    return torch.autograd.grad(
        first, (*leaves, cotangent), directions(first), allow_unused=True, materialize_grads=True
    )


def dual(function: Function, point: tuple[Tensor, ...], cotangent: Tensor) -> Any:
    with fwad.dual_level():
        duals = [fwad.make_dual(x, v) for x, v in zip(point, directions(point), strict=True)]
        return fwad.unpack_dual(function(*duals)).tangent


def forward_over_reverse(function: Function, point: tuple[Tensor, ...], cotangent: Tensor) -> Any:
    with fwad.dual_level():
        leaves = requiring_grad(point)
        duals = [fwad.make_dual(x, v) for x, v in zip(leaves, directions(point), strict=True)]
        found = torch.autograd.grad(function(*duals), leaves, cotangent)
        return [fwad.unpack_dual(g) for g in found]


def reverse_over_forward(function: Function, point: tuple[Tensor, ...], cotangent: Tensor) -> Any:
    with fwad.dual_level():
        leaves = requiring_grad(point)
        duals = [fwad.make_dual(x, v) for x, v in zip(leaves, directions(point), strict=True)]
        tangent = fwad.unpack_dual(function(*duals)).tangent
    # Within the level, the backward pass would carry tangents too: a third derivative.
    return torch.autograd.grad(tangent, leaves, cotangent, allow_unused=True, materialize_grads=True)


def reverse_over_func_jvp(function: Function, point: tuple[Tensor, ...], cotangent: Tensor) -> Any:
    def tangent(*x: Tensor) -> Tensor:
        return (jvp(function, x, directions(x))[1] * cotangent).sum()

    return grad(tangent, argnums=tuple(range(len(point))))(*point)


@pytest.mark.parametrize(
    "derivative",
    [reverse, reverse_over_reverse, dual, forward_over_reverse, reverse_over_forward],
    ids=lambda f: f.__name__,
)
@WRT
@pytest.mark.parametrize("case", ALL, ids=str)
def test_autograd_equals_reference(case: Case, wrt: str, derivative: Callable[..., Any]) -> None:
    fused, eager, point = both(case, wrt)
    smoothed = any(case.effective_options.get(name) for name in ("label_smoothing", "z_loss"))
    if derivative is reverse_over_forward and wrt == EVERYTHING and smoothed:
        pytest.skip("torch's own log_softmax, which learned class weights bring in, refuses this derivative")
    # It refuses it in the reference too; torch.func takes the same one.
    of_reference = reverse_over_func_jvp if derivative is reverse_over_forward else derivative
    cotangent = torch.randn(4, dtype=torch.float64, device=case.device)
    actual = derivative(fused, point, cotangent)
    assert actual is not None
    assert_float64_equal(actual, of_reference(eager, point, cotangent))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_batched_cotangents(case: Case, reduction: str) -> None:
    """vmap over the backward pass of a graph that was built outside."""
    fused, eager, point = both(case, KERNEL, reduction)
    results = []
    for function in (fused, eager):
        leaves = requiring_grad(point)
        loss = function(*leaves)
        (cotangents,) = directions((torch.empty(3, *loss.shape, dtype=torch.float64),))
        results.append(torch.autograd.grad(loss, leaves, cotangents, is_grads_batched=True))
    assert_float64_equal(*results)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_cotangent_that_carries_a_tangent(case: Case, reduction: str) -> None:
    """Forward mode over the backward pass of a graph that was built outside."""
    fused, eager, point = both(case, KERNEL, reduction)
    results = []
    for function in (fused, eager):
        leaves = requiring_grad(point)
        loss = function(*leaves)
        cotangent, tangent = directions((loss, loss))
        with fwad.dual_level():
            found = torch.autograd.grad(loss, leaves, fwad.make_dual(cotangent, tangent))
            results.append([tuple(fwad.unpack_dual(g)) for g in found])
    for primal, tangent in results[0]:
        assert primal is not None and tangent is not None
    assert_float64_equal(*results)


def func_grad(f: Function, x: tuple[Tensor, ...]) -> Any:
    return grad(lambda *a: f(*a).sum(), argnums=tuple(range(len(x))))(*x)


def func_vjp(f: Function, x: tuple[Tensor, ...]) -> Any:
    value, pull_back = vjp(f, *x)
    return value, pull_back(directions((value,))[0])


def func_jvp(f: Function, x: tuple[Tensor, ...]) -> Any:
    return jvp(f, x, directions(x))


def func_jacrev(f: Function, x: tuple[Tensor, ...]) -> Any:
    return jacrev(f, argnums=tuple(range(len(x))))(*x)


def func_jacfwd(f: Function, x: tuple[Tensor, ...]) -> Any:
    return jacfwd(f, argnums=tuple(range(len(x))))(*x)


def jvp_of_grad(f: Function, x: tuple[Tensor, ...]) -> Any:
    return jvp(lambda *a: func_grad(f, a), x, directions(x))


def vjp_of_grad(f: Function, x: tuple[Tensor, ...]) -> Any:
    return vjp(lambda *a: func_grad(f, a), *x)[1](directions(x))


def grad_of_jvp(f: Function, x: tuple[Tensor, ...]) -> Any:
    return func_grad(lambda *a: jvp(f, a, directions(x))[1], x)


def jvp_of_jvp(f: Function, x: tuple[Tensor, ...]) -> Any:
    return jvp(lambda *a: jvp(f, a, directions(x, 1))[1], x, directions(x, 2))


def jvp_of_vjp(f: Function, x: tuple[Tensor, ...]) -> Any:
    def pulled(cotangent: Tensor, *a: Tensor) -> Any:
        return vjp(f, *a)[1](cotangent)

    inputs = (directions((f(*x),))[0], *x)
    return jvp(pulled, inputs, directions(inputs, 2))


def func_hessian(f: Function, x: tuple[Tensor, ...]) -> Any:
    return hessian(lambda *a: f(*a).sum(), argnums=tuple(range(len(x))))(*x)


def jacrev_of_jacrev(f: Function, x: tuple[Tensor, ...]) -> Any:
    return jacrev(jacrev(lambda a: f(a, *x[1:])))(x[0])


def jacfwd_of_jacfwd(f: Function, x: tuple[Tensor, ...]) -> Any:
    return jacfwd(jacfwd(lambda a: f(a, *x[1:])))(x[0])


TRANSFORMS = [
    func_grad,
    func_vjp,
    func_jvp,
    func_jacrev,
    func_jacfwd,
    jvp_of_grad,
    vjp_of_grad,
    grad_of_jvp,
    jvp_of_jvp,
    jvp_of_vjp,
    func_hessian,
    jacrev_of_jacrev,
    jacfwd_of_jacfwd,
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
@WRT
@pytest.mark.parametrize("case", ALL, ids=str)
def test_func_equals_reference(case: Case, wrt: str, transform: Callable[..., Any]) -> None:
    fused, eager, point = both(case, wrt)
    assert_float64_equal(transform(fused, point), transform(eager, point))


@WRT
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_second_derivatives_of_reductions(case: Case, reduction: str, wrt: str) -> None:
    fused, eager, point = both(case, wrt, reduction)
    assert_float64_equal(func_hessian(fused, point), func_hessian(eager, point))
    assert_float64_equal(jvp_of_grad(fused, point), jvp_of_grad(eager, point))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_some_inputs_constant(case: Case) -> None:
    """Derivatives for each non-empty choice of differentiated inputs, the rest being plain constants."""
    fused, eager, point = both(case, EVERYTHING)

    def restricted(function: Function, chosen: tuple[int, ...]) -> Function:
        def of_chosen(*some: Tensor) -> Tensor:
            given = dict(zip(chosen, some, strict=True))
            return function(*(given.get(i, constant) for i, constant in enumerate(point)))

        return of_chosen

    for k in range(1, len(point)):
        for chosen in itertools.combinations(range(len(point)), k):
            some = tuple(point[i] for i in chosen)
            for transform in (func_grad, func_jvp, jvp_of_grad, vjp_of_grad):
                actual, expected = (transform(restricted(f, chosen), some) for f in (fused, eager))
                assert_float64_equal(actual, expected, f"{transform.__name__} {chosen}")


# Batch dimension of logits, target and every other tensor; None where all share one.
IN_DIMS = [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, None), (2, 1, 1), (-1, None, 0), (None, None, 0)]


def batched(tensor: Tensor, dim: int | None, copies: int) -> Tensor:
    """Different copies of a tensor along a new dimension, or the tensor itself."""
    if dim is None:
        return tensor
    if tensor.is_floating_point():
        stack = [tensor * (1 + 0.1 * k) for k in range(copies)]
    else:
        stack = [tensor.roll(k, 0) for k in range(copies)]
    return torch.stack(stack, dim=dim)


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("what", ["value", "grad", "jvp", "hvp"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_vmap_equals_a_loop(case: Case, what: str, in_dims: tuple[int | None, int | None, int | None]) -> None:
    copies = 3
    inputs = make_inputs(case, 4, 5)
    rest = {name: t for name, t in inputs.named(class_weight=False).items() if name != "logits"}
    on_logits, on_target, on_rest = in_dims
    (direction,) = directions((inputs.logits,))

    def sum_of_rows(logits: Tensor, target: Tensor, rest: dict[str, Tensor]) -> Tensor:
        return case.fused(logits, target, reduction="sum", **rest)

    def function(logits: Tensor, target: Tensor, rest: dict[str, Tensor]) -> Any:
        if what == "value":
            return case.fused(logits, target, reduction="none", **rest)
        if what == "grad":
            return grad(sum_of_rows, argnums=(0, 2))(logits, target, rest)
        if what == "jvp":
            return jvp(lambda z: case.fused(z, target, reduction="none", **rest), (logits,), (direction,))
        return jvp(lambda z: grad(sum_of_rows)(z, target, rest), (logits,), (direction,))

    many = (
        batched(inputs.logits, on_logits, copies),
        batched(inputs.target, on_target, copies),
        {name: batched(t, on_rest if on_rest is None else min(on_rest, 1), copies) for name, t in rest.items()},
    )

    def nth(tensor: Tensor, dim: int | None, k: int) -> Tensor:
        return tensor if dim is None else tensor.select(dim, k)

    actual = vmap(function, in_dims=(on_logits, on_target, on_rest))(*many)
    for k in range(copies):
        one = function(
            nth(many[0], on_logits, k),
            nth(many[1], on_target, k),
            {name: nth(t, on_rest, k) for name, t in many[2].items()},
        )
        assert_float64_equal(torch.utils._pytree.tree_map(lambda t, k=k: t[k], actual), one)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_vmap_within_vmap(case: Case) -> None:
    inputs = make_inputs(case, 6, 5)
    rows = {"sample_weight": inputs.sample_weight, **inputs.operands}

    def one(logits: Tensor, target: Tensor, row: dict[str, Tensor]) -> Tensor:
        return case.fused(logits, target, reduction="sum", **row)

    flat = grad(lambda z: case.fused(z, inputs.target, reduction="sum", **rows))(inputs.logits)
    shaped = vmap(vmap(grad(one)))(
        inputs.logits.reshape(2, 3, 5), inputs.target.reshape(2, 3), {k: v.reshape(2, 3) for k, v in rows.items()}
    )
    assert_float64_equal(shaped.reshape(6, 5), flat)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_per_sample_gradients_of_a_model(case: Case) -> None:
    """vmap(grad) over a model's parameters: the rows' losses are differentiated one by one."""
    inputs = make_inputs(case, 6, 5)
    model = torch.nn.Linear(3, 5, dtype=torch.float64, device=case.device)
    features = torch.randn(6, 3, dtype=torch.float64, device=case.device)
    parameters = dict(model.named_parameters())

    def of_row(parameters: dict[str, Tensor], x: Tensor, target: Tensor, operands: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, parameters, (x.unsqueeze(0),))
        return case.fused(
            logits, target.unsqueeze(0), reduction="sum", **{k: v.unsqueeze(0) for k, v in operands.items()}
        )

    actual = vmap(grad(of_row), in_dims=(None, 0, 0, 0))(parameters, features, inputs.target, inputs.operands)
    for i in range(6):
        one = case.reference(
            model(features[i : i + 1]),
            inputs.target[i : i + 1],
            reduction="sum",
            **{k: v[i : i + 1] for k, v in inputs.operands.items()},
        )
        expected = torch.autograd.grad(one, list(parameters.values()))
        assert_float64_equal([actual[name][i] for name in parameters], list(expected))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_meta_gradient_through_a_training_step(case: Case) -> None:
    """d(validation loss after one step of SGD) / d(sample weights): a double backward through the loss."""
    inputs = make_inputs(case, 6, 5)
    features, held_out = torch.randn(2, 6, 3, dtype=torch.float64, device=case.device)
    head = torch.randn(3, 5, dtype=torch.float64, device=case.device)

    def meta_gradient(function: Any) -> Tensor:
        weight = inputs.sample_weight.clone().requires_grad_()
        w = head.clone().requires_grad_()
        loss = function(features @ w, inputs.target, sample_weight=weight, **inputs.operands)
        (step,) = torch.autograd.grad(loss, w, create_graph=True)
        after = function(held_out @ (w - 0.1 * step), inputs.target, **inputs.operands)
        (found,) = torch.autograd.grad(after, weight)
        return found

    actual = meta_gradient(case.fused)
    assert actual.count_nonzero() > 0
    assert_float64_equal(actual, meta_gradient(case.reference))


def third_by_reverse(f: Function, x: Tensor) -> Any:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(second.square().sum(), leaf)[0]


def third_by_grad(f: Function, x: Tensor) -> Any:
    first = grad(lambda a: f(a).sum())
    second = grad(lambda a: first(a).square().sum())
    return grad(lambda a: second(a).square().sum())(x)


def third_by_forward(f: Function, x: Tensor) -> Any:
    (v,) = directions((x,))
    first = grad(lambda a: f(a).sum())
    return jvp(lambda a: jvp(first, (a,), (v,))[1], (x,), (v,))[1]


def third_by_reverse_over_hessian(f: Function, x: Tensor) -> Any:
    return jacrev(hessian(lambda a: f(a).sum()))(x)


def third_by_jvps(f: Function, x: Tensor) -> Any:
    (v,) = directions((x,))

    def along(g: Function) -> Function:
        return lambda a: jvp(g, (a,), (v,))[1]

    return along(along(along(f)))(x)


THIRD = [third_by_reverse, third_by_grad, third_by_forward, third_by_reverse_over_hessian, third_by_jvps]


@pytest.mark.parametrize("derivative", THIRD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_third_derivatives_are_refused(case: Case, derivative: Callable[..., Any]) -> None:
    inputs = make_inputs(case, 3, 4)
    with pytest.raises(NotImplementedError, match=r"third|second"):
        derivative(lambda z: case.fused(z, inputs.target, reduction="none", **inputs.operands), inputs.logits)


WRT_WEIGHTS = [(case, name) for case in DEFAULTS for name in ("sample_weight", *case.spec.operands)]


@pytest.mark.parametrize(("case", "wrt"), WRT_WEIGHTS, ids=str)
def test_third_derivatives_with_weights_are_right_or_refused(case: Case, wrt: str) -> None:
    """The derivative of a Hessian-vector product with respect to a weight exists in eager PyTorch; a kernel may refuse
    it, but must not drop it."""
    inputs = make_inputs(case, 3, 4)

    def third(function: Any) -> Any:
        named = {name: t.clone().requires_grad_() for name, t in inputs.named(class_weight=False).items()}
        leaves = dict(named)
        first = torch.autograd.grad(
            function(leaves.pop("logits"), inputs.target, reduction="sum", **leaves), named["logits"], create_graph=True
        )
        second = torch.autograd.grad(first[0].square().sum(), named["logits"], create_graph=True)
        return torch.autograd.grad(second[0].square().sum(), named[wrt])

    expected = third(case.reference)
    try:
        actual = third(case.fused)
    except NotImplementedError as refusal:
        assert str(refusal)
    else:
        assert_float64_equal(actual, expected)


@pytest.mark.parametrize("c", [2, 3, 37, 1000])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_tangent_and_hvp_as_exact_as_torch(case: Case, dtype: torch.dtype, c: int) -> None:
    """The tangent and second-derivative kernels, in every dtype and on both sides of the vector width."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = make_inputs(case, 6, c, dtype)
    direction = torch.randn(6, c, dtype=torch.float64, device=case.device).to(dtype)
    # Large enough that the second derivatives of a large softmax do not vanish in float16.
    cotangent = c / 2 * (0.5 + torch.rand(6, device=case.device))

    def derivatives(function: Any, leaf: torch.dtype, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        rest = {name: t.to(compute) for name, t in inputs.named(class_weight=False).items() if name != "logits"}

        def rows(logits: Tensor) -> Tensor:
            logits = logits if function is case.fused else logits.to(compute)
            return function(logits, inputs.target, reduction="none", **rest)

        z, v = inputs.logits.to(leaf), direction.to(leaf)
        tangent = jvp(rows, (z,), (v,))[1]
        return tangent, jvp(grad(lambda a: (rows(a) * cotangent.to(compute)).sum()), (z,), (v,))[1]

    exact = derivatives(case.reference, torch.float64, torch.float64)
    peer = derivatives(case.reference, dtype, wide)
    actual = derivatives(case.fused, dtype, wide)
    assert actual[0].dtype == wide
    assert actual[1].dtype == dtype
    # Each entry is a difference of terms of its own size, so that the roundings of a few add up.
    floors = (4 * FLOOR[wide], 4 * FLOOR[dtype])
    for part, ours, theirs, true, floor, dim in zip(
        ("tangent", "hvp"), actual, peer, exact, floors, (None, 1), strict=True
    ):
        allowed = 2 * relative_error(theirs, true, dim) + floor
        assert relative_error(ours, true, dim) <= allowed, part
