"""The numpy front end against the reference: value, gradient, diagonal Hessian, and a boosted model trained on them."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from cases import REDUCTIONS, Case, Inputs, make_inputs
from tolerances import FLOOR, assert_float64_equal, relative_error
from torch import Tensor

import synkern.numpy
from synkern.reference import log_prob_of_target
from synkern.registry import LOSSES

CASES = [Case(spec, options, "cpu") for spec in LOSSES.values() for options in spec.variants]
SIZES = [(6, 2), (4, 17)]
INF = math.inf
ALL_REDUCTIONS = pytest.mark.parametrize("reduction", REDUCTIONS)
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=str)


def numpy_function(case: Case) -> Callable[..., Any]:
    return getattr(synkern.numpy, "cross_entropy" if case.name == "cross_entropy" else f"{case.name}_loss")


def given_arrays(inputs: Inputs, weighted: bool) -> dict[str, Any]:
    """Everything but the logits, as keyword arguments of the numpy functions."""
    arrays = {name: operand.numpy() for name, operand in inputs.operands.items()}
    if weighted:
        arrays |= {"sample_weight": inputs.sample_weight.numpy(), "class_weight": inputs.class_weight.numpy()}
    return {"target": inputs.target.numpy(), **arrays}


def actual_arrays(
    case: Case, inputs: Inputs, weighted: bool = True, **arguments: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arguments = {**given_arrays(inputs, weighted), **case.options, **arguments}
    return numpy_function(case)(inputs.logits.numpy(), derivatives=True, **arguments)


def expected_tensors(
    case: Case, inputs: Inputs, weighted: bool = True, dtype: torch.dtype = torch.float64, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and diagonal Hessian in plain PyTorch."""
    logits = inputs.logits.to(dtype)
    operands = {name: operand.to(dtype) for name, operand in inputs.operands.items()}
    if weighted:
        operands |= {"sample_weight": inputs.sample_weight.to(dtype), "class_weight": inputs.class_weight.to(dtype)}

    def loss(z: Tensor) -> Tensor:
        return case.reference(z, inputs.target, **operands, **arguments)

    factor = None
    if case.is_detached:
        # What is held constant is the factor of -t: its value here is the loss of a row over the row's -t.
        safe = inputs.target.clamp(min=0)
        rows = case.rows(logits, safe, **{name: operands[name] for name in inputs.operands})
        factor = rows / -log_prob_of_target(logits, safe)

    def summed(z: Tensor) -> Tensor:
        if factor is None:
            return loss(z).sum()
        constant = Case(LOSSES["imp"], {}, "cpu")
        common = {name: operand for name, operand in operands.items() if name not in inputs.operands}
        ones = torch.ones_like(factor)
        return constant.reference(z, inputs.target, quality=factor, diversity=ones, **common, **arguments).sum()

    gradient = torch.func.grad(summed)(logits)
    hessian = torch.func.hessian(summed)(logits).reshape(logits.numel(), logits.numel())
    return loss(logits), gradient, hessian.diagonal().reshape(logits.shape)


def inputs_with_an_ignored_row(case: Case, n: int, c: int, dtype: torch.dtype = torch.float64) -> Inputs:
    inputs = make_inputs(case, n, c, dtype)
    inputs.target[2] = -100
    return inputs


