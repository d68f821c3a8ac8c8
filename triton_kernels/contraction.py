"""The contraction kernels of the per-sample meta-gradient: the sum over a sample's rows of <b, J v>, where b is the
gradient at a layer's output and J v the output's change along the direction v of its parameters, which is never stored.

Each layer's kernel leaves partial sums (T, rows), T tiles a row; a second kernel adds them by sample, in row order and
in float64, so that a result has the same bits every time. An index outside its table makes its row NaN, a sample
outside [0, samples) every result: raising would have to wait for the device.
"""

import triton
import triton.language as tl

from .rows import load_tile, program_rows
from .scalars import INTERPRETED


@triton.jit
def grouped_tile(rows, outputs, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of this program: columns of GROUP row tiles, one after another, share what is in cache."""
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(outputs, BN)
    in_group = GROUP * column_tiles
    group, within = tl.program_id(0) // in_group, tl.program_id(0) % in_group
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def change_of_output(
    a, v, i, j, rows, inputs, outputs, a_stride, v_stride, v_inner, wide: tl.constexpr, SAME: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """v a_i for the tile's rows i and outputs j: (BM, BN)."""
    acc = tl.zeros([BM, BN], wide)
    for start in range(0, inputs, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(a + i[:, None] * a_stride + k[None, :], mask=(i < rows)[:, None] & (k < inputs)[None, :], other=0.0)
        at = v + j[None, :] * v_stride + k[:, None] * v_inner
        y = tl.load(at, mask=(j < outputs)[None, :] & (k < inputs)[:, None], other=0.0)
        if INTERPRETED or not SAME:
            x, y = x.to(wide), y.to(wide)
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=wide)
    return acc


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    a, b, v, v_bias, partial, rows, inputs, outputs, a_stride, b_stride, v_stride, v_inner,
    SAME: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """partial[column tile, i] = sum over the tile's outputs of b_i (v a_i + v_bias)"""
    wide: tl.constexpr = partial.dtype.element_ty
    row_tile, column_tile = grouped_tile(rows, outputs, BM, BN, GROUP)
    i = row_tile.to(tl.int64) * BM + tl.arange(0, BM)
    j = column_tile.to(tl.int64) * BN + tl.arange(0, BN)
    change = change_of_output(
        a, v, i, j, rows, inputs, outputs, a_stride, v_stride, v_inner, wide, SAME, PRECISION, BM, BN, BK
    )
    if v_bias is not None:
        change += tl.load(v_bias + j, mask=j < outputs, other=0.0)[None, :]
    gradient = load_tile(b, b_stride, i, i < rows, j, outputs, 0.0, wide)
    at = column_tile.to(tl.int64) * rows + i
    tl.store(partial + at, tl.sum(change * gradient, 1), mask=i < rows)


@triton.jit(do_not_specialize=["rows"])
def embedding_kernel(
    index, b, v, partial, rows, width, entries, b_stride, v_stride, R: tl.constexpr, B: tl.constexpr
):
    """partial[i] = <b_i, v[index_i]>"""
    wide: tl.constexpr = partial.dtype.element_ty
    i, live = program_rows(rows, R)
    entry = tl.load(index + i, mask=live, other=0)
    known = (entry >= 0) & (entry < entries)
    lanes = tl.zeros([R, B], wide)
    for start in range(0, width, B):
        columns = start + tl.arange(0, B)
        x = load_tile(b, b_stride, i, live, columns, width, 0.0, wide)
        lanes += x * load_tile(v, v_stride, entry, live & known, columns, width, 0.0, wide)
    tl.store(partial + i, tl.where(known, tl.sum(lanes, 1), float("nan")), mask=live)


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, b, mean, rstd, v_weight, v_bias, partial, rows, width, x_stride, b_stride, R: tl.constexpr, B: tl.constexpr
):
    """partial[i] = rstd_i <b_i, v_weight (x_i - mean_i)> + <b_i, v_bias>"""
    wide: tl.constexpr = partial.dtype.element_ty
    i, live = program_rows(rows, R)
    center = tl.zeros([R], wide)
    if mean is not None:
        center = tl.load(mean + i, mask=live, other=0.0)
    scaled = tl.zeros([R, B], wide)
    shifted = tl.zeros([R, B], wide)
    for start in range(0, width, B):
        columns = start + tl.arange(0, B)
        inside = columns < width
        gradient = load_tile(b, b_stride, i, live, columns, width, 0.0, wide)
        if v_weight is not None:
            z = load_tile(x, x_stride, i, live, columns, width, 0.0, wide) - center[:, None]
            scaled += gradient * (tl.load(v_weight + columns, mask=inside, other=0.0)[None, :] * z)
        if v_bias is not None:
            shifted += gradient * tl.load(v_bias + columns, mask=inside, other=0.0)[None, :]
    row = tl.sum(scaled, 1) * tl.load(rstd + i, mask=live, other=0.0) + tl.sum(shifted, 1)
    tl.store(partial + i, row, mask=live)


@triton.jit(do_not_specialize=["rows", "samples", "size", "tiles"])
def sum_groups_kernel(partial, out, rows, samples, size, tiles, S: tl.constexpr, B: tl.constexpr):
    """out[n] = sum of partial[:, n size : (n + 1) size]"""
    rows = rows.to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    total = tl.zeros([S, B], tl.float64)
    for start in range(0, size, B):
        step = start + tl.arange(0, B)
        there = (n < samples)[:, None] & (step < size)[None, :]
        for tile in range(0, tiles):
            at = tile * rows + n[:, None] * size + step[None, :]
            total += tl.load(partial + at, mask=there, other=0.0).to(tl.float64)
    tl.store(out + n, tl.sum(total, 1).to(out.dtype.element_ty), mask=n < samples)


@triton.jit(do_not_specialize=["rows", "samples", "tiles"])
def sum_index_kernel(partial, sample, out, rows, samples, tiles, S: tl.constexpr, B: tl.constexpr):
    """out[n] = sum of partial[:, i] over the rows i with sample[i] = n. Every program reads every row's sample: cheaper
    than sorting them, and without atomic additions, whose order differs from run to run."""
    rows = rows.to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    total = tl.zeros([S, B], tl.float64)
    for start in range(0, rows, B):
        i = start + tl.arange(0, B)
        there = i < rows
        row = tl.zeros([B], tl.float64)
        for tile in range(0, tiles):
            row += tl.load(partial + tile * rows + i, mask=there, other=0.0).to(tl.float64)
        of = tl.load(sample + i, mask=there, other=0)
        row = tl.where((of >= 0) & (of < samples), row, float("nan"))
        mine = (of[None, :] == n[:, None]) | (row != row)[None, :]
        total += tl.where(mine & there[None, :], row[None, :], 0.0)
    tl.store(out + n, tl.sum(total, 1).to(out.dtype.element_ty), mask=n < samples)
