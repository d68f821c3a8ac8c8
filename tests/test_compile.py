"""torch.compile, export, tracing, autocast, and the operators' registrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from cases import Case, Inputs, cases, make_inputs
from tolerances import assert_float64_equal
from torch import Tensor
from torch import library as torch_library
from torch.func import grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("fresh_compiler")

ALL = cases()
DEFAULTS = cases(variants=False)


def with_slow(everything: Sequence[Case], quick: Callable[[Case], bool]) -> list[Any]:
    """All cases, those that are not quick being left to the slow run: inductor takes seconds a case."""
    return [case if quick(case) else pytest.param(case, marks=pytest.mark.slow) for case in everything]


INDUCTOR = with_slow(ALL, lambda case: case.name in ("cross_entropy", "dimp") and not case.options)


def train_step(case: Case, compiled: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in inputs.named(class_weight=False).items()}
    rest = dict(tensors)
    loss = compiled(rest.pop("logits"), inputs.target, **rest)
    loss.backward()
    return loss.detach(), {name: tensor.grad for name, tensor in tensors.items()}


def scaled_loss(case: Case) -> Callable[..., Tensor]:
    """The loss within other operations on both sides."""

    def function(logits: Tensor, target: Tensor, **rest: Tensor) -> Tensor:
        return 3 * case.fused(logits * 2, target, **rest)

    return function


def check_steps(case: Case, backend: str) -> None:
    """Three training steps with other data each: right, in one graph, compiled once."""
    function = scaled_loss(case)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            inputs = make_inputs(case, 6, 5, seed=seed)
            inputs.target[seed] = -100
            assert_float64_equal(train_step(case, compiled, inputs), train_step(case, function, inputs))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_aot_eager_steps(case: Case) -> None:
    check_steps(case, "aot_eager")


@pytest.mark.usefixtures("fresh_inductor")
@pytest.mark.parametrize("case", INDUCTOR, ids=str)
def test_inductor_steps(case: Case) -> None:
    check_steps(case, "inductor")


def check_dynamic_batch(case: Case, backend: str) -> None:
    function = scaled_loss(case)
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    train_step(case, compiled, make_inputs(case, 7, 5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (3, 4, 12):
            inputs = make_inputs(case, n, 5, seed=n)
            assert_float64_equal(train_step(case, compiled, inputs), train_step(case, function, inputs))


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_aot_eager_dynamic_batch(case: Case) -> None:
    check_dynamic_batch(case, "aot_eager")


@pytest.mark.usefixtures("fresh_inductor")
@pytest.mark.parametrize("case", with_slow(DEFAULTS, lambda case: case.name == "dimp"), ids=str)
def test_inductor_dynamic_batch(case: Case) -> None:
    check_dynamic_batch(case, "inductor")


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
def test_reductions_compile(reduction: str) -> None:
    (case,) = [case for case in DEFAULTS if case.name == "dimp"][:1]
    inputs = make_inputs(case, 6, 5)
    inputs.target[1] = -100

    def function(logits: Tensor, normalizer: Tensor | None) -> Tensor:
        rest = {"sample_weight": inputs.sample_weight, "class_weight": inputs.class_weight, **inputs.operands}
        return case.fused(logits, inputs.target, reduction=reduction, normalizer=normalizer, **rest).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    normalizers = [None] if reduction in ("sum", "none") else [None, torch.tensor(2.5, dtype=torch.float64)]
    for normalizer in normalizers:
        logits = inputs.logits.clone().requires_grad_()
        assert_float64_equal(
            torch.autograd.grad(compiled(logits, normalizer), logits),
            torch.autograd.grad(function(logits, normalizer), logits),
        )


def tangent(case: Case, inputs: Inputs) -> Callable[[Tensor, Tensor], Any]:
    weight = inputs.sample_weight

    def function(logits: Tensor, direction: Tensor) -> Any:
        def rows(z: Tensor) -> Tensor:
            return case.fused(z, inputs.target, sample_weight=weight, reduction="none", **inputs.operands)

        return jvp(rows, (logits,), (direction,))

    return function


def hessian_vector_product(case: Case, inputs: Inputs) -> Callable[[Tensor, Tensor], Any]:
    def function(logits: Tensor, direction: Tensor) -> Any:
        def total(z: Tensor) -> Tensor:
            return case.fused(z, inputs.target, reduction="sum", **inputs.operands)

        return jvp(grad(total), (logits,), (direction,))

    return function


@pytest.mark.parametrize("build", [tangent, hessian_vector_product], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_a_jvp_inside(case: Case, build: Callable[[Case, Inputs], Callable[..., Any]]) -> None:
    inputs = make_inputs(case, 6, 5)
    function = build(case, inputs)
    direction = torch.randn_like(inputs.logits)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_float64_equal(compiled(inputs.logits, direction), function(inputs.logits, direction))


@pytest.mark.usefixtures("fresh_inductor")
@pytest.mark.parametrize("case", with_slow(DEFAULTS, lambda case: case.name == "dimp"), ids=str)
def test_a_jvp_inside_inductor(case: Case) -> None:
    inputs = make_inputs(case, 6, 5)
    function = tangent(case, inputs)
    direction = torch.randn_like(inputs.logits)
    compiled = torch.compile(function, fullgraph=True)
    assert_float64_equal(compiled(inputs.logits, direction), function(inputs.logits, direction))


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_a_dual_tensor_from_outside(case: Case) -> None:
    """Compiled code either passes the tangent on or refuses; a tangent of None would be a silent zero."""
    inputs = make_inputs(case, 6, 5)
    direction = torch.randn_like(inputs.logits)

    def function(logits: Tensor) -> Tensor:
        return case.fused(logits, inputs.target, reduction="none", **inputs.operands)

    compiled = torch.compile(function, backend="aot_eager")
    with fwad.dual_level():
        expected = fwad.unpack_dual(function(fwad.make_dual(inputs.logits, direction))).tangent
        try:
            actual = fwad.unpack_dual(compiled(fwad.make_dual(inputs.logits, direction))).tangent
        except (RuntimeError, NotImplementedError) as refusal:
            assert str(refusal)
        else:
            assert_float64_equal(actual, expected)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_compiled_module_in_bfloat16(case: Case) -> None:
    inputs = make_inputs(case, 6, 5, torch.bfloat16)
    module = case.spec.module(**case.options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ours, theirs = (inputs.logits.clone().requires_grad_() for _ in range(2))
    actual = compiled(ours, inputs.target, **inputs.operands)
    expected = module(theirs, inputs.target, **inputs.operands)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


class Rows(torch.nn.Module):
    """The loss as a module of tensors, for export."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, logits: Tensor, target: Tensor, operands: dict[str, Tensor]) -> Tensor:
        return self.case.fused(logits, target, reduction="none", **operands)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_export(case: Case) -> None:
    first, second = make_inputs(case, 6, 5), make_inputs(case, 9, 5, seed=1)
    rows = {0: torch.export.Dim("rows", min=2)}
    shapes = {"logits": rows, "target": rows, "operands": dict.fromkeys(first.operands, rows)}
    program = torch.export.export(
        Rows(case), (first.logits, first.target, first.operands), dynamic_shapes=shapes, strict=False
    )
    operators = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("synkern.") for name in operators), operators
    for exported in (program, program.run_decompositions()):
        actual = exported.module()(second.logits, second.target, second.operands)
        assert_float64_equal(actual, Rows(case)(second.logits, second.target, second.operands))


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_make_fx(case: Case, tracing_mode: str) -> None:
    inputs = make_inputs(case, 6, 5)

    def function(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        loss = case.fused(logits, target, sample_weight=weight, **inputs.operands)
        return torch.autograd.grad(loss, logits)[0]

    graph = make_fx(function, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(
        inputs.logits, inputs.target, inputs.sample_weight
    )
    other = make_inputs(case, 6, 5, seed=1)
    arguments = (other.logits, other.target, other.sample_weight)
    assert_float64_equal(graph(*arguments), function(*arguments))


class Recorder(TorchDispatchMode):
    """Records every operator that runs, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, result))
        return result

    def of_synkern(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The first call of each of this library's operators."""
        found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        for function, args, _ in self.calls:
            if function.namespace == "synkern":
                found.setdefault(function.name(), (function, args))
        return found


def second_order_step(case: Case, inputs: Inputs, class_weight: Tensor | None = None, reduction: str = "mean") -> None:
    """Runs every operator of the loss: value, gradient of a scaled loss, gradient of the gradient, and tangent."""
    logits, weight = inputs.logits.clone().requires_grad_(), inputs.sample_weight.clone().requires_grad_()
    rest = {"class_weight": class_weight, "reduction": reduction, **inputs.operands}
    loss = case.fused(logits, inputs.target, sample_weight=weight, **rest).sum()
    torch.autograd.grad(2 * loss, (logits, weight), retain_graph=True)
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    torch.autograd.grad(first, (logits, weight), torch.randn_like(first))
    case.fused(logits.detach(), inputs.target, **rest)
    with fwad.dual_level():
        case.fused(fwad.make_dual(inputs.logits, torch.randn_like(logits)), inputs.target, **rest)


def plain_step(recorder: Recorder) -> None:
    """The operators of a training step that no dispatch mode watches, on the arguments of a recorded loss."""
    _, arguments = recorder.of_synkern()["synkern::row_loss"]
    *operands, reduction = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
    if reduction == 0:
        return
    loss, statistics, *gradients = torch.ops.synkern.row_loss_and_gradient.default(*operands, reduction)
    scale = torch.full_like(loss, 2.0)
    torch.ops.synkern.row_loss_rescale.default(scale, *gradients, *operands[:5], statistics, *operands[5:])


def registered_operators() -> set[str]:
    """Those that take tensors."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("synkern::")}
    schemas = {name: getattr(torch.ops.synkern, name.removeprefix("synkern::")).default._schema for name in names}
    return {name for name, schema in schemas.items() if schema.arguments}


# Without derivatives of their own: checked where their values are (test_contraction_operators.py, test_lstm.py).
OF_THE_META_GRADIENT = {
    f"synkern::{name}"
    for name in ("linear_contraction", "embedding_contraction", "norm_contraction", "lstm", "lstm_backward")
}


def test_every_operator_is_checked() -> None:
    """What opcheck is run on below, and in the files named above, is all that this library registers."""
    case = next(case for case in DEFAULTS if case.name == "cross_entropy")
    with Recorder() as recorder:
        second_order_step(case, make_inputs(case, 4, 3))
        plain_step(recorder)
    assert {name.split(".")[0] for name in recorder.of_synkern()} == registered_operators() - OF_THE_META_GRADIENT
    assert registered_operators() >= OF_THE_META_GRADIENT


# As many losses as it takes to pass every kind of argument; the operators are the same for all.
OPCHECK = with_slow(
    ALL, lambda case: (case.name == "dimp" and not case.options) or case.effective_options.get("z_loss", 0) == 1e-3
)


# The second derivative is the last of the chain and refuses to be differentiated; the rest are steps of another's
# backward pass.
DIFFERENTIABLE = {"row_loss", "row_loss_backward", "row_loss_tangent"}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("case", OPCHECK, ids=str)
def test_opcheck(case: Case, weighted: bool, reduction: str) -> None:
    inputs = make_inputs(case, 4, 3)
    with Recorder() as recorder:
        second_order_step(case, inputs, inputs.class_weight if weighted else None, reduction)
        plain_step(recorder)
    calls = recorder.of_synkern()
    assert len(calls) >= (4 if reduction == "none" else 6)
    differentiable = [inputs.logits, inputs.sample_weight]
    for name, (operator, args) in calls.items():

        def fresh(argument: Any, name: str = name) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            copy = argument.detach().clone()
            wants_grad = any(argument.shape == tensor.shape for tensor in differentiable) and copy.is_floating_point()
            return copy.requires_grad_(wants_grad and name.split("::")[1] in DIFFERENTIABLE)

        torch_library.opcheck(operator, tuple(fresh(argument) for argument in args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    """16-bit logits go in as they are; the loss comes out in float32; nothing (N, C) is made but the gradient."""
    n, c = 6, 40
    inputs = make_inputs(case, n, c, torch.float32)
    features = torch.randn(n, 3, device=case.device)
    layer = torch.nn.Linear(3, c, device=case.device)
    with torch.autocast(case.device.type, dtype=dtype):
        logits = layer(features)
        assert logits.dtype == dtype
        with Recorder() as recorder:
            loss = case.fused(logits, inputs.target, sample_weight=inputs.sample_weight, **inputs.operands)
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    loss.backward()

    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert [(*x.shape, x.dtype) for x in large_results(recorder, n * c)] == [(n, c, dtype)]
    assert layer.weight.grad.dtype == torch.float32
    outside = case.fused(logits.detach(), inputs.target, sample_weight=inputs.sample_weight, **inputs.operands)
    torch.testing.assert_close(loss.detach(), outside, rtol=0, atol=0)


def large_results(recorder: Recorder, size: int) -> list[Tensor]:
    """Results of ``size`` elements or more that are new memory, not a view."""
    found = []
    for function, _, result in recorder.calls:
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.numel() >= size and not function.is_view:
                found.append(x)
    return found


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_only_gradients_have_the_size_of_the_logits(case: Case, reduction: str) -> None:
    n, c = 7, 30
    inputs = make_inputs(case, n, c, torch.float32)
    rest = {"sample_weight": inputs.sample_weight, "reduction": reduction, **inputs.operands}
    logits, direction = inputs.logits.requires_grad_(), torch.randn(n, c, device=case.device)
    with Recorder() as recorder:
        loss = case.fused(logits, inputs.target, **rest).sum()
        torch.autograd.grad(2 * loss, logits, retain_graph=True)
    assert len(large_results(recorder, n * c)) == 1, "loss and gradient"
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with Recorder() as recorder:
        torch.autograd.grad(gradient, logits, direction)
    assert len(large_results(recorder, n * c)) == 1, "second derivative"
    with Recorder() as recorder, fwad.dual_level():
        case.fused(fwad.make_dual(logits.detach(), direction), inputs.target, **rest)
    assert large_results(recorder, n * c) == [], "tangent"