def as_tensors(arrays: tuple[np.ndarray, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(array) for array in arrays)


def test_every_registered_loss_is_there_with_its_options() -> None:
    public = {
        name
        for name, function in inspect.getmembers(synkern.numpy, inspect.isfunction)
        if function.__module__ == "synkern.numpy" and not name.startswith("_")
    }
    assert public == {numpy_function(case).__name__ for case in CASES}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@ALL_CASES
def test_value_gradient_and_hessian_of_each_row(case: Case, size: tuple[int, int], weighted: bool) -> None:
    inputs = inputs_with_an_ignored_row(case, *size)
    actual = actual_arrays(case, inputs, weighted, reduction="none")
    assert all(array.dtype == np.float64 for array in actual)
    expected = expected_tensors(case, inputs, weighted, reduction="none")
    for part, got, want in zip(("value", "gradient", "hessian"), as_tensors(actual), expected, strict=True):
        assert_float64_equal(got, want, part)


@ALL_CASES
def test_one_class_has_nothing_to_learn(case: Case) -> None:
    inputs = make_inputs(case, 5, 1)
    value, gradient, hessian = actual_arrays(case, inputs, reduction="none")
    if case.effective_options.get("z_loss"):
        _, expected_gradient, expected_hessian = expected_tensors(case, inputs, reduction="none")
        assert_float64_equal(torch.as_tensor(gradient), expected_gradient)
        assert_float64_equal(torch.as_tensor(hessian), expected_hessian)
    else:
        assert (value == 0).all()
        assert (gradient == 0).all()
        assert (hessian == 0).all()


@ALL_REDUCTIONS
@ALL_CASES
def test_reductions_scale_the_derivatives_too(case: Case, reduction: str) -> None:
    inputs = inputs_with_an_ignored_row(case, 6, 4)
    actual = actual_arrays(case, inputs, reduction=reduction)
    expected = expected_tensors(case, inputs, reduction=reduction)
    for part, got, want in zip(("value", "gradient", "hessian"), as_tensors(actual), expected, strict=True):
        assert_float64_equal(got, want, part)


@ALL_CASES
def test_float32_is_as_exact_as_torch(case: Case) -> None:
    inputs = inputs_with_an_ignored_row(case, 9, 7, torch.float32)
    actual = actual_arrays(case, inputs, reduction="none")
    assert all(array.dtype == np.float32 for array in actual)
    expected = expected_tensors(case, inputs, reduction="none")
    in_float32 = expected_tensors(case, inputs, dtype=torch.float32, reduction="none")
    for part, got, eager, want in zip(
        ("value", "gradient", "hessian"), as_tensors(actual), in_float32, expected, strict=True
    ):
        allowed = 2 * relative_error(eager, want) + FLOOR[torch.float32]
        assert relative_error(got, want) <= allowed, part


@ALL_REDUCTIONS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_derivatives_the_same_value_alone(dtype: Any, reduction: str) -> None:
    case = CASES[0]
    inputs = inputs_with_an_ignored_row(case, 6, 4)
    arguments = given_arrays(inputs, weighted=True) | {"reduction": reduction}
    logits = inputs.logits.numpy().astype(dtype)
    alone = synkern.numpy.cross_entropy(logits, **arguments)
    value, gradient, hessian = synkern.numpy.cross_entropy(logits, derivatives=True, **arguments)
    assert alone.dtype == value.dtype == gradient.dtype == hessian.dtype == dtype
    assert np.array_equal(alone, value)
    assert alone.shape == ((6,) if reduction == "none" else ())


@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255])
def test_any_index_can_be_the_ignored_one(ignore_index: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 4))
    target = np.array([0, 3, ignore_index, 1, ignore_index])
    kept = target != ignore_index
    value, gradient, hessian = synkern.numpy.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="none", derivatives=True
    )
    assert (value[~kept] == 0).all()
    assert (gradient[~kept] == 0).all()
    assert (hessian[~kept] == 0).all()
    expected = synkern.numpy.cross_entropy(logits[kept], target[kept], reduction="none", derivatives=True)
    for got, want in zip((value, gradient, hessian), expected, strict=True):
        assert np.array_equal(got[kept], want)


def test_nothing_to_average_is_nan_and_nothing_to_add_is_zero() -> None:
    logits, target = np.zeros((2, 3)), np.full(2, -100)
    assert np.isnan(synkern.numpy.cross_entropy(logits, target))
    assert synkern.numpy.cross_entropy(logits, target, reduction="sum") == 0
    assert synkern.numpy.cross_entropy(np.zeros((0, 3)), np.zeros(0, int), reduction="none").shape == (0,)


@ALL_CASES
def test_an_impossible_class_beside_the_target_takes_no_part(case: Case) -> None:
    if case.effective_options.get("label_smoothing"):
        pytest.skip("label smoothing makes the value infinite, as in torch")
    inputs = make_inputs(case, 3, 6)
    inputs.target[:] = torch.tensor([0, 2, 5])
    smaller = Inputs(
        inputs.logits[:, [0, 2, 3, 4, 5]].clone(), torch.tensor([0, 1, 4]), inputs.sample_weight,
        inputs.class_weight, inputs.operands,
    )
    inputs.logits[:, 1] = -INF
    actual = actual_arrays(case, inputs, weighted=False, reduction="none")
    expected = actual_arrays(case, smaller, weighted=False, reduction="none")
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12)
    for got, want in zip(actual[1:], expected[1:], strict=True):
        assert (got[:, 1] == 0).all()
        np.testing.assert_allclose(np.delete(got, 1, axis=1), want, rtol=1e-12, atol=1e-15)


