"""Every row loss in plain eager PyTorch, written as a user would write it.

One function a loss. Each maps ``logits`` (N, C) and ``target`` (N,) to the unweighted loss of each row, (N,), in the
dtype of the logits. Sample weights, ignored rows and reductions are left out: they are the same for every loss and
belong to the caller. In float64 these functions are what the kernels are tested against; in other dtypes they are
what the benchmarks call eager PyTorch. They run on every device and under every transform that PyTorch itself
supports.

Throughout, ``t = log softmax(logits)[target]`` is the log-probability of the target and ``p = exp(t)``. Every
function takes ``class_weight`` (C,): the loss of a row is multiplied by ``class_weight[target]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "cross_entropy_loss",
    "dimp_loss",
    "dimp_weight",
    "focal_loss",
    "gce_loss",
    "imp_loss",
    "imp_weight",
    "log_prob_of_target",
    "mae_loss",
    "rce_loss",
    "sce_loss",
]

LOG_ZERO = math.log(1e-4)


def log_prob_of_target(logits: Tensor, target: Tensor) -> Tensor:
    """t_i = log softmax(logits_i)[target_i].

    Args:
        logits: (N, C), floating point.
        target: (N,), integer, every entry in [0, C).

    Returns:
        (N,) in the dtype of the logits.
    """
    return torch.log_softmax(logits, dim=-1).gather(-1, target.long().unsqueeze(-1)).squeeze(-1)


def _class_weighted(loss: Tensor, target: Tensor, class_weight: Tensor | None) -> Tensor:
    return loss if class_weight is None else loss * class_weight.to(loss.dtype)[target.long()]


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """L = -(1 - e) c_y t - (e / C) sum_k c_k log p_k + z lse^2.

    Args:
        logits: (N, C).
        target: (N,), integer.
        class_weight: (C,), c; ones where absent. It does not weigh the z-loss.
        label_smoothing: e in [0, 1].
        z_loss: z, the factor of the squared log-normaliser.

    Returns:
        (N,) in the dtype of the logits.

    Source:
        Equations 1 and 2 of Kuo et al., "Not All LLM-Generated Data Are Equal" (ICLR 2025); label smoothing as in
        ``torch.nn.functional.cross_entropy`` (Szegedy et al. 2016); z-loss as in Chowdhery et al., "PaLM" (2022).
    """
    log_p = torch.log_softmax(logits, dim=-1)
    loss = _class_weighted(-log_p.gather(-1, target.long().unsqueeze(-1)).squeeze(-1), target, class_weight)
    if label_smoothing:
        weighted = log_p if class_weight is None else log_p * class_weight.to(log_p.dtype)
        loss = (1 - label_smoothing) * loss - label_smoothing / logits.shape[-1] * weighted.sum(dim=-1)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, dim=-1).square()
    return loss


def rce_loss(
    logits: Tensor, target: Tensor, *, class_weight: Tensor | None = None, log_zero: float = LOG_ZERO
) -> Tensor:
    """Reverse cross entropy, L = -A (1 - p), A = ``log_zero`` standing for log 0.

    Args:
        logits: (N, C).
        target: (N,), integer.
        class_weight: (C,).
        log_zero: A, a negative number; log 1e-4 by default.

    Returns:
        (N,) in the dtype of the logits.

    Source:
        Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels" (ICCV 2019).
    """
    loss = -log_zero * (1 - torch.exp(log_prob_of_target(logits, target)))
    return _class_weighted(loss, target, class_weight)


def mae_loss(logits: Tensor, target: Tensor, *, class_weight: Tensor | None = None) -> Tensor:
    """Mean absolute error between softmax and one-hot target, L = 2 (1 - p).

    Args:
        logits: (N, C).
        target: (N,), integer.
        class_weight: (C,).

    Returns:
        (N,) in the dtype of the logits.

    Source:
        Ghosh et al., "Robust Loss Functions under Label Noise for Deep Neural Networks" (AAAI 2017).
    """
    return _class_weighted(2 * (1 - torch.exp(log_prob_of_target(logits, target))), target, class_weight)


def gce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    q: float = 0.7,
    truncation: float | None = None,
) -> Tensor:
    """Generalised cross entropy, L = (1 - p^q) / q, and the constant (1 - k^q) / q where p <= k.

    Args:
        logits: (N, C).
        target: (N,), integer.
        class_weight: (C,).
        q: exponent in (0, 1]; the limit 0 is cross entropy, 1 is half the mean absolute error.
        truncation: k in (0, 1); no truncation where absent.

    Returns:
        (N,) in the dtype of the logits.

    Source:
        Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels"
        (NeurIPS 2018), equations 6 and 7.
    """
    t = log_prob_of_target(logits, target)
    loss = (1 - torch.exp(q * t)) / q
    if truncation is not None:
        ceiling = (1 - truncation**q) / q
        loss = torch.where(t <= math.log(truncation), torch.full_like(loss, ceiling), loss)
    return _class_weighted(loss, target, class_weight)


def sce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = LOG_ZERO,
) -> Tensor:
    """Symmetric cross entropy, L = -alpha t - beta A (1 - p).

    Args:
        logits: (N, C).
        target: (N,), integer.
        class_weight: (C,).
        alpha: factor of the cross entropy.
        beta: factor of the reverse cross entropy.
        log_zero: A, a negative number; log 1e-4 by default.

    Returns:
        (N,) in the dtype of the logits.

    Source:
        Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels" (ICCV 2019), equation 8.
    """
    t = log_prob_of_target(logits, target)
    return _class_weighted(-alpha * t - beta * log_zero * (1 - torch.exp(t)), target, class_weight)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    gamma: float = 2.0,
    detach_modulation: bool = False,
) -> Tensor:
    """L = -(1 - p)^gamma t.

    Args:
        logits: (N, C).
        target: (N,), integer.
        class_weight: (C,).
        gamma: exponent, >= 0.
        detach_modulation: hold (1 - p)^gamma constant, so that the gradient is that of weighted cross entropy.

    Returns:
        (N,) in the dtype of the logits.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection" (ICCV 2017), equation 4.
    """
    t = log_prob_of_target(logits, target)
    # 1 - p by expm1: a power below one multiplies the error that 1 - exp(t) makes at confident rows.
    modulation = (-torch.expm1(t)).pow(gamma)
    if detach_modulation:
        modulation = modulation.detach()
    return _class_weighted(-modulation * t, target, class_weight)


def imp_weight(
    quality: Tensor | None,
    diversity: Tensor | None,
    *,
    log_quality: Tensor | None = None,
    log_diversity: Tensor | None = None,
    max_weight: float | None = None,
) -> Tensor:
    """w = P'(y|x) / Q(y|x), at most ``max_weight``; each of the two as a probability or as its log. All shapes (N,)."""
    if log_quality is not None and log_diversity is not None:
        weight = torch.exp(log_quality - log_diversity)
    else:
        numerator = quality if log_quality is None else torch.exp(log_quality)
        denominator = diversity if log_diversity is None else torch.exp(log_diversity)
        if numerator is None or denominator is None:
            raise ValueError("imp_weight: give quality or log_quality, and diversity or log_diversity")
        weight = numerator / denominator
    return weight if max_weight is None else weight.clamp(max=max_weight)


