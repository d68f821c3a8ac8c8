"""The public losses. All are L_i = w_i f(t_i) with t = log softmax(logits)[target] and p = e^t."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks, backends
from ._autograd import WIRINGS
from ._kinds import LOG_ZERO, check_range
from ._schema import RATIO_ROW, REDUCTIONS, LossKind, accumulate_dtype

Number = float | int

_NATIVE = WIRINGS["synkern"]

_COMMON_ARGUMENTS = """
    Args:
        logits: (*, C), float32, float64, bfloat16 or float16. Rows with unit inner stride are read where they lie.
        target: (*), class indices as int64, int32, int16 or uint8.
"""
_COMMON_OPTIONS = """
        sample_weight: (*) or (N,), w_i, any sign. A row of weight zero adds exactly zero to value and gradient, even
            when its logits are infinite. Differentiable.
        class_weight: (C,), c_k; multiplies a row's loss by ``class_weight[target]``. Differentiable.
        ignore_index: rows with this target are left out.
        reduction: "mean" divides by the number of kept rows, or by the sum of their class weights where these are
            given; "weighted_mean" by the sum of kept sample weights; "sum"; "none" returns (*).
        normalizer: number or 0-d tensor that replaces the denominator of the mean: gradient accumulation, and shards
            of one batch.
        backend: "cpu", "cuda" or "triton"; None takes what fits the tensors.
"""
_COMMON_RETURNS = """
    Returns:
        The loss, 0-d, or (*) with reduction="none": float64 for float64 logits and float32 otherwise, since a mean
        rounded to 16 bits keeps three digits. Differentiable twice, in reverse and forward mode.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option that does not fit.
        RuntimeError: a target outside [0, C) that is not ``ignore_index``; names the row and the value.
"""
_RETURN_WEIGHTS = """
        return_weights: also return the ratio (*), detached.
"""


def _documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fills the parts that every loss's docstring shares."""
    doc = function.__doc__ or ""
    for mark, text in (
        ("<arguments>", _COMMON_ARGUMENTS),
        ("<options>", _COMMON_OPTIONS),
        ("<returns>", _COMMON_RETURNS),
        ("<return_weights>", _RETURN_WEIGHTS),
    ):
        doc = doc.replace(f"    {mark}\n", text.strip("\n") + "\n")
    function.__doc__ = doc
    return function


