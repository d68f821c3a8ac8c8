"""Input that breaks naive implementations: infinities, NaN, huge logits, nothing to average, wrong arguments."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import FLOAT_DTYPES, REDUCTIONS, TARGET_DTYPES, Case, Inputs, cases, make_inputs
from tolerances import FLOOR, assert_float64_equal, relative_error
from torch import Tensor
from torch.func import grad, jvp

import synkern

ALL = cases()
DEFAULTS = cases(variants=False)
INF = math.inf


def evaluate(case: Case, inputs: Inputs, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Rows' losses (unless told otherwise) and the gradient of the logits."""
    logits = inputs.logits.clone().requires_grad_()
    loss = case.fused(logits, inputs.target, **{"reduction": "none", **inputs.operands, **arguments})
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss.detach(), gradient


def expected_rows(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same by the reference, in float64."""
    logits = inputs.logits.double().requires_grad_()
    operands = {name: operand.double() for name, operand in inputs.operands.items()}
    loss = case.rows(logits, inputs.target, **operands)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss.detach(), gradient


def second_order(
    case: Case, inputs: Inputs, direction: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Tangent and Hessian-vector product."""
    v = torch.randn_like(inputs.logits) if direction is None else direction
    arguments = {**inputs.operands, **arguments}

    def rows(z: Tensor) -> Tensor:
        return case.fused(z, inputs.target, reduction="none", **arguments)

    return jvp(rows, (inputs.logits,), (v,))[1], jvp(grad(lambda z: rows(z).sum()), (inputs.logits,), (v,))[1]


def value_is_smoothed(case: Case) -> bool:
    """Every class adds -log p: one that is impossible makes the value infinite, as in torch."""
    return bool(case.effective_options.get("label_smoothing"))


def overflows(case: Case) -> bool:
    """The weight of an impossible target is infinite: the ratio by p without a cap."""
    return case.name == "dimp" and case.effective_options["max_weight"] is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("columns", [[0], [4, 39], list(range(10, 40))], ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_minus_infinity_beside_the_target_drops_the_class(case: Case, columns: list[int], dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 3, 40, dtype)
    inputs.target[:] = torch.tensor([1, 2, 8])
    rest = [k for k in range(40) if k not in columns]
    kept = torch.tensor([rest.index(int(k)) for k in inputs.target])
    smaller = Inputs(inputs.logits[:, rest], kept, inputs.sample_weight, inputs.class_weight, inputs.operands)
    inputs.logits[:, columns] = -INF
    value, gradient = evaluate(case, inputs)
    if value_is_smoothed(case):
        assert (value == INF).all()
        assert gradient.isfinite().all()
        return
    expected, expected_gradient = evaluate(case, smaller)
    assert (gradient[:, columns] == 0).all()
    wide = value.dtype
    assert relative_error(value, expected) <= FLOOR[wide]
    assert relative_error(gradient[:, rest], expected_gradient, 1) <= FLOOR[dtype]
    direction = torch.randn(3, 40).to(dtype)
    tangent, hvp = second_order(case, inputs, direction)
    true_tangent, true_hvp = second_order(case, smaller, direction[:, rest])
    assert (hvp[:, columns] == 0).all()
    assert relative_error(tangent, true_tangent) <= 8 * FLOOR[wide]
    assert relative_error(hvp[:, rest], true_hvp, 1) <= 8 * FLOOR[dtype]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("c", [2, 7, 100])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_minus_infinity_everywhere_but_at_the_target(case: Case, c: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 4, c, dtype)
    at_target = inputs.logits.gather(1, inputs.target[:, None])
    inputs.logits[:] = torch.full_like(inputs.logits, -INF).scatter_(1, inputs.target[:, None], at_target)
    value, gradient = evaluate(case, inputs)
    if value_is_smoothed(case):
        assert (value == INF).all()
        assert gradient.isfinite().all()
        return
    # p = 1: no loss, but for the z-loss of the only logit that is left.
    z_loss = case.effective_options.get("z_loss") or 0.0
    lse = at_target.squeeze(1).double()
    torch.testing.assert_close(value.double(), z_loss * lse**2, rtol=1e-6, atol=0)
    expected = torch.zeros_like(gradient, dtype=torch.float64)
    expected.scatter_(1, inputs.target[:, None], (2 * z_loss * lse)[:, None])
    torch.testing.assert_close(gradient.double(), expected, rtol=0.01, atol=0)
    for derivative in second_order(case, inputs):
        assert derivative.isfinite().all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_minus_infinity_at_the_target(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 3, 20, dtype)
    logits = inputs.logits.double().clone()
    finite = Inputs(logits, inputs.target, inputs.sample_weight, inputs.class_weight, inputs.operands)
    inputs.logits[1, inputs.target[1]] = -INF
    # exp(-600) is as good as zero, so that this is the limit, unless the value grows without bound.
    finite.logits[1, inputs.target[1]] = -600
    value, gradient = evaluate(case, inputs)
    if overflows(case):
        assert value[1] == INF
        assert not gradient[1, inputs.target[1]].isfinite()
        keep = torch.tensor([0, 2])
    else:
        keep = torch.arange(3)
    expected, expected_gradient = expected_rows(case, finite)
    expected[1] = INF if expected[1] > 50 else expected[1]
    torch.testing.assert_close(value[keep].double(), expected[keep], rtol=1e-5, atol=1e-6)
    tolerance = max(1e-5, FLOOR[dtype])
    torch.testing.assert_close(gradient[keep].double(), expected_gradient[keep], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("tile", [16, 64, 512, 1024, 1999])
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_minus_infinity_in_the_whole_first_tile(case: Case, tile: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 3, 2000, dtype)
    inputs.target[:] = 1999
    inputs.logits[:, :tile] = -INF
    value, gradient = evaluate(case, inputs)
    rest = Inputs(
        inputs.logits[:, tile:].contiguous(),
        inputs.target - tile,
        inputs.sample_weight,
        inputs.class_weight,
        inputs.operands,
    )
    expected, expected_gradient = evaluate(case, rest)
    assert (gradient[:, :tile] == 0).all()
    assert relative_error(value, expected) <= FLOOR[value.dtype]
    assert relative_error(gradient[:, tile:], expected_gradient, 1) <= FLOOR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", [math.nan, INF, "all -inf"], ids=str)
@pytest.mark.parametrize("column", [0, 37, 99])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_row_without_a_softmax_is_nan_alone(case: Case, column: int, what: Any, dtype: torch.dtype) -> None:
    """NaN, +inf, or nothing but -inf: torch gives NaN for the row, and so does every loss here, in that row alone."""
    inputs = make_inputs(case, 3, 100, dtype)
    clean = evaluate(case, inputs)
    if what == "all -inf":
        inputs.logits[1] = -INF
        inputs.target[1] = column
    else:
        inputs.logits[1, column] = what
    assert F.cross_entropy(inputs.logits.double(), inputs.target, reduction="none").isnan().tolist() == [
        False,
        True,
        False,
    ]
    value, gradient = evaluate(case, inputs)
    tangent, hvp = second_order(case, inputs)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert tangent[1].isnan()
    assert hvp[1].isnan().any()
    others = torch.tensor([0, 2])
    torch.testing.assert_close((value[others], gradient[others]), (clean[0][others], clean[1][others]), rtol=0, atol=0)
    assert tangent[others].isfinite().all()
    assert hvp[others].isfinite().all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_huge_logits(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 6, 5, dtype)
    inputs.logits[:] = torch.tensor([-1e4, 1e4, 0.0, 1e4, -1e4])
    inputs.logits[4:] = torch.tensor([1e4, 1e4 - 8, 1e4 - 16, 0.0, 1e4 - 8])
    inputs.target[:] = torch.tensor([0, 1, 2, 3, 0, 1])
    value, gradient = evaluate(case, inputs)
    expected, expected_gradient = expected_rows(case, inputs)
    wide = value.dtype
    # A weight that does not fit the type takes its row with it, and only that row.
    fits = expected.to(wide).isfinite() & expected_gradient.isfinite().all(dim=1)
    assert fits.sum() >= 4
    torch.testing.assert_close(value[fits].double(), expected[fits], rtol=1e-5, atol=1e-6)
    tolerance = max(1e-5, 2 * FLOOR[dtype])
    torch.testing.assert_close(gradient[fits].double(), expected_gradient[fits], rtol=tolerance, atol=tolerance)
    assert (value[expected == INF] == INF).all()


@pytest.mark.parametrize("hostile", [INF, -INF], ids=str)
@pytest.mark.parametrize("where", ["target", "other", "row"])
@pytest.mark.parametrize("excluded_by", ["weight", "ignore_index"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_an_excluded_row_adds_exactly_zero(case: Case, excluded_by: str, where: str, hostile: float) -> None:
    """Weight zero or ignored: nothing of the row reaches value or derivatives, whatever its logits are."""
    inputs = make_inputs(case, 4, 9, torch.float32)
    inputs.target[:] = torch.tensor([3, 5, 0, 8])
    columns = {"target": [5], "other": [2], "row": list(range(9))}[where]
    inputs.logits[1, columns] = hostile
    weight = inputs.sample_weight.clone()
    if excluded_by == "weight":
        weight[1] = 0
    else:
        inputs.target[1] = -100
    value, gradient = evaluate(case, inputs, sample_weight=weight)
    tangent, hvp = second_order(case, inputs, sample_weight=weight)
    for result in (value, gradient, tangent, hvp):
        assert (result[1] == 0).all()
        assert result.isfinite().all()
    rest = torch.tensor([0, 2, 3])
    kept = Inputs(
        inputs.logits[rest],
        inputs.target[rest],
        weight[rest],
        inputs.class_weight,
        {k: v[rest] for k, v in inputs.operands.items()},
    )
    for reduction in ("sum", "weighted_mean"):
        total, total_gradient = evaluate(case, inputs, sample_weight=weight, reduction=reduction)
        expected, expected_gradient = evaluate(case, kept, sample_weight=kept.sample_weight, reduction=reduction)
        torch.testing.assert_close((total, total_gradient[rest]), (expected, expected_gradient))
        assert (total_gradient[1] == 0).all()


@pytest.mark.parametrize("excluded_by", ["weight", "ignore_index"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_an_excluded_row_adds_zero_where_weights_are_learned(case: Case, excluded_by: str) -> None:
    """The same with gradients of class weights and operands, which take another route than the kernels' own."""
    inputs = make_inputs(case, 4, 9)
    inputs.target[:] = torch.tensor([3, 5, 0, 8])
    weight = inputs.sample_weight.clone()
    inputs.logits[1, 5] = INF
    if excluded_by == "weight":
        weight[1] = 0
    else:
        inputs.target[1] = -100
    leaves = {
        name: t.clone().requires_grad_() for name, t in {**inputs.operands, "class_weight": inputs.class_weight}.items()
    }
    logits = inputs.logits.clone().requires_grad_()
    loss = case.fused(logits, inputs.target, sample_weight=weight, reduction="sum", **leaves)
    gradients = torch.autograd.grad(loss, [logits, *leaves.values()])
    assert loss.isfinite()
    assert (gradients[0][1] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
    for gradient in gradients[1:-1]:
        assert gradient[1] == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_all_rows_ignored(case: Case, reduction: str) -> None:
    inputs = make_inputs(case, 4, 3)
    inputs.target[:] = -100
    value, gradient = evaluate(case, inputs, reduction=reduction)
    if reduction in ("mean", "weighted_mean"):
        assert value.isnan()
    else:
        assert value.count_nonzero() == 0
        assert gradient.count_nonzero() == 0
    theirs = inputs.logits.clone().requires_grad_()
    if reduction != "weighted_mean":
        F.cross_entropy(theirs, inputs.target, reduction=reduction).sum().backward()
        torch.testing.assert_close(gradient, theirs.grad, equal_nan=True)
    guarded, guarded_gradient = evaluate(case, inputs, reduction="mean", normalizer=1.0)
    assert guarded == 0
    assert guarded_gradient.count_nonzero() == 0


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_no_rows(case: Case, reduction: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 0, 3, dtype)
    value, gradient = evaluate(case, inputs, reduction=reduction, sample_weight=inputs.sample_weight)
    assert gradient.shape == (0, 3)
    if reduction == "none":
        assert value.shape == (0,)
    elif reduction == "sum":
        assert value == 0
    else:
        assert value.isnan()
    tangent, hvp = second_order(case, inputs)
    assert tangent.shape == (0,)
    assert hvp.shape == (0, 3)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_one_class(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 4, 1, dtype)
    z_loss = case.effective_options.get("z_loss") or 0.0
    z = inputs.logits.squeeze(1).double()
    value, gradient = evaluate(case, inputs)
    torch.testing.assert_close(value.double(), z_loss * z**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.squeeze(1).double(), 2 * z_loss * z, rtol=0.01, atol=0)
    for derivative in second_order(case, inputs):
        assert derivative.isfinite().all()
        assert z_loss or derivative.double().abs().max() <= 1e-15


@pytest.mark.parametrize("case", ALL, ids=str)
def test_two_classes_that_are_all_but_certain(case: Case) -> None:
    """t is far below the rounding of the logits' difference: log1p of the other class, not a difference of logs."""
    inputs = make_inputs(case, 4, 2, torch.float32)
    inputs.target[:] = torch.tensor([0, 1, 0, 1])
    inputs.logits[:] = torch.tensor([[30.0, 16.0], [16.0, 30.0], [16.0, 30.0], [1000.0, 985.0]])
    value, gradient = evaluate(case, inputs)
    expected, expected_gradient = expected_rows(case, inputs)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", TARGET_DTYPES, ids=str)
@pytest.mark.parametrize(("row", "label"), [(0, 5), (3, 200), (6, 5), (2, -1), (6, -99)])
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_a_target_outside_the_classes(case: Case, row: int, label: int, dtype: torch.dtype) -> None:
    if dtype == torch.uint8 and label < 0:
        label += 256
    inputs = make_inputs(case, 7, 5)
    target = inputs.target.to(dtype)
    target[row] = label
    with pytest.raises(RuntimeError, match=rf"target.*\b{row}\b.*{label}\b.*\b5\b"):
        case.fused(inputs.logits, target, **inputs.operands)


def test_a_target_outside_the_classes_under_transforms() -> None:
    logits, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 9, 1])
    with pytest.raises(RuntimeError, match=r"\b1\b.*\b9\b"):
        grad(lambda z: synkern.fused_cross_entropy(z, target))(logits.detach())
    compiled = torch.compile(synkern.fused_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"\b1\b.*\b9\b"):
        compiled(logits, target)


def wrong(what: str, error: type[Exception], words: str, **change: Any) -> Any:
    """A change to a good call, what it raises, and words of the message beside the function's name."""
    return pytest.param(change, error, words.split("|"), id=what)


LONG = torch.long
WRONG_ARGUMENTS = [
    wrong("integer logits", TypeError, "logits|float|int64", logits=torch.ones(4, 5, dtype=LONG)),
    wrong("bool logits", TypeError, "logits|bool", logits=torch.ones(4, 5, dtype=torch.bool)),
    wrong("complex logits", TypeError, "logits|complex", logits=torch.ones(4, 5, dtype=torch.complex64)),
    wrong("list for logits", TypeError, "logits|Tensor|list", logits=[[1.0, 2.0]]),
    wrong("scalar logits", ValueError, "logits|()", logits=torch.ones(())),
    wrong("float target", TypeError, "target|int64|float32", target=torch.ones(4)),
    wrong("one-hot float target", TypeError, "target|argmax", target=torch.ones(4, 5)),
    wrong("bool target", TypeError, "target|bool", target=torch.ones(4, dtype=torch.bool)),
    wrong("one-hot target", ValueError, "target|(4,)|(4, 5)", target=torch.ones(4, 5, dtype=LONG)),
    wrong("column target", ValueError, "(4,)|(4, 1)|squeeze", target=torch.ones(4, 1, dtype=LONG)),
    wrong("short target", ValueError, "target|(4,)|(3,)", target=torch.ones(3, dtype=LONG)),
    wrong("scalar target", ValueError, "target|(4,)|()", target=torch.tensor(1)),
    wrong("list for target", TypeError, "target|Tensor|list", target=[0, 1, 2, 3]),
    wrong("short weight", ValueError, "sample_weight|(4,)|(3,)", sample_weight=torch.ones(3)),
    wrong("column weight", ValueError, "sample_weight|(4, 1)|squeeze", sample_weight=torch.ones(4, 1)),
    wrong("scalar weight", ValueError, "sample_weight|()", sample_weight=torch.tensor(2.0)),
    wrong("integer weight", TypeError, "sample_weight|float|int64", sample_weight=torch.ones(4, dtype=LONG)),
    wrong("list for weight", TypeError, "sample_weight|list", sample_weight=[1.0] * 4),
    wrong("short class weight", ValueError, "class_weight|(5,)|(4,)", class_weight=torch.ones(4)),
    wrong("integer class weight", TypeError, "class_weight|int64", class_weight=torch.ones(5, dtype=LONG)),
    wrong("row of class weights", ValueError, "class_weight|(1, 5)", class_weight=torch.ones(1, 5)),
    wrong("unknown reduction", ValueError, "reduction|mean|average", reduction="average"),
    wrong("no reduction", ValueError, "reduction|None", reduction=None),
    wrong("normalizer of a sum", ValueError, "normalizer|sum", reduction="sum", normalizer=2.0),
    wrong("normalizer a row", ValueError, "normalizer|(4,)", normalizer=torch.ones(4)),
    wrong("unknown backend", ValueError, "backend|abacus", backend="abacus"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG_ARGUMENTS)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_wrong_arguments(case: Case, change: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    inputs = make_inputs(case, 4, 5, torch.float32)
    arguments = {"logits": inputs.logits, "target": inputs.target, **inputs.operands, **change}
    with pytest.raises(error) as raised:
        case.spec.function(arguments.pop("logits"), arguments.pop("target"), **arguments)
    for word in [case.spec.function.__name__, *words]:
        assert word in str(raised.value), str(raised.value)


OPERANDS = [(case, name) for case in DEFAULTS for name in case.spec.operands]


@pytest.mark.parametrize(("case", "name"), OPERANDS, ids=str)
def test_wrong_operands(case: Case, name: str) -> None:
    inputs = make_inputs(case, 4, 5, torch.float32)
    good = inputs.operands[name]
    wrong: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
        ({name: None}, ValueError, [name, f"log_{name}"]),
        ({f"log_{name}": good.log()}, ValueError, [name, f"log_{name}"]),
        ({name: good[:, None]}, ValueError, [name, "(4,)", "(4, 1)", "squeeze"]),
        ({name: good[:3]}, ValueError, [name, "(4,)", "(3,)"]),
        ({name: good.long()}, TypeError, [name, "int64"]),
        ({name: None, f"log_{name}": good[:3].log()}, ValueError, [f"log_{name}", "(4,)", "(3,)"]),
    ]
    for change, error, words in wrong:
        with pytest.raises(error) as raised:
            case.fused(inputs.logits, inputs.target, **{**inputs.operands, **change})
        for word in [case.spec.function.__name__, *words]:
            assert word in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cross_entropy", {"label_smoothing": 1.5}),
        ("cross_entropy", {"label_smoothing": -0.1}),
        ("cross_entropy", {"label_smoothing": math.nan}),
        ("cross_entropy", {"z_loss": -1.0}),
        ("rce", {"log_zero": 1.0}),
        ("gce", {"q": -0.5}),
        ("gce", {"q": 1.5}),
        ("gce", {"truncation": 1.5}),
        ("gce", {"truncation": -0.5}),
        ("focal", {"gamma": -1.0}),
        ("imp", {"max_weight": -1.0}),
        ("dimp", {"max_weight": -1.0}),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, float]) -> None:
    case = Case(synkern.registry.LOSSES[name], options, synkern.backends.available()[0])
    inputs = make_inputs(case, 4, 5)
    ((option, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{case.spec.function.__name__}.*{option}.*{re.escape(str(abs(value)))}"):
        case.fused(inputs.logits, inputs.target, **inputs.operands)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_meta_tensors(case: Case, dtype: torch.dtype, reduction: str) -> None:
    real = make_inputs(case, 4, 5, dtype)

    def on(device: str) -> tuple[Tensor, Tensor]:
        logits = real.logits.to(device).requires_grad_()
        operands = {name: operand.to(device) for name, operand in real.operands.items()}
        weights = {"sample_weight": real.sample_weight.to(device), "class_weight": real.class_weight.to(device)}
        loss = case.spec.function(
            logits, real.target.to(device), reduction=reduction, **weights, **operands, **case.options
        )
        return loss, torch.autograd.grad(loss, logits, torch.ones_like(loss))[0]

    for meta, actual in zip(on("meta"), on(str(case.device)), strict=True):
        assert meta.device.type == "meta"
        assert (meta.shape, meta.dtype, meta.stride()) == (actual.shape, actual.dtype, actual.stride())


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_tensors_of_another_device_are_refused(case: Case) -> None:
    inputs = make_inputs(case, 4, 5)
    with pytest.raises(ValueError, match=r"target.*meta"):
        case.fused(inputs.logits, inputs.target.to("meta"), **inputs.operands)
    with pytest.raises(ValueError, match=r"sample_weight.*meta"):
        case.fused(inputs.logits, inputs.target, sample_weight=inputs.sample_weight.to("meta"), **inputs.operands)


DIMP = [case for case in ALL if case.name == "dimp" and case.effective_options["max_weight"] is None]


def binary_logits(log_p: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two classes, target 0, with log p of the target as given (up to rounding) for log p far below 0."""
    logits = torch.zeros(len(log_p), 2, dtype=dtype)
    logits[:, 0] = torch.tensor(log_p)
    return logits, torch.zeros(len(log_p), dtype=torch.long)


@pytest.mark.parametrize("case", DIMP, ids=str)
def test_dimp_is_exact_wherever_it_fits(case: Case) -> None:
    """The ratio is finite though p, 1 / p or P' alone would underflow or overflow in float32."""
    log_p = [-87.0, -100.0, -118.0, -80.0, -88.0, -30.0]
    log_quality = [math.log(1e-38), -40.0, -120.0, 0.0, -5.0, -100.0]
    logits, target = binary_logits(log_p, torch.float32)
    inputs = Inputs(logits, target, torch.ones(6), torch.ones(2), {"log_quality": torch.tensor(log_quality)})
    value, gradient = evaluate(case, inputs)
    expected, expected_gradient = expected_rows(case, inputs)
    assert expected.float().isfinite().all()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", DIMP, ids=str)
def test_dimp_is_exact_for_tiny_probabilities(case: Case) -> None:
    logits, target = binary_logits([-87.0, -100.0, -60.0, -5.0], torch.float32)
    quality = torch.tensor([1e-38, 1e-37, 3e-39, 1e-30])
    inputs = Inputs(logits, target, torch.ones(4), torch.ones(2), {"quality": quality})
    value, gradient = evaluate(case, inputs)
    expected, expected_gradient = expected_rows(case, inputs)
    assert (expected > 0).all()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-45)


@pytest.mark.parametrize("case", DIMP, ids=str)
def test_dimp_with_a_sample_weight_that_brings_it_back(case: Case) -> None:
    """The ratio alone does not fit float32, the weighted loss does."""
    logits, target = binary_logits([-95.0, -3.0], torch.float32)
    inputs = Inputs(logits, target, torch.tensor([1e-10, 1.0]), torch.ones(2), {"log_quality": torch.zeros(2)})
    value, gradient = evaluate(case, inputs, sample_weight=inputs.sample_weight)
    expected, expected_gradient = (x.double() for x in expected_rows(case, inputs))
    weight = inputs.sample_weight.double()
    assert (expected * weight).float().isfinite().all()
    torch.testing.assert_close(value.double(), expected * weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient * weight[:, None], rtol=1e-4, atol=0)


@pytest.mark.parametrize("detach_weight", [True, False])
def test_dimp_cap_holds_where_the_ratio_overflows(detach_weight: bool) -> None:
    logits, target = binary_logits([-500.0, -1e4, -2.0, -INF], torch.float32)
    quality = torch.tensor([1.0, 1.0, 0.5, 1.0])
    logits = logits.requires_grad_()
    loss, weight = synkern.fused_dimp_loss(
        logits, target, quality, max_weight=3.0, detach_weight=detach_weight, reduction="none", return_weights=True
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    log_p = logits.detach().double().log_softmax(1)[:, 0]
    torch.testing.assert_close(weight, torch.full((4,), 3.0))
    torch.testing.assert_close(loss.double(), -3 * log_p, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double()[:, 1], 3 * (1 - log_p.exp()))
    assert_float64_equal(gradient.sum(dim=1).double(), torch.zeros(4, dtype=torch.float64))


LARGE = 2**31


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy", "dimp"])
@pytest.mark.parametrize("shape", [(LARGE // 32_000 + 2, 32_000), (1, LARGE + 9)], ids=str)
def test_more_than_2_31_elements(shape: tuple[int, int], name: str) -> None:
    """Row and column offsets beyond 32 bits, in bfloat16. The logits of all rows share memory, not so the gradient."""
    n, c = shape
    row = torch.zeros(c, dtype=torch.bfloat16)
    row[c - 1] = 20.0
    logits = row.expand(n, c).requires_grad_()
    target = torch.full((n,), c - 1)
    target[0] = c - 2
    case = Case(synkern.registry.LOSSES[name], {}, "cpu")
    operands = {k: torch.full((n,), 0.5) for k in case.spec.operands}
    loss = case.fused(logits, target, reduction="none", **operands)
    (gradient,) = torch.autograd.grad(loss, logits, torch.full((n,), 64.0))
    lse = math.log(c - 1 + math.exp(20.0))
    for i in {0, 1, n // 2, n - 1} - ({1} if n == 1 else set()):
        y = int(target[i])
        t = float(row[y]) - lse
        ratio = 0.5 * math.exp(-t) if name == "dimp" else 1.0
        assert loss[i].item() == pytest.approx(-ratio * t, rel=1e-5)
        for k in (0, c // 2, c - 3, c - 2, c - 1):
            expected = 64 * ratio * (math.exp(float(row[k]) - lse) - (k == y))
            assert gradient[i, k].item() == pytest.approx(expected, rel=0.01), (i, k)
