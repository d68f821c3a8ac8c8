"""The row kernels: forward (with the gradient where it is asked for), backward, rescaling, tangent and hvp.

A program works on a tile of R rows and B classes. Where rows fit the tile (SINGLE) they are held on chip and read from
memory once; longer ones are walked in steps of B. What a row comes down to (its statistics, and the slopes that every
derivative is made of) is computed in float64, as on the CPU; the rest in float32, or float64 for float64 logits.

A target outside [0, C) that is not ignored makes its row NaN: raising would have to wait for the device.
"""

import triton
import triton.language as tl

from .losses import evaluate
from .scalars import log1p, rounded

# Rows of the statistics, as in csrc/core/rows.h.
MAX = tl.constexpr(0)
REST = tl.constexpr(1)
CENTERED = tl.constexpr(2)
RATIO = tl.constexpr(3)
DENOMINATOR = tl.constexpr(4)

NONE = tl.constexpr(0)
MEAN = tl.constexpr(2)

PARTS = tl.constexpr(256)  # programs that count the kept rows of a mean, at most


# ---- Loads and stores --------------------------------------------------------------------------------------------


@triton.jit
def program_rows(rows, R: tl.constexpr):
    """Rows of this program, and which of them exist."""
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    return i, i < rows


@triton.jit
def load_vector(values, at, there, otherwise: tl.constexpr):
    """values[at] in float64; the constant where it is not there, or where there are no values at all."""
    if values is None:
        return tl.full(at.shape, otherwise, tl.float64)
    else:
        return tl.load(values + at, mask=there, other=otherwise).to(tl.float64)


@triton.jit
def load_tile(x, stride, i, live, columns, classes, other: tl.constexpr, wide: tl.constexpr):
    """x[i, columns] (R, B); `other` outside the matrix."""
    inside = live[:, None] & (columns < classes)[None, :]
    return tl.load(x + i[:, None] * stride + columns[None, :], mask=inside, other=other).to(wide)


@triton.jit
def store_tile(out, i, live, columns, classes, x):
    inside = live[:, None] & (columns < classes)[None, :]
    tl.store(out + i[:, None] * classes + columns[None, :], rounded(x, out.dtype.element_ty), mask=inside)


@triton.jit
def load_target(target, i, live, classes, ignore_index):
    """Target, whether the row is kept, and whether it is kept and its target a class."""
    y = tl.load(target + i, mask=live, other=0).to(tl.int64)
    kept = live & (y != ignore_index)
    return y, kept, kept & (y >= 0) & (y < classes)


@triton.jit
def class_weights(class_weight, columns, classes, wide: tl.constexpr):
    """cw (1, B), 1 where there are none; zero outside the classes."""
    inside = columns < classes
    if class_weight is None:
        cw = inside.to(wide)
    else:
        cw = tl.load(class_weight + columns, mask=inside, other=0.0)
    return cw[None, :]


# ---- Statistics --------------------------------------------------------------------------------------------------


@triton.jit
def combine_lanes(lane_max, lane_rest):
    """(max, rest) of rows from those of their lanes. rest is the sum of e^(z - max) without one occurrence of max:
    log1p of it keeps the digits of a confident row that log(1 + tiny) loses. It is NaN for a row without a softmax."""
    m = tl.max(lane_max, 1)
    is_max = lane_max == m[:, None]
    # A lane stands for its maximum and its rest. Of the row's maxima one is left out by never being added.
    terms = tl.where(is_max, lane_rest, (lane_rest + 1.0) * tl.exp(lane_max - m[:, None]))
    rest = tl.sum(terms, 1) + (tl.sum(is_max.to(tl.int32), 1) - 1).to(terms.dtype)
    return m, tl.where(tl.abs(m) < float("inf"), rest, float("nan"))


@triton.jit
def tile_statistics(x):
    """Of a tile that holds whole rows."""
    is_nan = x != x
    return combine_lanes(tl.where(is_nan, float("-inf"), x), tl.where(is_nan, x, 0.0))