def _row_vector(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dim() != 1:
        x = x.reshape(-1)
    return x if x.dtype == dtype else x.to(dtype)


def _call(
    name: str,
    kind: int,
    logits: Tensor,
    target: Tensor,
    p0: float = 0.0,
    p1: float = 0.0,
    p2: float = 0.0,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ratio: Tensor | None = None,
    ratio_name: str = "ratio",
    return_weights: bool = False,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Checks, flattens to (N, C), calls the operator, and divides where the operator does not."""
    _checks.check_inputs(name, logits, target)
    if normalizer is not None or reduction not in REDUCTIONS:
        _checks.check_reduction(name, reduction, normalizer)
    wiring = _NATIVE
    if backend is not None or not logits.is_cpu:
        wiring = WIRINGS[backends.choose(name, backend, logits.device)]
    shape, dtype = target.shape, accumulate_dtype(logits.dtype)
    if sample_weight is not None:
        _checks.check_operand(name, "sample_weight", sample_weight, logits, target)
        sample_weight = _row_vector(sample_weight, dtype)
    if ratio is not None:
        _checks.check_operand(name, ratio_name, ratio, logits, target)
        ratio = _row_vector(ratio, dtype)
    if class_weight is not None:
        _checks.check_class_weight(name, class_weight, logits)
        class_weight = class_weight.to(dtype)
    if len(shape) != 1:
        logits, target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    divided = normalizer is not None or reduction == "weighted_mean"
    arguments = (
        logits, target, sample_weight, ratio, class_weight, kind, p0, p1, p2, label_smoothing, z_loss, ignore_index,
        REDUCTIONS["sum" if divided else reduction],
    )
    if return_weights:
        loss, statistics = wiring.operator(*arguments)
        weights = statistics[RATIO_ROW].detach().reshape(shape)
    else:
        loss, weights = wiring.row_loss(*arguments), None
    if divided:
        if normalizer is None:
            kept = target != ignore_index
            normalizer = kept.sum() if sample_weight is None else sample_weight.masked_fill(~kept, 0).sum()
        loss = loss / normalizer
    elif reduction == "none" and loss.shape != shape:
        loss = loss.reshape(shape)
    return (loss, weights) if return_weights else loss


@_documented
def fused_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Weighted cross entropy.

    .. math:: L_i = w_i \left[ (1 - \epsilon)\, c_{y_i} (-t_i)
        + \frac{\epsilon}{C} \sum_k c_k (-\log p_{ik}) + \zeta\, \mathrm{lse}_i^2 \right]

    With ``class_weight`` and no ``sample_weight`` this is ``torch.nn.functional.cross_entropy``, argument for argument.

    <arguments>
        label_smoothing: epsilon in [0, 1].
        z_loss: zeta >= 0, the factor of the squared log-sum-exp; not multiplied by ``class_weight``.
    <options>

    <returns>

    Source: Kuo et al. 2024, "Not all LLM-generated data are equal", Eq. 1 and 2; z-loss: Chowdhery et al. 2022,
    section 5.
    """
    check_range("fused_cross_entropy", "label_smoothing", label_smoothing, 0.0, 1.0)
    check_range("fused_cross_entropy", "z_loss", z_loss, 0.0)
    return _call(
        "fused_cross_entropy", LossKind.CROSS_ENTROPY, logits, target, label_smoothing=label_smoothing, z_loss=z_loss,
        sample_weight=sample_weight, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        normalizer=normalizer, backend=backend,
    )


@_documented
def fused_rce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    log_zero: float = LOG_ZERO,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Reverse cross entropy, robust to label noise.

    .. math:: L_i = -A\, w_i\, (1 - p_i)

    <arguments>
        log_zero: A < 0, the value taken for log 0; log 1e-4 by default.
    <options>

    <returns>

    Source: Gao et al. 2023, "Self-guided noise-free data generation" (SunGen), section 3; Wang et al. 2019.
    """
    check_range("fused_rce_loss", "-log_zero", -log_zero, 0.0)
    return _call(
        "fused_rce_loss", LossKind.RCE, logits, target, log_zero,
        sample_weight=sample_weight, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        normalizer=normalizer, backend=backend,
    )


@_documented
def fused_mae_loss(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Mean absolute error between softmax and one-hot target.

    .. math:: L_i = w_i \sum_k |p_{ik} - [k = y_i]| = 2\, w_i\, (1 - p_i)

    <arguments>
    <options>

    <returns>

    Source: Gao et al. 2023 (SunGen), Appendix C; Ghosh et al. 2017.
    """
    return _call(
        "fused_mae_loss", LossKind.RCE, logits, target, -2.0,
        sample_weight=sample_weight, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        normalizer=normalizer, backend=backend,
    )


@_documented
def fused_gce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    q: float = 0.7,
    truncation: float | None = None,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Generalized cross entropy: between cross entropy (q -> 0) and MAE / 2 (q = 1).

    .. math:: L_i = w_i\, (1 - p_i^q) / q

    <arguments>
        q: in [0, 1]; 0 is the limit, cross entropy.
        truncation: k in (0, 1): where p <= k the loss is the constant (1 - k^q) / q, with gradient zero.
    <options>

    <returns>

    Source: Zhang & Sabuncu 2018, Eq. 6; truncated: Eq. 9.
    """
    check_range("fused_gce_loss", "q", q, 0.0, 1.0)
    if truncation is not None:
        check_range("fused_gce_loss", "truncation", truncation, 0.0, 1.0)
    return _call(
        "fused_gce_loss", LossKind.GCE, logits, target, q, truncation or 0.0,
        sample_weight=sample_weight, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        normalizer=normalizer, backend=backend,
    )


@_documented
def fused_sce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = LOG_ZERO,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Symmetric cross entropy.

    .. math:: L_i = w_i \left[ \alpha (-t_i) + \beta (-A) (1 - p_i) \right]

    <arguments>
        alpha: factor of cross entropy.
        beta: factor of reverse cross entropy.
        log_zero: A < 0, the value taken for log 0.
    <options>

    <returns>

    Source: Wang et al. 2019, "Symmetric cross entropy for robust learning with noisy labels", Eq. 7.
    """
    check_range("fused_sce_loss", "-log_zero", -log_zero, 0.0)
    return _call(
        "fused_sce_loss", LossKind.SCE, logits, target, alpha, beta, log_zero,
        sample_weight=sample_weight, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        normalizer=normalizer, backend=backend,
    )


@_documented
def fused_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    detach_modulation: bool = False,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Focal loss.

    .. math:: L_i = -w_i\, (1 - p_i)^\gamma\, t_i

    <arguments>
        gamma: at least 0; 0 is cross entropy.
        detach_modulation: hold (1 - p)^gamma constant in derivatives, as the code released with Kuo et al. 2024 does;
            the published loss differentiates it.
    <options>

    <returns>

    Source: Kuo et al. 2024, section 2.2; Lin et al. 2017, Eq. 4.
    """
    check_range("fused_focal_loss", "gamma", gamma, 0.0)
    return _call(
        "fused_focal_loss", LossKind.FOCAL, logits, target, gamma, float(detach_modulation),
        sample_weight=sample_weight, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        normalizer=normalizer, backend=backend,
    )


def _cap(name: str, max_weight: float | None) -> float:
    if max_weight is None:
        return math.inf
    check_range(name, "max_weight", max_weight, 0.0)
    return float(max_weight)


def _importance_ratio(
    logits: Tensor, target: Tensor, quality: Tensor | None, diversity: Tensor | None, log_quality: Tensor | None,
    log_diversity: Tensor | None,
) -> tuple[Tensor, bool]:
    """quality / diversity, or its logarithm where either comes as one."""
    name = "fused_imp_loss"
    _checks.check_inputs(name, logits, target)
    top, top_is_log = _checks.pick_one(name, "quality", quality, log_quality)
    bottom, bottom_is_log = _checks.pick_one(name, "diversity", diversity, log_diversity)
    _checks.check_operand(name, "log_quality" if top_is_log else "quality", top, logits, target)
    _checks.check_operand(name, "log_diversity" if bottom_is_log else "diversity", bottom, logits, target)
    dtype = accumulate_dtype(logits.dtype)
    top, bottom = _row_vector(top, dtype), _row_vector(bottom, dtype)
    if not (top_is_log or bottom_is_log):
        return top / bottom, False
    return (top if top_is_log else top.log()) - (bottom if bottom_is_log else bottom.log()), True


@_documented
def fused_imp_loss(
    logits: Tensor,
    target: Tensor,
    quality: Tensor | None = None,
    diversity: Tensor | None = None,
    *,
    log_quality: Tensor | None = None,
    log_diversity: Tensor | None = None,
    max_weight: float | None = None,
    return_weights: bool = False,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Importance loss: cross entropy weighted by how much likelier real data make the label than synthetic data do.

    .. math:: L_i = -w_i \min\left(\frac{P'(y_i | x_i)}{Q(y_i | x_i)},\ \mathrm{max\_weight}\right) t_i

    <arguments>
        quality: (*) or (N,), P'(y | x) of the quality checker, fitted on the small real set. Differentiable.
        diversity: (*) or (N,), Q(y | x) of the diversity checker, fitted on the synthetic set. Differentiable.
        log_quality, log_diversity: their logarithms, instead.
        max_weight: cap of the ratio.
    <return_weights>
    <options>

    <returns>

    Source: Kuo et al. 2024, Eq. 6 and Algorithm 1.
    """
    ratio, is_log = _importance_ratio(logits, target, quality, diversity, log_quality, log_diversity)
    cap = _cap("fused_imp_loss", max_weight)
    return _call(
        "fused_imp_loss", LossKind.IMP, logits, target, cap, float(is_log), ratio=ratio, return_weights=return_weights,
        sample_weight=sample_weight, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        normalizer=normalizer, backend=backend,
    )


@_documented
def fused_dimp_loss(
    logits: Tensor,
    target: Tensor,
    quality: Tensor | None = None,
    *,
    log_quality: Tensor | None = None,
    detach_weight: bool = True,
    max_weight: float | None = None,
    return_weights: bool = False,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Number | Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Dynamic importance loss: the model in training is its own diversity checker.

    .. math:: L_i = -w_i \min\left(\frac{P'(y_i | x_i)}{p_i},\ \mathrm{max\_weight}\right) t_i

    with p in the ratio held constant. Quality and 1 / p meet in one exponential, so the loss is finite wherever its
    value fits the dtype, also where 1 / p alone would overflow.

    <arguments>
        quality: (*) or (N,), P'(y | x) of the quality checker, fitted on the small real set. Differentiable.
        log_quality: its logarithm, instead.
        detach_weight: False differentiates the ratio's p too.
        max_weight: cap of the ratio.
    <return_weights>
    <options>

    <returns>

    Source: Kuo et al. 2024, Eq. 9 and Algorithm 2.
    """
    ratio, is_log = _checks.pick_one("fused_dimp_loss", "quality", quality, log_quality)
    cap = _cap("fused_dimp_loss", max_weight)
    return _call(
        "fused_dimp_loss", LossKind.DIMP, logits, target, cap, float(is_log), float(detach_weight), ratio=ratio,
        ratio_name="log_quality" if is_log else "quality", return_weights=return_weights,
        sample_weight=sample_weight, class_weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        normalizer=normalizer, backend=backend,
    )