def test_nan_stays_in_its_row() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4))
    logits[1, 2] = np.nan
    for array in synkern.numpy.focal_loss(logits, [0, 1, 2], reduction="none", derivatives=True):
        assert np.isnan(array[1]).all()
        assert np.isfinite(array[[0, 2]]).all()


def test_any_layout_and_integer_type_gives_the_same_and_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    logits, target, quality = rng.normal(size=(6, 4)), rng.integers(0, 4, 6), rng.random(6)
    expected = synkern.numpy.dimp_loss(logits, target, quality, reduction="none", derivatives=True)
    padded = np.full((12, 8), np.nan)
    padded[::2, ::2] = logits
    layouts = [np.asfortranarray(logits), padded[::2, ::2], logits[::-1].copy()[::-1]]
    for given in layouts:
        before = given.copy()
        for integer in (np.int64, np.int32, np.int16, np.int8, np.uint8):
            actual = synkern.numpy.dimp_loss(
                given, target.astype(integer), list(quality), reduction="none", derivatives=True
            )
            assert all(np.array_equal(got, want) for got, want in zip(actual, expected, strict=True))
        assert np.array_equal(given, before)


def test_threads_give_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    problems = [(rng.normal(size=(200, 50)).astype("float32"), rng.integers(0, 50, 200)) for _ in range(16)]

    def run(problem: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
        return synkern.numpy.gce_loss(*problem, reduction="none", derivatives=True)

    alone = [run(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, problems))
    for a, b in zip(alone, together, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


LOGITS, TARGET = np.zeros((6, 3)), np.zeros(6, int)
WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "cross_entropy: logits must be float32 or float64, got float16; use",
     lambda: synkern.numpy.cross_entropy(LOGITS.astype("float16"), TARGET)),
    (TypeError, "rce_loss: logits must be float32 or float64, got int64",
     lambda: synkern.numpy.rce_loss(LOGITS.astype("int64"), TARGET)),
    (TypeError, "mae_loss: target must hold class indices, got float64; use",
     lambda: synkern.numpy.mae_loss(LOGITS, TARGET.astype(float))),
    (ValueError, r"gce_loss: expected logits \(N, C\) and target \(N,\), got \(6, 3\) and \(5,\); reshape",
     lambda: synkern.numpy.gce_loss(LOGITS, TARGET[:5])),
    (ValueError, r"sce_loss: expected logits \(N, C\) and target \(N,\), got \(6, 3\) and \(6, 1\)",
     lambda: synkern.numpy.sce_loss(LOGITS, TARGET[:, None])),
    (ValueError, r"focal_loss: expected logits \(N, C\) and target \(N,\), got \(2, 3, 3\) and \(2, 3\)",
     lambda: synkern.numpy.focal_loss(LOGITS.reshape(2, 3, 3), TARGET.reshape(2, 3))),
    (ValueError, r"dimp_loss: .* must have shape \(6,\), got \(5,\)",
     lambda: synkern.numpy.dimp_loss(LOGITS, TARGET, np.ones(5))),
    (ValueError, r"imp_loss: .* must have shape \(6,\), got \(5,\)",
     lambda: synkern.numpy.imp_loss(LOGITS, TARGET, np.ones(5), np.ones(5))),
    (ValueError, r"cross_entropy: sample_weight must have shape \(6,\), got \(6, 1\)",
     lambda: synkern.numpy.cross_entropy(LOGITS, TARGET, sample_weight=np.ones((6, 1)))),
    (ValueError, r"cross_entropy: class_weight must have shape \(3,\), got \(2,\)",
     lambda: synkern.numpy.cross_entropy(LOGITS, TARGET, class_weight=np.ones(2))),
    (ValueError, "cross_entropy: reduction must be one of mean, weighted_mean, sum, none, got 'avg'",
     lambda: synkern.numpy.cross_entropy(LOGITS, TARGET, reduction="avg")),
    (ValueError, r"target\[2\] is 3, expected a class in \[0, 3\) or ignore_index \(-100\)",
     lambda: synkern.numpy.cross_entropy(LOGITS, np.array([0, 1, 3, 0, 0, 0]))),
    (ValueError, r"target\[0\] is -100, expected a class in \[0, 3\) or ignore_index \(-1\)",
     lambda: synkern.numpy.cross_entropy(LOGITS, np.full(6, -100), ignore_index=-1)),
    (TypeError, "gamma", lambda: synkern.numpy.cross_entropy(LOGITS, TARGET, gamma=2.0)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), WRONG, ids=[message[:40] for _, message, _ in WRONG])
