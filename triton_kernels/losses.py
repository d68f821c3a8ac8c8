"""The scalar maths of every loss, as in ``csrc/losses/losses.h``: value, slope and curvature as functions of
t = log softmax(logits)[target], in float64. Adding a loss to Triton is a function and a branch of ``evaluate``.

The number of the loss is a constant of the compiled kernel, and so is whether its second and third parameter are set,
where these are flags. The parameters themselves are not: annealing one must not compile a kernel a step.
"""

import triton
import triton.language as tl

from synkern._kinds import LossKind

from .scalars import expm1

RCE = tl.constexpr(int(LossKind.RCE))
GCE = tl.constexpr(int(LossKind.GCE))
SCE = tl.constexpr(int(LossKind.SCE))
FOCAL = tl.constexpr(int(LossKind.FOCAL))
IMP = tl.constexpr(int(LossKind.IMP))
DIMP = tl.constexpr(int(LossKind.DIMP))


@triton.jit
def cross_entropy(t):
    one = tl.full(t.shape, 1.0, tl.float64)
    return -t, -one, 0.0 * one, one


@triton.jit
def reverse_cross_entropy(t, log_zero):
    """f = -A (1 - e^t)"""
    slope = log_zero * tl.exp(t)
    return log_zero * expm1(t), slope, slope, tl.full(t.shape, 1.0, tl.float64)


@triton.jit
def generalized_cross_entropy(t, q, truncation):
    """f = (1 - e^{qt}) / q, constant where p <= truncation; q = 0 is its limit, cross entropy."""
    lowest = tl.log(truncation)
    truncated = (truncation > 0.0) & (t <= lowest)
    at = tl.where(truncated, lowest, t)
    limit = q == 0.0
    divisor = tl.where(limit, 1.0, q)
    power = tl.where(truncated, 0.0, tl.exp(q * at))
    value = tl.where(limit, -at, -expm1(q * at) / divisor)
    slope = tl.where(limit & truncated, 0.0, tl.where(limit, -1.0, -power))
    return value, slope, tl.where(limit, 0.0, -q * power), tl.full(t.shape, 1.0, tl.float64)


@triton.jit
def symmetric_cross_entropy(t, alpha, beta, log_zero):
    value, slope, curvature, one = reverse_cross_entropy(t, log_zero)
    return beta * value - alpha * t, beta * slope - alpha, beta * curvature, one


@triton.jit
def focal(t, gamma, DETACH_MODULATION: tl.constexpr):
    """f = -(1 - p)^gamma t, its derivatives written in t / (1 - p) and p t, which stay finite at both ends."""
    plain = gamma == 0.0
    p, u = tl.exp(t), -expm1(t)
    certain = u == 0.0
    modulation = tl.where(certain, 0.0, tl.exp(gamma * tl.log(tl.where(certain, 1.0, u))))
    modulation = tl.where(plain, 1.0, modulation)
    value = tl.where(modulation == 0.0, 0.0, -modulation * t)
    pt = tl.where(p == 0.0, 0.0, p * t)
    pt_over_u = tl.where(certain, -1.0, pt / tl.where(certain, 1.0, u))
    # For gamma < 1 the curvature is infinite at u = 0, but only ever multiplies a factor u: the product's limit is 0.
    at_certain = tl.where(gamma == 1.0, 1.0, 0.0)
    outer = tl.where(certain, at_certain, modulation / tl.where(certain, 1.0, u))
    constant = plain | DETACH_MODULATION
    slope = tl.where(constant, -modulation, modulation * (gamma * pt_over_u - 1.0))
    curvature = gamma * outer * (pt + 2.0 * p - (gamma - 1.0) * p * pt_over_u)
    return value, slope, tl.where(constant, 0.0, curvature), tl.full(t.shape, 1.0, tl.float64)


@triton.jit
def weighted_log_likelihood(t, weight, max_weight, DIFFERENTIATE_WEIGHT: tl.constexpr):
    """f = -w t with w = quality / p capped; constant, or differentiated through p."""
    capped = weight > max_weight
    weight = tl.where(capped, max_weight, weight)
    nothing = weight == 0.0  # exactly zero, also where t is -inf
    value = tl.where(nothing, 0.0, -weight * t)
    slope = tl.where(nothing, 0.0, -weight)
    curvature = tl.zeros(t.shape, tl.float64)
    if DIFFERENTIATE_WEIGHT:
        constant = nothing | capped
        slope = tl.where(constant, slope, weight * t - weight)
        curvature = tl.where(constant, 0.0, weight * (2.0 - t))
    return value, slope, curvature, weight


@triton.jit
def dimp_weight(t, quality, IS_LOG: tl.constexpr):
    """One exponential of the difference: quality and 1 / p may each leave the range where their product does not."""
    if IS_LOG:
        return tl.exp(quality - t)
    else:
        return tl.where(quality == 0.0, 0.0, quality * tl.exp(-t))


@triton.jit
def imp_weight(ratio, IS_LOG: tl.constexpr):
    if IS_LOG:
        return tl.exp(ratio)
    else:
        return ratio


@triton.jit
def evaluate(t, ratio, p0, p1, p2, KIND: tl.constexpr, HAS_P1: tl.constexpr, HAS_P2: tl.constexpr):
    """Value, slope and curvature at t, and the row's IMP or DIMP weight, 1 for every other loss."""
    zero = tl.zeros(t.shape, tl.float64)
    p0, p1, p2 = zero + p0, zero + p1, zero + p2
    if KIND == RCE:
        return reverse_cross_entropy(t, p0)
    elif KIND == GCE:
        return generalized_cross_entropy(t, p0, p1)
    elif KIND == SCE:
        return symmetric_cross_entropy(t, p0, p1, p2)
    elif KIND == FOCAL:
        return focal(t, p0, HAS_P1)
    elif KIND == IMP:
        return weighted_log_likelihood(t, imp_weight(ratio, HAS_P1), p0, False)
    elif KIND == DIMP:
        return weighted_log_likelihood(t, dimp_weight(t, ratio, HAS_P1), p0, not HAS_P2)
    else:
        return cross_entropy(t)
