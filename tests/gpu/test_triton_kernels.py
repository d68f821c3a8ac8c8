"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter, at small sizes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import FLOAT_DTYPES, REDUCTIONS, TARGET_DTYPES, Case, Inputs, make_inputs
from test_values import eager_result, kernel_result
from tolerances import FLOOR, Result, assert_as_exact_as_torch, assert_float64_equal, relative_error, split_columns
from torch import Tensor
from torch import library as torch_library
from torch.func import grad, hessian, jvp, vmap

import synkern
from synkern.registry import LOSSES

pytest.importorskip("triton", reason="the package triton is not installed")

ALL = [Case(spec, options, "triton") for spec in LOSSES.values() for options in spec.variants]
DEFAULTS = [case for case in ALL if not case.options]
DEVICE = ALL[0].device
OPS = torch.ops.synkern_triton


# How rows are split has nothing to do with the loss: two losses stand for all where tiles are small.
WALKED = [case for case in ALL if str(case) in ("cross_entropy-label_smoothing=0.3,z_loss=0.001-triton", "dimp-triton")]
TILES = [*((case, "natural") for case in ALL), *((case, "small") for case in WALKED)]
BOTH_TILES = pytest.mark.parametrize("tiles", ["natural", "small"], indirect=True)
EVERY_DEFAULT = pytest.mark.parametrize(
    ("case", "tiles"), [pair for pair in TILES if not pair[0].options], ids=str, indirect=["tiles"]
)
EVERY_LOSS = pytest.mark.parametrize(("case", "tiles"), TILES, ids=str, indirect=["tiles"])


@pytest.fixture
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With small tiles several programs share the rows, and rows longer than a tile are walked."""
    from synkern.triton_kernels import launch, operators

    if request.param == "small":
        monkeypatch.setattr(operators, "row_tile", lambda *_: launch.Tile(2, 16, 4))
        monkeypatch.setattr(operators, "PART_ROWS", 2)
        monkeypatch.setattr(operators, "WHOLE_ELEMENTS", 0)
    yield request.param


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@EVERY_LOSS
def test_as_exact_as_torch(case: Case, dtype: torch.dtype, tiles: str) -> None:
    n, c = (5, 7) if tiles == "natural" else (3, 37)
    inputs = make_inputs(case, n, c, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cotangent = (c * (0.5 + torch.rand(n, dtype=torch.float64, device=DEVICE))).to(wide)
    expected = eager_result(case, inputs, cotangent, torch.float64, torch.float64)
    torch_result = eager_result(case, inputs, cotangent, wide, dtype)
    actual = kernel_result(case, inputs, cotangent)
    assert actual.value.dtype == wide
    assert actual.gradient.dtype == dtype
    assert_as_exact_as_torch(actual, torch_result, expected, inputs.target, dtype)


def test_a_gradient_without_its_softmax_term_is_noticed() -> None:
    case = DEFAULTS[0]
    inputs = make_inputs(case, 5, 37, torch.float32)
    cotangent = torch.ones(5, device=DEVICE)
    expected = eager_result(case, inputs, cotangent.double(), torch.float64, torch.float64)
    actual = kernel_result(case, inputs, cotangent)
    assert_as_exact_as_torch(actual, actual, expected, inputs.target, torch.float32)
    is_target = torch.zeros_like(actual.gradient).scatter_(1, inputs.target[:, None], 1.0)
    spoilt = Result(actual.value, actual.gradient * is_target)
    with pytest.raises(AssertionError, match="other columns"):
        assert_as_exact_as_torch(spoilt, actual, expected, inputs.target, torch.float32)


def loss_and_gradients(case: Case, function: Any, inputs: Inputs, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradient for logits and sample weights."""
    leaves = [inputs.logits.clone().requires_grad_(), inputs.sample_weight.clone().requires_grad_()]
    loss = function(
        leaves[0], inputs.target, sample_weight=leaves[1], class_weight=inputs.class_weight, **inputs.operands,
        **arguments,
    )
    return loss.detach(), list(torch.autograd.grad(3 * loss.sum(), leaves))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@BOTH_TILES
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_reductions_weights_and_ignored_rows(case: Case, reduction: str, tiles: str) -> None:
    inputs = make_inputs(case, 5, 19)
    inputs.target[2] = -100
    assert_float64_equal(
        loss_and_gradients(case, case.fused, inputs, reduction=reduction),
        loss_and_gradients(case, case.reference, inputs, reduction=reduction),
    )


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_gradient_made_in_the_forward_pass(case: Case, dtype: torch.dtype, scale: float) -> None:
    """A cotangent other than 1 is met on the device: scaled, or made anew where scaling would round twice."""
    inputs = make_inputs(case, 4, 6, dtype, spread=1.0)
    logits, weight = inputs.logits.clone().requires_grad_(), inputs.sample_weight.clone().requires_grad_()
    loss = case.fused(logits, inputs.target, sample_weight=weight, reduction="sum", **inputs.operands)
    actual = torch.autograd.grad(scale * loss, (logits, weight))
    exact = [inputs.logits.double().requires_grad_(), inputs.sample_weight.double().requires_grad_()]
    operands = {name: operand.double() for name, operand in inputs.operands.items()}
    expected = torch.autograd.grad(
        scale * case.reference(exact[0], inputs.target, sample_weight=exact[1], reduction="sum", **operands), exact
    )
    for found, true in zip(split_columns(actual[0], inputs.target), split_columns(expected[0], inputs.target),
                           strict=True):  # fmt: skip
        assert relative_error(found, true) <= 2 * FLOOR[dtype]
    assert relative_error(actual[1], expected[1]) <= 4 * FLOOR[torch.float32]