def test_wrong_arguments_are_explained(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_works_where_torch_cannot_be_imported() -> None:
    program = """
import sys
sys.modules["torch"] = None
from synkern.numpy import dimp_loss
loss, gradient, hessian = dimp_loss([[0.0, 0.0]], [0], [1.0], derivatives=True)
assert abs(loss - 2 * 0.6931471805599453) < 1e-12, loss
assert gradient.tolist() == [[-1.0, 1.0]] and hessian.tolist() == [[0.5, 0.5]], (gradient, hessian)
assert not [name for name in sys.modules if name.startswith("torch.")]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- Gradient boosting -----------------------------------------------------------------------------------------------

CLASSES = 3
BOOSTER = {
    "num_class": CLASSES,
    "num_threads": 1,
    "num_leaves": 7,
    "learning_rate": 0.2,
    "min_data_in_leaf": 5,
    "boost_from_average": False,
    "deterministic": True,
    "force_row_wise": True,
    "seed": 0,
    "verbosity": -1,
}
Objective = Callable[[np.ndarray, Any], tuple[np.ndarray, np.ndarray]]


def blobs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping Gaussians in the plane, and three columns of noise."""
    label = rng.integers(0, CLASSES, n)
    angle = 2 * np.pi * label / CLASSES
    features = rng.normal(size=(n, 5))
    features[:, :2] += 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return features, label


def with_label_noise(rng: np.random.Generator, label: np.ndarray, rate: float) -> np.ndarray:
    """A share of the labels moves to one of the other classes."""
    moved = rng.random(len(label)) < rate
    return np.where(moved, (label + rng.integers(1, CLASSES, len(label))) % CLASSES, label)


def quality_of(features: np.ndarray, label: np.ndarray, clean: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """P'(label | features) of a checker fitted on few clean rows: unit Gaussians around the class means."""
    means = np.stack([clean[0][clean[1] == k].mean(axis=0) for k in range(CLASSES)])
    score = -0.5 * ((features[:, None] - means) ** 2).sum(axis=-1)
    p = np.exp(score - score.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True))[np.arange(len(label)), label]


def fit(features: np.ndarray, label: np.ndarray, objective: Objective | str, rounds: int = 40) -> Any:
    lightgbm = pytest.importorskip("lightgbm")
    data = lightgbm.Dataset(features, label, free_raw_data=False)
    return lightgbm.train({**BOOSTER, "objective": objective}, data, num_boost_round=rounds)


def accuracy(booster: Any, features: np.ndarray, label: np.ndarray) -> float:
    return float((booster.predict(features, raw_score=True).argmax(axis=1) == label).mean())


def cross_entropy_objective(scores: np.ndarray, data: Any) -> tuple[np.ndarray, np.ndarray]:
    target = data.get_label().astype(int)
    return synkern.numpy.cross_entropy(scores, target, reduction="none", derivatives=True)[1:]


def test_lightgbm_with_our_cross_entropy_grows_its_own_trees() -> None:
    rng = np.random.default_rng(0)
    features, label = blobs(rng, 300)

    def lightgbm_scaled(scores: np.ndarray, data: Any) -> tuple[np.ndarray, np.ndarray]:
        gradient, hessian = cross_entropy_objective(scores, data)
        return gradient, hessian * CLASSES / (CLASSES - 1)  # LightGBM's own objective scales the Hessian so

    ours = fit(features, label, lightgbm_scaled, rounds=5).predict(features, raw_score=True)
    theirs = fit(features, label, "multiclass", rounds=5).predict(features, raw_score=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(theirs).max() > 0.5


def test_lightgbm_learns_from_noisy_labels_with_dimp() -> None:
    rng = np.random.default_rng(0)
    features, true_label = blobs(rng, 600)
    label = with_label_noise(rng, true_label, 0.4)
    quality = quality_of(features, label, blobs(rng, 60))
    unseen = blobs(rng, 2000)

    def dimp_objective(scores: np.ndarray, data: Any) -> tuple[np.ndarray, np.ndarray]:
        target = data.get_label().astype(int)
        return synkern.numpy.dimp_loss(
            scores, target, quality, max_weight=3.0, reduction="none", derivatives=True
        )[1:]

    with_dimp = accuracy(fit(features, label, dimp_objective), *unseen)
    plain = accuracy(fit(features, label, cross_entropy_objective), *unseen)
    assert with_dimp > 1 / CLASSES + 0.3
    assert with_dimp > plain
