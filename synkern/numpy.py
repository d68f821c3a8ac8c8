"""The losses on numpy arrays: value, gradient and diagonal Hessian, without torch.

Gradient boosting takes a custom objective as the gradient and the diagonal of the Hessian with respect to the logits;
``derivatives=True`` returns both. Importing this module does not import torch:

    from synkern.numpy import dimp_loss
    loss, gradient, hessian = dimp_loss(logits, target, quality, reduction="none", derivatives=True)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _native
from ._kinds import LOG_ZERO, LossKind, check_range

Array = NDArray[Any]
_REDUCTIONS = ("mean", "weighted_mean", "sum", "none")


def _floats(name: str, what: str, x: ArrayLike, shape: tuple[int, ...], dtype: Any) -> Array:
    array = np.ascontiguousarray(x, dtype=dtype)
    if array.shape != shape:
        raise ValueError(f"{name}: {what} must have shape {shape}, got {array.shape}; pass one number a row or class")
    return array


def _inputs(name: str, logits: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    z, y = np.asarray(logits), np.asarray(target)
    if z.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: logits must be float32 or float64, got {z.dtype}; use logits.astype('float32')")
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"{name}: target must hold class indices, got {y.dtype}; use target.astype('int64')")
    if z.ndim != 2 or y.shape != z.shape[:1]:
        raise ValueError(
            f"{name}: expected logits (N, C) and target (N,), got {z.shape} and {y.shape}; "
            "reshape logits to (-1, C) and target to (-1,)"
        )
    return np.ascontiguousarray(z), np.ascontiguousarray(y, dtype=np.int64)


def _call(
    name: str,
    kind: int,
    parameters: tuple[float, float, float],
    logits: ArrayLike,
    target: ArrayLike,
    *,
    ratio: ArrayLike | None = None,
    ratio_name: str = "quality",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    sample_weight: ArrayLike | None = None,
    class_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    derivatives: bool = False,
) -> Any:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    z, y = _inputs(name, logits, target)
    rows, classes = z.shape
    weight, row_ratio, weight_of_class = (
        None if x is None else _floats(name, what, x, shape, z.dtype)
        for what, x, shape in (
            ("sample_weight", sample_weight, (rows,)),
            (ratio_name, ratio, (rows,)),
            ("class_weight", class_weight, (classes,)),
        )
    )
    losses, gradient, hessian, kept_weight = _native.row_loss(
        z, y, weight, row_ratio, weight_of_class, kind, *parameters, label_smoothing, z_loss, ignore_index, derivatives
    )
    if reduction == "none":
        return (losses, gradient, hessian) if derivatives else losses
    denominator = 1.0
    if reduction == "mean":
        denominator = kept_weight
    elif reduction == "weighted_mean":
        kept = y != ignore_index
        denominator = float(kept.sum() if weight is None else weight[kept].sum(dtype=np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):  # a mean over no rows is NaN, as in torch
        value = z.dtype.type(losses.sum(dtype=np.float64) / np.float64(denominator))
        if not derivatives:
            return value
        return value, gradient / z.dtype.type(denominator), hessian / z.dtype.type(denominator)


def cross_entropy(
    logits: ArrayLike, target: ArrayLike, *, label_smoothing: float = 0.0, z_loss: float = 0.0, **common: Any
) -> Any:
    """``synkern.fused_cross_entropy`` on numpy arrays; see ``dimp_loss`` for the common arguments."""
    check_range("cross_entropy", "label_smoothing", label_smoothing, 0.0, 1.0)
    check_range("cross_entropy", "z_loss", z_loss, 0.0)
    return _call(
        "cross_entropy", LossKind.CROSS_ENTROPY, (0.0, 0.0, 0.0), logits, target, label_smoothing=label_smoothing,
        z_loss=z_loss, **common,
    )


def rce_loss(logits: ArrayLike, target: ArrayLike, *, log_zero: float = LOG_ZERO, **common: Any) -> Any:
    """``synkern.fused_rce_loss`` on numpy arrays; see ``dimp_loss`` for the common arguments."""
    check_range("rce_loss", "-log_zero", -log_zero, 0.0)
    return _call("rce_loss", LossKind.RCE, (log_zero, 0.0, 0.0), logits, target, **common)


def mae_loss(logits: ArrayLike, target: ArrayLike, **common: Any) -> Any:
    """``synkern.fused_mae_loss`` on numpy arrays; see ``dimp_loss`` for the common arguments."""
    return _call("mae_loss", LossKind.RCE, (-2.0, 0.0, 0.0), logits, target, **common)


def gce_loss(
    logits: ArrayLike, target: ArrayLike, *, q: float = 0.7, truncation: float | None = None, **common: Any
) -> Any:
    """``synkern.fused_gce_loss`` on numpy arrays; see ``dimp_loss`` for the common arguments."""
    check_range("gce_loss", "q", q, 0.0, 1.0)
    check_range("gce_loss", "truncation", truncation or 0.0, 0.0, 1.0)
    return _call("gce_loss", LossKind.GCE, (q, truncation or 0.0, 0.0), logits, target, **common)


def sce_loss(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = LOG_ZERO,
    **common: Any,
) -> Any:
    """``synkern.fused_sce_loss`` on numpy arrays; see ``dimp_loss`` for the common arguments."""
    check_range("sce_loss", "-log_zero", -log_zero, 0.0)
    return _call("sce_loss", LossKind.SCE, (alpha, beta, log_zero), logits, target, **common)


def focal_loss(
    logits: ArrayLike, target: ArrayLike, *, gamma: float = 2.0, detach_modulation: bool = False, **common: Any
) -> Any:
    """``synkern.fused_focal_loss`` on numpy arrays; see ``dimp_loss`` for the common arguments."""
    check_range("focal_loss", "gamma", gamma, 0.0)
    return _call("focal_loss", LossKind.FOCAL, (gamma, float(detach_modulation), 0.0), logits, target, **common)


def imp_loss(
    logits: ArrayLike,
    target: ArrayLike,
    quality: ArrayLike,
    diversity: ArrayLike,
    *,
    max_weight: float = math.inf,
    **common: Any,
) -> Any:
    """``synkern.fused_imp_loss`` on numpy arrays; see ``dimp_loss`` for the common arguments."""
    check_range("imp_loss", "max_weight", max_weight, 0.0)
    shape = np.shape(target)
    top, bottom = (
        _floats("imp_loss", what, x, shape, np.float64) for what, x in (("quality", quality), ("diversity", diversity))
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # a diversity of zero gives the weight inf, as in torch
        ratio = np.divide(top, bottom)
    return _call("imp_loss", LossKind.IMP, (max_weight, 0.0, 0.0), logits, target, ratio=ratio, **common)


def dimp_loss(
    logits: ArrayLike,
    target: ArrayLike,
    quality: ArrayLike,
    *,
    detach_weight: bool = True,
    max_weight: float = math.inf,
    **common: Any,
) -> Any:
    """``synkern.fused_dimp_loss`` on numpy arrays: L_i = -w_i min(P'/p, max_weight) t_i, the ratio held constant.

    Args:
        logits: (N, C), float32 or float64.
        target: (N,), integer class indices.
        quality: (N,), P'(y | x) of the quality checker.
        detach_weight: False differentiates the ratio's p too.
        max_weight: cap of the ratio.
        sample_weight: (N,). Common to all losses, as are the following.
        class_weight: (C,).
        ignore_index: rows with this target are left out; -100.
        reduction: "mean" (default), "weighted_mean", "sum" or "none".
        derivatives: also return the gradient and the diagonal Hessian with respect to the logits, both (N, C).

    Returns:
        The loss, a number or (N,), in the dtype of the logits; with ``derivatives`` a tuple (loss, gradient, hessian).

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit, or a target outside [0, C).

    Source: Kuo et al. 2024, Eq. 9.
    """
    check_range("dimp_loss", "max_weight", max_weight, 0.0)
    return _call(
        "dimp_loss", LossKind.DIMP, (max_weight, 0.0, float(detach_weight)), logits, target, ratio=quality, **common
    )