@triton.jit
def walked_statistics(logits, stride, i, live, classes, wide: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """Of rows longer than a tile. Each lane keeps a maximum and a rest of its own, for one exponential an element: the
    smaller of element and maximum is scaled to the larger."""
    lane_max = tl.full([R, B], float("-inf"), wide)
    lane_rest = tl.zeros([R, B], wide)
    for start in range(0, classes, B):
        x = load_tile(logits, stride, i, live, start + tl.arange(0, B), classes, float("-inf"), wide)
        larger = x > lane_max
        e = tl.where(x == lane_max, 1.0, tl.exp(-tl.abs(x - lane_max)))
        lane_rest = tl.where(larger, (lane_rest + 1.0) * e, lane_rest + e)
        lane_max = tl.where(larger, x, lane_max)
    return combine_lanes(lane_max, lane_rest)


@triton.jit
def centered_sum(logits, stride, i, live, classes, class_weight, m, R: tl.constexpr, B: tl.constexpr):
    """Sum over classes of cw (z - max), for label smoothing."""
    total = tl.zeros([R], tl.float64)
    for start in range(0, classes, B):
        columns = start + tl.arange(0, B)
        x = load_tile(logits, stride, i, live, columns, classes, 0.0, m.dtype)
        cw = class_weights(class_weight, columns, classes, m.dtype)
        total += tl.sum(tl.where(cw == 0.0, 0.0, cw * (x - m[:, None])), 1).to(tl.float64)
    return total


# ---- What a row comes down to ------------------------------------------------------------------------------------


@triton.jit
def row_context(
    logits, stride, i, y, kept, is_class, classes, m, rest, centered, ratio, class_weight, class_weight_sum,
    p0, p1, p2, label_smoothing, z_loss,
    KIND: tl.constexpr, HAS_P1: tl.constexpr, HAS_P2: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """What every derivative of a row is made of. With cw the class weights,
    F = cw_y (1 - eps) f(t) + eps / C sum_c cw_c (lse - z_c) + z_loss lse^2
    has the gradient slope_t (e_y - p) + slope_lse p + kappa cw.

    Returns, each (R,) in float64: value, slope_t, curvature_t, slope_lse, curvature_lse, kappa, the weight of IMP or
    DIMP, 1 - p_y, 1 / sum of e^(z - max), cw_y; and whether the derivatives are zero: ignored, or F constant near here.
    """
    m, rest = m.to(tl.float64), rest.to(tl.float64)
    wide: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    z_y = tl.load(logits + i * stride + y, mask=is_class, other=0.0).to(wide).to(tl.float64)
    cw_y = load_vector(class_weight, y, is_class, 1.0)
    log_sum, inverse_sum = log1p(rest), 1.0 / (1.0 + rest)
    t = tl.where(is_class, (z_y - m) - log_sum, float("nan"))
    # Without cancellation: the target is the maximum, or the maximum's own 1 is among the other terms.
    not_p = tl.where(z_y == m, rest, 1.0 + rest - tl.exp(z_y - m)) * inverse_sum
    value, slope_t, curvature_t, weight = evaluate(t, ratio, p0, p1, p2, KIND, HAS_P1, HAS_P2)
    main = cw_y * (1.0 - label_smoothing)
    value, slope_t, curvature_t = main * value, main * slope_t, main * curvature_t
    value = tl.where(cw_y == 0.0, 0.0, value)
    slope_t = tl.where(cw_y == 0.0, 0.0, slope_t)
    curvature_t = tl.where(cw_y == 0.0, 0.0, curvature_t)
    zero = tl.zeros(t.shape, tl.float64)
    slope_lse, curvature_lse, kappa = zero, zero, zero
    if SMOOTHING:
        share = (zero + label_smoothing) / classes
        if class_weight is None:
            total = zero + classes
        else:
            total = zero + tl.load(class_weight_sum)
        value += share * (total * log_sum - centered)
        slope_lse += share * total
        kappa -= share
    if Z_LOSS:
        lse = m + log_sum
        value += z_loss * lse * lse
        slope_lse += 2.0 * z_loss * lse
        curvature_lse += 2.0 * z_loss
    # A loss that does not look at t (quality zero) must not hide a target that is no class.
    is_wrong = kept & (is_class == 0)
    value = tl.where(is_wrong, float("nan"), tl.where(kept, value, 0.0))
    slope_t = tl.where(is_wrong, float("nan"), slope_t)
    flat = (slope_t == 0.0) & (curvature_t == 0.0) & (slope_lse == 0.0) & (curvature_lse == 0.0) & (kappa == 0.0)
    weight = tl.where(kept, weight, 0.0)
    return (
        value, slope_t, curvature_t, slope_lse, curvature_lse, kappa, weight, not_p, inverse_sum, cw_y,
        flat | (kept == 0),
    )  # fmt: skip


@triton.jit
def load_statistics(statistics, rows, i, kept):
    m = tl.load(statistics + MAX * rows + i, mask=kept, other=0.0)
    rest = tl.load(statistics + REST * rows + i, mask=kept, other=0.0)
    centered = tl.load(statistics + CENTERED * rows + i, mask=kept, other=0.0)
    return m, rest, centered.to(tl.float64)


@triton.jit
def save_statistics(statistics, rows, i, live, kept, m, rest, centered, weight, denominator):
    to: tl.constexpr = statistics.dtype.element_ty
    rows = rows.to(tl.int64)
    tl.store(statistics + MAX * rows + i, tl.where(kept, m, 0.0), mask=live)
    tl.store(statistics + REST * rows + i, tl.where(kept, rest, 0.0), mask=live)
    tl.store(statistics + CENTERED * rows + i, tl.where(kept, centered, 0.0).to(to), mask=live)
    tl.store(statistics + RATIO * rows + i, weight.to(to), mask=live)
    tl.store(statistics + DENOMINATOR * rows + i, (tl.zeros(i.shape, tl.float64) + denominator).to(to), mask=live)


# ---- Gradients ---------------------------------------------------------------------------------------------------


@triton.jit
def write_gradient(
    out, x, logits, stride, i, live, y, classes, m, class_weight, alpha, kappa, at_target, is_zero,
    SMOOTHING: tl.constexpr, SINGLE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out = alpha e^(z - max) + kappa cw, at_target in the target's column, zero in rows that are zero. x is the tile
    where it is on chip."""
    wide: tl.constexpr = m.dtype
    alpha, kappa, at_target = alpha.to(wide), kappa.to(wide), at_target.to(wide)
    for start in range(0, 1 if SINGLE else classes, B):
        columns = start + tl.arange(0, B)
        z = x if SINGLE else load_tile(logits, stride, i, live, columns, classes, float("-inf"), wide)
        g = alpha[:, None] * tl.exp(z - m[:, None])
        if SMOOTHING:
            g += kappa[:, None] * class_weights(class_weight, columns, classes, wide)
        g = tl.where(columns[None, :] == y[:, None], at_target[:, None], g)
        store_tile(out, i, live, columns, classes, tl.where(is_zero[:, None], 0.0, g))


@triton.jit
def gradient_factors(coefficient, slope_t, slope_lse, kappa, not_p, inverse_sum, cw_y):
    """alpha and kappa of a row's gradient times coefficient, and its entry in the target's column, which is made of
    1 - p_y itself."""
    at_target = coefficient * (slope_t * not_p + slope_lse * (1.0 - not_p) + kappa * cw_y)
    return coefficient * (slope_lse - slope_t) * inverse_sum, coefficient * kappa, at_target


# ---- Kernels -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "ignore_index", "span"])
def kept_weight_kernel(target, class_weight, parts, rows, classes, ignore_index, span, B: tl.constexpr):
    """parts[program] = sum of cw[target] over the kept ones of `span` rows, 1 where there are no class weights."""
    first = tl.program_id(0).to(tl.int64) * span
    total = tl.zeros([B], tl.float64)
    for start in range(0, span, B):
        step = start + tl.arange(0, B)
        i = first + step
        y, kept, is_class = load_target(target, i, (step < span) & (i < rows), classes, ignore_index)
        total += tl.where(kept, load_vector(class_weight, y, is_class, 1.0), 0.0)
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def sum_of_parts(parts, count):
    j = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + j, mask=j < count, other=0.0), 0)


@triton.jit(do_not_specialize=["count", "part_count"])
def reduce_kernel(partial_losses, parts, loss, count, part_count, B: tl.constexpr):
    """loss = sum of partial losses / sum of parts, in one order."""
    total = tl.zeros([B], tl.float64)
    for start in range(0, count, B):
        j = start + tl.arange(0, B)
        total += tl.load(partial_losses + j, mask=j < count, other=0.0)
    result = tl.sum(total, 0)
    if parts is not None:
        result = result / sum_of_parts(parts, part_count)
    tl.store(loss, result.to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "ignore_index", "part_count"])
def forward_kernel(
    logits, target, weight, ratio, class_weight, class_weight_sum, parts, statistics, losses, gradient, grad_weight,
    rows, classes, stride, ignore_index, part_count,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, label_smoothing: tl.float64, z_loss: tl.float64,
    KIND: tl.constexpr, HAS_P1: tl.constexpr, HAS_P2: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    REDUCTION: tl.constexpr, WHOLE: tl.constexpr, SINGLE: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Statistics, and losses: weight_i F_i a row; else one sum a program, or with WHOLE (one program has every row) the
    reduced loss itself. With a gradient, that of the reduced loss too."""
    wide: tl.constexpr = statistics.dtype.element_ty
    i, live = program_rows(rows, R)
    y, kept, is_class = load_target(target, i, live, classes, ignore_index)
    if SINGLE:
        x = load_tile(logits, stride, i, live, tl.arange(0, B), classes, float("-inf"), wide)
        m, rest = tile_statistics(x)
    else:
        x = None
        m, rest = walked_statistics(logits, stride, i, live, classes, wide, R, B)
    centered = tl.zeros([R], tl.float64)
    if SMOOTHING:
        centered = centered_sum(logits, stride, i, live, classes, class_weight, m, R, B)
    row_ratio = load_vector(ratio, i, live, 1.0)
    value, slope_t, _, slope_lse, _, kappa, weight_of, not_p, inverse_sum, cw_y, is_zero = row_context(
        logits, stride, i, y, kept, is_class, classes, m, rest, centered, row_ratio, class_weight, class_weight_sum,
        p0, p1, p2, label_smoothing, z_loss, KIND, HAS_P1, HAS_P2, SMOOTHING, Z_LOSS,
    )  # fmt: skip
    denominator = 1.0
    if REDUCTION == MEAN:
        if WHOLE:
            denominator = tl.sum(tl.where(kept, cw_y, 0.0), 0)
        else:
            denominator = sum_of_parts(parts, part_count)
    save_statistics(statistics, rows, i, live, kept, m, rest, centered, weight_of, denominator)
    w = load_vector(weight, i, live, 1.0)
    loss = tl.where(w == 0.0, 0.0, w * value)
    if REDUCTION == NONE:
        tl.store(losses + i, loss.to(wide), mask=live)
    elif WHOLE:
        tl.store(losses, (tl.sum(loss, 0) / denominator).to(wide))
    else:
        tl.store(losses + tl.program_id(0), tl.sum(loss, 0))
    if gradient is not None:
        scale = 1.0 / (tl.zeros([R], tl.float64) + denominator)
        if weight is not None:
            tl.store(grad_weight + i, tl.where(kept, scale * value, 0.0).to(wide), mask=live)
        alpha, kappa, at_target = gradient_factors(scale * w, slope_t, slope_lse, kappa, not_p, inverse_sum, cw_y)
        write_gradient(
            gradient, x, logits, stride, i, live, y, classes, m, class_weight, alpha, kappa, at_target,
            is_zero | (scale * w == 0.0), SMOOTHING, SINGLE, B,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def backward_kernel(
    grad, logits, target, weight, ratio, class_weight, class_weight_sum, statistics, gradient, grad_weight,
    rows, classes, stride, ignore_index,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, label_smoothing: tl.float64, z_loss: tl.float64,
    KIND: tl.constexpr, HAS_P1: tl.constexpr, HAS_P2: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    REDUCED: tl.constexpr, UNLESS_ONE: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """gradient_i = scale_i weight_i dF_i/dlogits, grad_weight_i = scale_i F_i. scale_i is grad_i, or with REDUCED
    grad / denominator_i. With UNLESS_ONE nothing is done where grad is 1: the outputs hold that gradient already."""
    i, live = program_rows(rows, R)
    if REDUCED:
        scalar = tl.load(grad).to(tl.float64)
        if UNLESS_ONE:
            if scalar == 1.0:
                return
        denominator = tl.load(statistics + DENOMINATOR * rows.to(tl.int64) + i, mask=live, other=1.0).to(tl.float64)
        scale = scalar / denominator
    else:
        scale = tl.load(grad + i, mask=live, other=0.0).to(tl.float64)
    y, kept, is_class = load_target(target, i, live, classes, ignore_index)
    m, rest, centered = load_statistics(statistics, rows.to(tl.int64), i, kept)
    row_ratio = load_vector(ratio, i, live, 1.0)
    value, slope_t, _, slope_lse, _, kappa, _, not_p, inverse_sum, cw_y, is_zero = row_context(
        logits, stride, i, y, kept, is_class, classes, m, rest, centered, row_ratio, class_weight, class_weight_sum,
        p0, p1, p2, label_smoothing, z_loss, KIND, HAS_P1, HAS_P2, SMOOTHING, Z_LOSS,
    )  # fmt: skip
    if grad_weight is not None:
        tl.store(grad_weight + i, tl.where(kept, scale * value, 0.0).to(m.dtype), mask=live)
    coefficient = scale * load_vector(weight, i, live, 1.0)
    alpha, kappa, at_target = gradient_factors(coefficient, slope_t, slope_lse, kappa, not_p, inverse_sum, cw_y)
    write_gradient(
        gradient, None, logits, stride, i, live, y, classes, m, class_weight, alpha, kappa, at_target,
        is_zero | (coefficient == 0.0), SMOOTHING, False, B,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def scale_kernel(grad, values, count, B: tl.constexpr):
    """values *= grad; nothing is read or written where grad is 1."""
    scale = tl.load(grad)
    if scale == 1.0:
        return
    j = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(values + j, tl.load(values + j, mask=j < count) * scale, mask=j < count)


# ---- Second derivatives ------------------------------------------------------------------------------------------


@triton.jit
def direction_dots(
    logits, stride, v, v_stride, i, live, classes, m, class_weight, SMOOTHING: tl.constexpr, R: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """<e^(z - max), v>, and with label smoothing sum cw v."""
    wide: tl.constexpr = m.dtype
    lanes = tl.zeros([R, B], wide)
    weighted = tl.zeros([R, B], wide)
    for start in range(0, classes, B):
        columns = start + tl.arange(0, B)
        z = load_tile(logits, stride, i, live, columns, classes, float("-inf"), wide)
        u = load_tile(v, v_stride, i, live, columns, classes, 0.0, wide)
        lanes += tl.exp(z - m[:, None]) * u
        if SMOOTHING:
            weighted += class_weights(class_weight, columns, classes, wide) * u
    return tl.sum(lanes, 1).to(tl.float64), tl.sum(weighted, 1).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def tangent_kernel(
    v, coefficient, logits, target, ratio, class_weight, class_weight_sum, statistics, directional,
    rows, classes, stride, v_stride, ignore_index,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, label_smoothing: tl.float64, z_loss: tl.float64,
    KIND: tl.constexpr, HAS_P1: tl.constexpr, HAS_P2: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """directional_i = coefficient_i <dF_i/dlogits, v_i>"""
    i, live = program_rows(rows, R)
    y, kept, is_class = load_target(target, i, live, classes, ignore_index)
    m, rest, centered = load_statistics(statistics, rows.to(tl.int64), i, kept)
    row_ratio = load_vector(ratio, i, live, 1.0)
    _, slope_t, _, slope_lse, _, kappa, _, _, inverse_sum, _, is_zero = row_context(
        logits, stride, i, y, kept, is_class, classes, m, rest, centered, row_ratio, class_weight, class_weight_sum,
        p0, p1, p2, label_smoothing, z_loss, KIND, HAS_P1, HAS_P2, SMOOTHING, Z_LOSS,
    )  # fmt: skip
    dot, weighted = direction_dots(logits, stride, v, v_stride, i, live, classes, m, class_weight, SMOOTHING, R, B)
    dot *= inverse_sum
    v_y = tl.load(v + i * v_stride + y, mask=is_class, other=0.0).to(m.dtype).to(tl.float64)
    k = load_vector(coefficient, i, live, 1.0)
    along = k * (slope_t * (v_y - dot) + slope_lse * dot + kappa * weighted)
    tl.store(directional + i, tl.where(is_zero | (k == 0.0), 0.0, along).to(m.dtype), mask=live)


@triton.jit
def write_hvp(
    out, logits, stride, v, v_stride, i, live, y, classes, m, class_weight, alpha, beta, kappa, at_target, is_zero,
    SMOOTHING: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out = e^(z - max) (alpha + beta v) + kappa cw; beta zero leaves v out, also where that is infinite."""
    wide: tl.constexpr = m.dtype
    alpha, beta, kappa, at_target = alpha.to(wide), beta.to(wide), kappa.to(wide), at_target.to(wide)
    for start in range(0, classes, B):
        columns = start + tl.arange(0, B)
        z = load_tile(logits, stride, i, live, columns, classes, float("-inf"), wide)
        u = load_tile(v, v_stride, i, live, columns, classes, 0.0, wide)
        moved = tl.where(beta[:, None] == 0.0, 0.0, beta[:, None] * u)
        h = tl.exp(z - m[:, None]) * (alpha[:, None] + moved)
        if SMOOTHING:
            h += kappa[:, None] * class_weights(class_weight, columns, classes, wide)
        h = tl.where(columns[None, :] == y[:, None], at_target[:, None], h)
        store_tile(out, i, live, columns, classes, tl.where(is_zero[:, None], 0.0, h))


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def hvp_kernel(
    v, coefficient, extra, logits, target, ratio, class_weight, class_weight_sum, statistics, out, directional,
    rows, classes, stride, v_stride, ignore_index,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, label_smoothing: tl.float64, z_loss: tl.float64,
    KIND: tl.constexpr, HAS_P1: tl.constexpr, HAS_P2: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out_i = coefficient_i (d2F_i/dlogits2) v_i + extra_i dF_i/dlogits, directional_i = <dF_i/dlogits, v_i>"""
    i, live = program_rows(rows, R)
    y, kept, is_class = load_target(target, i, live, classes, ignore_index)
    m, rest, centered = load_statistics(statistics, rows.to(tl.int64), i, kept)
    row_ratio = load_vector(ratio, i, live, 1.0)
    _, slope_t, curvature_t, slope_lse, curvature_lse, kappa, _, not_p, inverse_sum, cw_y, is_zero = row_context(
        logits, stride, i, y, kept, is_class, classes, m, rest, centered, row_ratio, class_weight, class_weight_sum,
        p0, p1, p2, label_smoothing, z_loss, KIND, HAS_P1, HAS_P2, SMOOTHING, Z_LOSS,
    )  # fmt: skip
    dot, weighted = direction_dots(logits, stride, v, v_stride, i, live, classes, m, class_weight, SMOOTHING, R, B)
    dot *= inverse_sum
    v_y = tl.load(v + i * v_stride + y, mask=is_class, other=0.0).to(m.dtype).to(tl.float64)
    along = slope_t * (v_y - dot) + slope_lse * dot + kappa * weighted
    tl.store(directional + i, tl.where(is_zero, 0.0, along).to(m.dtype), mask=live)

    k = load_vector(coefficient, i, live, 0.0)
    e = load_vector(extra, i, live, 0.0)
    t_dot, difference = v_y - dot, slope_lse - slope_t
    mix = k * difference
    # Of a row without k only the gradient is left, without products of zero and infinity.
    curved = k * (curvature_lse * dot - curvature_t * t_dot) - mix * dot
    alpha = (tl.where(k == 0.0, 0.0, curved) + e * difference) * inverse_sum
    beta = tl.where(k == 0.0, 0.0, mix * inverse_sum)
    second = curvature_t * t_dot * not_p + (curvature_lse * dot + difference * t_dot) * (1.0 - not_p)
    first = slope_t * not_p + slope_lse * (1.0 - not_p)
    at_target = tl.where(k == 0.0, 0.0, k * second) + e * first + e * kappa * cw_y
    write_hvp(
        out, logits, stride, v, v_stride, i, live, y, classes, m, class_weight, alpha, beta, e * kappa, at_target,
        is_zero | ((k == 0.0) & (e == 0.0)), SMOOTHING, B,
    )  # fmt: skip