def dimp_weight(
    log_p_target: Tensor,
    quality: Tensor | None,
    *,
    log_quality: Tensor | None = None,
    max_weight: float | None = None,
) -> Tensor:
    """w = P'(y|x) / p, at most ``max_weight``, from t = log p and P' as probability or as log. All shapes (N,)."""
    if log_quality is not None:
        weight = torch.exp(log_quality - log_p_target)
    elif quality is not None:
        weight = quality * torch.exp(-log_p_target)
    else:
        raise ValueError("dimp_weight: give quality or log_quality")
    return weight if max_weight is None else weight.clamp(max=max_weight)


def imp_loss(
    logits: Tensor,
    target: Tensor,
    quality: Tensor | None = None,
    diversity: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    log_quality: Tensor | None = None,
    log_diversity: Tensor | None = None,
    max_weight: float | None = None,
) -> Tensor:
    """Importance loss, L = -(P' / Q) t: P' from the quality checker, Q from the diversity checker.

    Args:
        logits: (N, C).
        target: (N,), integer.
        quality: (N,), P'(y|x); or ``log_quality``, its log.
        diversity: (N,), Q(y|x); or ``log_diversity``, its log.
        class_weight: (C,).
        max_weight: largest allowed ratio; its gradient is zero above.

    Returns:
        (N,) in the dtype of the logits.

    Source:
        Kuo et al., "Not All LLM-Generated Data Are Equal: Rethinking Data Weighting in Text Classification"
        (ICLR 2025), equation 6.
    """
    weight = imp_weight(
        quality, diversity, log_quality=log_quality, log_diversity=log_diversity, max_weight=max_weight
    )
    loss = -weight.to(logits.dtype) * log_prob_of_target(logits, target)
    return _class_weighted(loss, target, class_weight)


def dimp_loss(
    logits: Tensor,
    target: Tensor,
    quality: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    log_quality: Tensor | None = None,
    detach_weight: bool = True,
    max_weight: float | None = None,
) -> Tensor:
    """Dynamic importance loss, L = -(P' / p) t: the diversity checker is the model itself.

    Args:
        logits: (N, C).
        target: (N,), integer.
        quality: (N,), P'(y|x); or ``log_quality``, its log.
        class_weight: (C,).
        detach_weight: hold p in the ratio constant, as the paper does; otherwise differentiate it too.
        max_weight: largest allowed ratio; its gradient is zero above.

    Returns:
        (N,) in the dtype of the logits.

    Source:
        Kuo et al., "Not All LLM-Generated Data Are Equal: Rethinking Data Weighting in Text Classification"
        (ICLR 2025), equation 9.
    """
    t = log_prob_of_target(logits, target)
    weight = dimp_weight(
        t.detach() if detach_weight else t, quality, log_quality=log_quality, max_weight=max_weight
    )
    return _class_weighted(-weight.to(logits.dtype) * t, target, class_weight)