CHECKED = [case for case in ALL if str(case) in ("focal-triton", "dimp-detach_weight=False-triton")]


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_finite_differences(case: Case) -> None:
    inputs = make_inputs(case, 1, 3)

    def function(logits: Tensor, weight: Tensor) -> Tensor:
        return case.fused(logits, inputs.target, sample_weight=weight, reduction="none", **inputs.operands)

    point = inputs.logits.requires_grad_(), inputs.sample_weight.requires_grad_()
    assert len(CHECKED) == 2
    assert torch.autograd.gradcheck(function, point, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, point)


@EVERY_LOSS
def test_derivatives_equal_the_reference(case: Case, tiles: str) -> None:
    inputs = make_inputs(case, 3, 19)
    inputs.target[1] = -100
    rest = {"sample_weight": inputs.sample_weight, "class_weight": inputs.class_weight, **inputs.operands}
    v = torch.randn(3, 19, dtype=torch.float64, device=DEVICE)

    def derivatives(function: Any) -> Any:
        def rows(z: Tensor) -> Tensor:
            return function(z, inputs.target, reduction="none", **rest)

        def weighted(z: Tensor, w: Tensor) -> Tensor:
            return function(z, inputs.target, reduction="mean", **{**rest, "sample_weight": w})

        both = grad(weighted, argnums=(0, 1))
        point = (inputs.logits, inputs.sample_weight)
        return jvp(rows, (inputs.logits,), (v,)), jvp(both, point, (v, torch.ones_like(point[1])))

    assert_float64_equal(derivatives(case.fused), derivatives(case.reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_tangent_and_hvp_as_exact_as_torch(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 4, 37, dtype)
    v = torch.randn(4, 37, dtype=torch.float64, device=DEVICE).to(dtype)

    def derivatives(function: Any, leaf: torch.dtype, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        operands = {name: operand.to(compute) for name, operand in inputs.operands.items()}

        def rows(z: Tensor) -> Tensor:
            return function(z if function is case.fused else z.to(compute), inputs.target, reduction="none", **operands)

        z, direction = inputs.logits.to(leaf), v.to(leaf)
        return jvp(rows, (z,), (direction,))[1], jvp(grad(lambda a: 20 * rows(a).sum()), (z,), (direction,))[1]

    exact = derivatives(case.reference, torch.float64, torch.float64)
    peer = derivatives(case.reference, dtype, torch.float32)
    actual = derivatives(case.fused, dtype, torch.float32)
    for ours, theirs, true, floor, dim in zip(
        actual, peer, exact, (4 * FLOOR[torch.float32], 4 * FLOOR[dtype]), (None, 1), strict=True
    ):
        assert relative_error(ours, true, dim) <= 2 * relative_error(theirs, true, dim) + floor


def test_transforms_stay_on_this_backend() -> None:
    """Derivative code calls the operators of the namespace it began in."""
    case = DEFAULTS[0]
    inputs = make_inputs(case, 2, 3)
    called: set[str] = set()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(function.namespace)
            return function(*args, **(kwargs or {}))

    def fused(z: Tensor) -> Tensor:
        return case.fused(z, inputs.target)

    with Record():
        found = hessian(fused)(inputs.logits)
        vmap(grad(lambda z, y: case.fused(z, y, reduction="none")))(inputs.logits, inputs.target)
    assert "synkern_triton" in called
    assert "synkern" not in called
    assert_float64_equal(found, hessian(lambda z: case.reference(z, inputs.target))(inputs.logits))


@pytest.mark.parametrize("dtype", TARGET_DTYPES, ids=str)
def test_every_target_dtype(dtype: torch.dtype) -> None:
    case = DEFAULTS[0]
    inputs = make_inputs(case, 4, 200)
    inputs.target[0] = 199
    plain = case.fused(inputs.logits, inputs.target, reduction="none")
    assert torch.equal(case.fused(inputs.logits, inputs.target.to(dtype), reduction="none"), plain)


@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed", "misaligned"])
def test_layouts(layout: str) -> None:
    case = DEFAULTS[0]
    inputs = make_inputs(case, 4, 6, torch.float32)
    z = {
        "strided": lambda: torch.stack([inputs.logits, inputs.logits + 1], 1).reshape(8, 6)[::2],
        "expanded": lambda: inputs.logits[:1].expand(4, 6),
        "transposed": lambda: inputs.logits.T.contiguous().T,
        "misaligned": lambda: torch.cat([inputs.logits, inputs.logits], 1)[:, 1:7],
    }[layout]()
    assert not (z.is_contiguous() and z.data_ptr() % 16 == 0)
    results = []
    for logits in (z, z.contiguous()):
        leaf = logits.detach().requires_grad_()
        loss = case.fused(leaf, inputs.target, reduction="none")
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@BOTH_TILES
def test_no_rows_and_none_kept(reduction: str, tiles: str) -> None:
    for n in (0, 3):
        case = next(case for case in DEFAULTS if case.name == "dimp")
        inputs = make_inputs(case, n, 4, torch.float32)
        inputs.target[:] = -100
        logits = inputs.logits.requires_grad_()
        loss = case.fused(logits, inputs.target, sample_weight=inputs.sample_weight, reduction=reduction,
                          **inputs.operands)  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.shape == (n, 4)
        if reduction != "weighted_mean":  # whose denominator, outside the operator, makes the cotangent infinite
            assert gradient.count_nonzero() == 0
        assert loss.isnan() if "mean" in reduction else loss.count_nonzero() == 0


def rows_of(case: Case, inputs: Inputs, **arguments: Any) -> list[Tensor]:
    """Values, gradients, tangents and Hessian-vector products."""
    v = torch.ones_like(inputs.logits)

    def rows(z: Tensor) -> Tensor:
        return case.fused(z, inputs.target, reduction="none", **inputs.operands, **arguments)

    value, tangent = jvp(rows, (inputs.logits,), (v,))
    gradient, hvp = jvp(grad(lambda z: rows(z).sum()), (inputs.logits,), (v,))
    return [value, gradient, tangent, hvp]


@pytest.mark.parametrize("what", [math.nan, math.inf, "all -inf", "target"], ids=str)
@EVERY_DEFAULT
def test_a_row_without_a_loss_is_nan_alone(case: Case, what: Any, tiles: str) -> None:
    """A target that is no class does what NaN does: to raise, the host would have to wait for the device."""
    inputs = make_inputs(case, 3, 20, torch.float32)
    clean = rows_of(case, inputs)
    if what == "target":
        inputs.target[1] = 20
    elif what == "all -inf":
        inputs.logits[1] = -math.inf
    else:
        inputs.logits[1, 17] = what
    value, gradient, tangent, hvp = rows_of(case, inputs)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert tangent[1].isnan()
    assert hvp[1].isnan().any()
    for hostile, plain in zip((value, gradient, tangent, hvp), clean, strict=True):
        assert torch.equal(hostile[[0, 2]], plain[[0, 2]])


@pytest.mark.parametrize("hostile", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_a_weight_of_zero_is_exact(case: Case, hostile: float) -> None:
    inputs = make_inputs(case, 3, 4, torch.float32)
    inputs.logits[1] = hostile
    weight = inputs.sample_weight.clone()
    weight[1] = 0
    for result in rows_of(case, inputs, sample_weight=weight):
        assert (result[1] == 0).all()
        assert result.isfinite().all()


@BOTH_TILES
@pytest.mark.parametrize("case", DEFAULTS[-1:], ids=str)
def test_minus_infinity_drops_a_class(case: Case, tiles: str) -> None:
    """Also where a whole tile holds nothing else."""
    inputs = make_inputs(case, 2, 40)
    inputs.target[:] = torch.tensor([33, 38])
    smaller = Inputs(inputs.logits[:, 32:], inputs.target - 32, inputs.sample_weight, inputs.class_weight,
                     inputs.operands)  # fmt: skip
    expected = rows_of(case, smaller)
    inputs.logits[:, :32] = -math.inf
    value, gradient, tangent, hvp = rows_of(case, inputs)
    assert gradient[:, :32].count_nonzero() + hvp[:, :32].count_nonzero() == 0
    assert_float64_equal([value, gradient[:, 32:], tangent, hvp[:, 32:]], expected)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_all_but_certain_rows_keep_their_digits(case: Case) -> None:
    inputs = make_inputs(case, 3, 2, torch.float32)
    inputs.logits[:] = torch.tensor([[30.0, 16.0], [16.0, 30.0], [1000.0, 985.0]])
    inputs.target[:] = torch.tensor([0, 1, 0])
    cotangent = torch.ones(3, device=DEVICE)
    expected = eager_result(case, inputs, cotangent, torch.float64, torch.float64)
    actual = kernel_result(case, inputs, cotangent)
    torch.testing.assert_close(actual.value.double(), expected.value, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(actual.gradient.double(), expected.gradient, rtol=1e-5, atol=1e-12)


def test_dimp_where_only_the_ratio_by_p_fits_float32() -> None:
    logits = torch.tensor([[-87.0, 0.0], [-100.0, 0.0], [-60.0, 0.0]], device=DEVICE)
    quality = torch.tensor([1e-38, 1e-37, 3e-35], device=DEVICE)
    target = torch.zeros(3, dtype=torch.long, device=DEVICE)
    loss = synkern.fused_dimp_loss(logits, target, quality, reduction="none", backend="triton")
    expected = synkern.reference.dimp_loss(logits.double(), target, quality.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_compiled_with_a_full_graph(fresh_compiler: None) -> None:
    case = DEFAULTS[0]
    inputs = make_inputs(case, 3, 4)

    def step(z: Tensor) -> Tensor:
        return case.fused(z, inputs.target)

    z = inputs.logits.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_float64_equal(torch.autograd.grad(compiled(z), z), torch.autograd.grad(step(z), z))


def test_operators_pass_opcheck() -> None:
    inputs = make_inputs(DEFAULTS[0], 3, 4)
    z, y, w = inputs.logits, inputs.target, inputs.sample_weight
    options = (0, 0.0, 0.0, 0.0, 0.1, 0.01, -100)
    statistics = OPS.row_loss(z, y, w, None, None, *options, 0)[1]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch_library.opcheck(OPS.row_loss.default, (z.requires_grad_(), y, w, None, None, *options, 2), test_utils=checks)
    shared = (z, y, None, None, statistics, *options)
    torch_library.opcheck(OPS.row_loss_hvp.default, (z.detach(), w, None, *shared), test_utils=checks)
    torch_library.opcheck(OPS.row_loss_tangent.default, (z.detach(), w, *shared), test_utils=checks)
    gradient, grad_weight = OPS.row_loss_backward(w, z.detach(), y, w, None, None, statistics, *options, 0)
    torch_library.opcheck(
        OPS.row_loss_rescale.default,
        (w.sum(), gradient, grad_weight, z.detach(), y, w, None, None, statistics, *options),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch_library.opcheck(
        OPS.linear_contraction.default,
        (z.detach(), z.detach()[:, :2].contiguous(), torch.randn(2, 4, dtype=z.dtype, device=DEVICE), None, None, 3),
        test_utils=("test_schema", "test_faketensor"),
    )


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_sums(actual: Tensor, terms: Tensor, magnitude: Tensor, sample: Tensor | None, dtype: torch.dtype) -> None:
    """Sums of terms (rows,) by sample, within rounding of sums in the accumulation type."""
    samples = actual.shape[0]
    if sample is None:
        expected, scale = (x.view(samples, -1).sum(1) for x in (terms, magnitude))
    else:
        expected, scale = (x.new_zeros(samples).index_add_(0, sample, x) for x in (terms, magnitude))
    assert actual.dtype == wide_of(dtype)
    floor = FLOOR[torch.float32] if dtype != torch.float64 else 1e-13
    assert (((actual.double() - expected).abs() / (scale + 1e-300)) <= floor).all()


def samples_of(rows: int, samples: int, indexed: bool) -> Tensor | None:
    return torch.randint(samples, (rows,), device=DEVICE) if indexed else None


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("dtype", "v_dtype"), [*((d, d) for d in FLOAT_DTYPES), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "samples"), [(1, 1, 1, 1), (12, 30, 17, 4), (150, 70, 140, 3)])
def test_linear_contraction(
    rows: int, inputs: int, outputs: int, samples: int, dtype: torch.dtype, v_dtype: torch.dtype, indexed: bool
) -> None:
    a, b = (torch.randn(rows, k, device=DEVICE).to(dtype) for k in (inputs, outputs))
    v = torch.randn(inputs, outputs, device=DEVICE).to(v_dtype).T
    bias = torch.randn(outputs, dtype=wide_of(dtype), device=DEVICE)
    sample = samples_of(rows, samples, indexed)
    actual = OPS.linear_contraction(a, b, v, bias, sample, samples)
    a, b, v, bias = a.double(), b.double(), v.double(), bias.double()
    magnitude = (b.abs() * (a.abs() @ v.abs().T + bias.abs())).sum(1)
    assert_sums(actual, (b * (a @ v.T + bias)).sum(1), magnitude, sample, dtype)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@BOTH_TILES
def test_embedding_contraction(dtype: torch.dtype, indexed: bool, tiles: str) -> None:
    index = torch.randint(11, (30,), device=DEVICE)
    b, v = (torch.randn(k, 37, device=DEVICE).to(dtype) for k in (30, 11))
    sample = samples_of(30, 5, indexed)
    terms = b.double() * v.double()[index]
    actual = OPS.embedding_contraction(index, b, v, sample, 5)
    assert_sums(actual, terms.sum(1), terms.abs().sum(1), sample, dtype)
    index[3] = 11
    assert OPS.embedding_contraction(index, b, v, None, 30).isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize(("weight", "bias", "centred"), [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@BOTH_TILES
def test_norm_contraction(dtype: torch.dtype, weight: bool, bias: bool, centred: bool, tiles: str) -> None:
    wide = wide_of(dtype)
    x, b = (torch.randn(24, 37, device=DEVICE).to(dtype) for _ in range(2))
    mean = x.to(wide).mean(1) if centred else None
    rstd = x.to(wide).square().mean(1).rsqrt()
    v_weight = torch.randn(37, dtype=wide, device=DEVICE) if weight else None
    v_bias = torch.randn(37, dtype=wide, device=DEVICE) if bias else None
    actual = OPS.norm_contraction(x, b, mean, rstd, v_weight, v_bias, None, 4)
    normed = (x.double() - (0 if mean is None else mean.double()[:, None])) * rstd.double()[:, None]
    terms = [b.double() * part for part in (
        normed * (0 if v_weight is None else v_weight.double()),
        torch.zeros_like(normed) if v_bias is None else v_bias.double().expand_as(normed),
    )]  # fmt: skip
    assert_sums(actual, sum(terms).sum(1), sum(t.abs() for t in terms).sum(1), None, dtype)


def test_a_sample_out_of_range_spoils_the_sums() -> None:
    sample = torch.tensor([0, 1, 2, 1], device=DEVICE)
    ones = torch.ones(4, 3, device=DEVICE)
    assert OPS.linear_contraction(ones, ones, torch.ones(3, 3, device=DEVICE), None, sample, 2).isnan().all()


@pytest.mark.parametrize(("rows", "samples"), [(0, 0), (0, 3)])
def test_contraction_of_no_rows(rows: int, samples: int) -> None:
    a = torch.ones(rows, 3, device=DEVICE)
    result = OPS.linear_contraction(a, a, torch.ones(3, 3, device=DEVICE), None, None, samples)
    assert result.tolist() == [0.0] * samples


def test_rows_that_cannot_be_split_are_refused() -> None:
    a = torch.ones(4, 3, device=DEVICE)
    with pytest.raises(ValueError, match="equal samples"):
        OPS.linear_contraction(a, a, torch.ones(3, 3, device=DEVICE), None, None, 3)


SOURCES = """
import torch, synkern
try:
    synkern.fused_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), backend="triton")
except ValueError as error:
    print(error)
"""


def test_the_interpreter_must_be_asked_for() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SOURCES], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    assert "fused_cross_entropy: backend='triton' on CPU tensors" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout
