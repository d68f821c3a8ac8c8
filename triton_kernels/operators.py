"""The operators' launchers, with the signatures of the schemas in csrc/torch. What they compute is said there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from synkern._schema import MEAN, NONE, STATISTICS_ROWS, accumulate_dtype

from . import contraction, rows
from .launch import WHOLE_ELEMENTS, Tile, launch, row_tile, short_tile

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8)
MOST_PARTS = rows.PARTS.value
SCALED_ELEMENTS = 2048  # of a gradient, a program
PART_ROWS = 2048  # of a program that counts kept rows, at least


def _vector(x: Tensor | None, name: str, size: int, dtype: torch.dtype) -> Tensor | None:
    """A vector operand: checked, contiguous."""
    if x is None:
        return None
    if x.shape != (size,) or x.dtype != dtype:
        raise ValueError(
            f"synkern: {name} must have shape ({size},) and dtype {dtype}, got {tuple(x.shape)} and {x.dtype}; "
            "the accumulation type is float64 beside float64 and float32 otherwise"
        )
    return x.contiguous()


def _matrix(x: Tensor) -> Tensor:
    """Rows with unit inner stride are read where they lie; any other layout is copied once."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


class Problem(NamedTuple):
    """The operands of one call and what the kernels are compiled for."""

    logits: Tensor
    target: Tensor
    ratio: Tensor | None
    class_weight: Tensor | None
    class_weight_sum: Tensor | None
    sizes: tuple[int, int]
    ignore_index: int
    parameters: tuple[float, ...]
    constants: dict[str, Any]

    @property
    def wide(self) -> torch.dtype:
        return accumulate_dtype(self.logits.dtype)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.ratio, self.class_weight, self.class_weight_sum

    def vector(self, x: Tensor | None, name: str) -> Tensor | None:
        return _vector(x, name, self.sizes[0], self.wide)

    def new_vector(self, size: int | None = None) -> Tensor:
        return self.logits.new_empty(self.sizes[0] if size is None else size, dtype=self.wide)

    def tile(self, arrays: int, held: bool = False) -> Tile:
        return row_tile(*self.sizes, self.wide.itemsize * arrays, held)


def _problem(
    logits: Tensor, target: Tensor, ratio: Tensor | None, class_weight: Tensor | None, loss: int, p0: float, p1: float,
    p2: float, label_smoothing: float, z_loss: float, ignore_index: int,
) -> Problem:
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"synkern: expected logits (N, C) and target (N,), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if logits.dtype not in FLOATING or target.dtype not in INTEGER:
        raise TypeError(
            "synkern: expected floating logits and integer target, got "
            f"{logits.dtype} and {target.dtype}; use logits.float() and target.long()"
        )
    n, c = logits.shape
    wide = accumulate_dtype(logits.dtype)
    class_weight = _vector(class_weight, "class_weight", c, wide)
    # One order, on the device: label smoothing spreads a row's loss over all classes.
    total = class_weight.sum(dtype=torch.float64) if label_smoothing and class_weight is not None else None
    constants = {
        "KIND": int(loss), "HAS_P1": p1 != 0.0, "HAS_P2": p2 != 0.0, "SMOOTHING": label_smoothing != 0.0,
        "Z_LOSS": z_loss != 0.0,
    }
    return Problem(
        _matrix(logits), target.contiguous(), _vector(ratio, "ratio", n, wide), class_weight, total, (n, c),
        ignore_index, (p0, p1, p2, label_smoothing, z_loss), constants,
    )


def _kept_weights(problem: Problem) -> Tensor:
    """Sums of the class weights of kept rows, over parts of the rows."""
    n, c = problem.sizes
    count = min(MOST_PARTS, triton.cdiv(n, PART_ROWS))
    parts = problem.logits.new_empty(count, dtype=torch.float64)
    launch(
        rows.kept_weight_kernel, count, parts, problem.target, problem.class_weight, parts, n, c,
        problem.ignore_index, triton.cdiv(n, count), B=1024,
    )
    return parts


def _reduce(problem: Problem, partial: Tensor, parts: Tensor | None) -> Tensor:
    loss = problem.logits.new_empty((), dtype=problem.wide)
    launch(
        rows.reduce_kernel, 1, loss, partial, parts, loss, len(partial), 0 if parts is None else len(parts),
        B=1024, warps=8,
    )
    return loss


def _forward(
    problem: Problem, weight: Tensor | None, reduction: int, gradient: Tensor | None, grad_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    n, c = problem.sizes
    weight = problem.vector(weight, "weight")
    statistics = problem.logits.new_empty((STATISTICS_ROWS, n), dtype=problem.wide)
    tile = problem.tile(1, held=True)
    if n == 0 and reduction == NONE:
        return problem.new_vector(), statistics
    is_single = c <= tile.classes
    is_whole = reduction != NONE and is_single and n * tile.classes <= WHOLE_ELEMENTS
    if is_whole:
        tile = short_tile(triton.next_power_of_2(max(1, n)), tile.classes)
    programs = max(1, triton.cdiv(n, tile.rows))
    parts = _kept_weights(problem) if reduction == MEAN and not is_whole else None
    if reduction == NONE:
        losses = problem.new_vector()
    elif is_whole:
        losses = problem.logits.new_empty((), dtype=problem.wide)
    else:
        losses = problem.logits.new_empty(programs, dtype=torch.float64)
    launch(
        rows.forward_kernel, programs, problem.logits, problem.logits, problem.target, weight, *problem.operands,
        parts, statistics, losses, gradient, grad_weight, n, c, problem.logits.stride(0), problem.ignore_index,
        0 if parts is None else len(parts), *problem.parameters, **problem.constants, REDUCTION=reduction,
        WHOLE=is_whole, SINGLE=is_single, **tile.options,
    )  # fmt: skip
    if reduction != NONE and not is_whole:
        losses = _reduce(problem, losses, parts)
    return losses, statistics


def row_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None, ratio: Tensor | None, class_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    return _forward(_problem(logits, target, ratio, class_weight, *options[:-1]), weight, options[-1], None, None)


def row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, ratio: Tensor | None, class_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(logits, target, ratio, class_weight, *options[:-1])
    if options[-1] == NONE:
        raise ValueError("synkern::row_loss_and_gradient: the loss must be reduced")
    gradient = logits.new_empty(logits.shape)
    grad_weight = problem.new_vector(0 if weight is None else None)
    return *_forward(problem, weight, options[-1], gradient, grad_weight), gradient, grad_weight


def _backward(
    problem: Problem, grad: Tensor, weight: Tensor | None, statistics: Tensor, gradient: Tensor,
    grad_weight: Tensor, reduced: bool, unless_one: bool,
) -> None:
    n, c = problem.sizes
    if n == 0:
        return
    grad = grad if reduced else problem.vector(grad, "grad")
    tile = problem.tile(1)
    launch(
        rows.backward_kernel, triton.cdiv(n, tile.rows), problem.logits, grad, problem.logits, problem.target,
        problem.vector(weight, "weight"), *problem.operands, statistics.contiguous(), gradient,
        None if weight is None else grad_weight, n, c, problem.logits.stride(0), problem.ignore_index,
        *problem.parameters, **problem.constants, REDUCED=reduced, UNLESS_ONE=unless_one, **tile.options,
    )  # fmt: skip


def row_loss_rescale(
    grad: Tensor, gradient: Tensor, grad_weight: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
    ratio: Tensor | None, class_weight: Tensor | None, statistics: Tensor, *options: Any,
) -> None:
    """Whether there is anything to do is known on the device alone, and decided there."""
    if logits.dtype.itemsize == 2:  # scaled, a 16-bit gradient would be rounded twice, and may have underflown
        problem = _problem(logits, target, ratio, class_weight, *options)
        _backward(problem, grad, weight, statistics, gradient, grad_weight, reduced=True, unless_one=True)
        return
    for values in (gradient, grad_weight):
        if values.numel():
            programs = triton.cdiv(values.numel(), SCALED_ELEMENTS)
            launch(rows.scale_kernel, programs, values, grad, values, values.numel(), B=SCALED_ELEMENTS)


def row_loss_backward(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, ratio: Tensor | None,
    class_weight: Tensor | None, statistics: Tensor, *options: Any,
) -> tuple[Tensor, Tensor]:
    problem = _problem(logits, target, ratio, class_weight, *options[:-1])
    gradient = logits.new_empty(logits.shape)
    grad_weight = problem.new_vector(0 if weight is None else None)
    _backward(problem, grad, weight, statistics, gradient, grad_weight, options[-1] != NONE, unless_one=False)
    return gradient, grad_weight


def _direction(v: Tensor, logits: Tensor) -> Tensor:
    if v.shape != logits.shape or v.dtype != logits.dtype:
        raise ValueError(
            f"synkern: the direction must have shape {tuple(logits.shape)} and dtype {logits.dtype} of logits, "
            f"got {tuple(v.shape)} and {v.dtype}"
        )
    return _matrix(v)


def row_loss_tangent(
    v: Tensor, coefficient: Tensor | None, logits: Tensor, target: Tensor, ratio: Tensor | None,
    class_weight: Tensor | None, statistics: Tensor, *options: Any,
) -> Tensor:
    problem = _problem(logits, target, ratio, class_weight, *options)
    v, (n, c), tile, directional = _direction(v, logits), problem.sizes, problem.tile(2), problem.new_vector()
    if n:
        launch(
            rows.tangent_kernel, triton.cdiv(n, tile.rows), logits, v, problem.vector(coefficient, "coefficient"),
            problem.logits, problem.target, *problem.operands, statistics.contiguous(), directional, n, c,
            problem.logits.stride(0), v.stride(0), problem.ignore_index, *problem.parameters, **problem.constants,
            **tile.options,
        )  # fmt: skip
    return directional


def row_loss_hvp(
    v: Tensor, coefficient: Tensor, extra: Tensor | None, logits: Tensor, target: Tensor, ratio: Tensor | None,
    class_weight: Tensor | None, statistics: Tensor, *options: Any,
) -> tuple[Tensor, Tensor]:
    problem = _problem(logits, target, ratio, class_weight, *options)
    v, (n, c), tile = _direction(v, logits), problem.sizes, problem.tile(2)
    out, directional = logits.new_empty(logits.shape), problem.new_vector()
    if n:
        launch(
            rows.hvp_kernel, triton.cdiv(n, tile.rows), logits, v, problem.vector(coefficient, "coefficient"),
            problem.vector(extra, "extra"), problem.logits, problem.target, *problem.operands,
            statistics.contiguous(), out, directional, n, c, problem.logits.stride(0), v.stride(0),
            problem.ignore_index, *problem.parameters, **problem.constants, **tile.options,
        )  # fmt: skip
    return out, directional


# ---- Contractions ------------------------------------------------------------------------------------------------


def _rows_matrix(x: Tensor, name: str, rows: int, dtype: torch.dtype) -> Tensor:
    if x.dim() != 2 or x.shape[0] != rows or x.dtype != dtype:
        raise ValueError(
            f"synkern: {name} must have shape ({rows}, ...) and dtype {dtype}, those of b, "
            f"got {tuple(x.shape)} and {x.dtype}"
        )
    return _matrix(x)


def _sum_by_sample(partial: Tensor, sample: Tensor | None, samples: int) -> Tensor:
    """partial (tiles, rows) -> (samples,)"""
    tiles, n = partial.shape
    out = partial.new_empty(samples)
    if sample is None and (n % samples if samples else n):
        raise ValueError(
            f"synkern: {n} rows cannot be split into {samples} equal samples; pass the sample of each row"
        )
    if sample is not None and (sample.shape != (n,) or sample.dtype != torch.int64):
        raise ValueError(
            f"synkern: sample must be int64 of shape ({n},), got {tuple(sample.shape)} and {sample.dtype}"
        )
    if samples == 0 or n == 0:
        return out.zero_()
    if sample is None:
        size = n // samples
        block = min(1024, triton.next_power_of_2(size))
        count = min(1024 // block, triton.next_power_of_2(samples))
        arguments = (partial, out, n, samples, size, tiles)
        launch(contraction.sum_groups_kernel, triton.cdiv(samples, count), partial, *arguments, S=count, B=block)
    else:
        arguments = (partial, sample.contiguous(), out, n, samples, tiles)
        launch(contraction.sum_index_kernel, triton.cdiv(samples, 16), partial, *arguments, S=16, B=128)
    return out


# Rows, outputs and inputs of a tile, and warps, by the width of what is multiplied.
LINEAR_TILES = {2: (128, 128, 64, 8), 4: (64, 64, 32, 4), 8: (32, 32, 16, 4)}


def linear_contraction(
    a: Tensor, b: Tensor, v: Tensor, v_bias: Tensor | None, sample: Tensor | None, samples: int
) -> Tensor:
    """16-bit operands go through the matrix units as they are. float32 ones, among them a float32 direction beside
    16-bit activations, are split into three products of reduced precision that together keep float32's digits."""
    (n, p), wide = b.shape, accumulate_dtype(b.dtype)
    a, b = _rows_matrix(a, "a", n, b.dtype), _matrix(b)
    if v.shape != (p, a.shape[1]) or v.dtype not in (b.dtype, wide):
        raise ValueError(
            f"synkern: v must have shape (outputs, inputs) = ({p}, {a.shape[1]}) and the dtype of b or {wide}, "
            f"got {tuple(v.shape)} and {v.dtype}"
        )
    v_bias = _vector(v_bias, "v_bias", p, wide)
    bm, bn, bk, warps = LINEAR_TILES[v.dtype.itemsize]
    column_tiles = triton.cdiv(p, bn)
    partial = b.new_empty((column_tiles, n), dtype=wide)
    if partial.numel():
        launch(
            contraction.linear_kernel, triton.cdiv(n, bm) * column_tiles, b, a, b, v, v_bias, partial, n, a.shape[1],
            p, a.stride(0), b.stride(0), *v.stride(), SAME=v.dtype == b.dtype,
            PRECISION="tf32x3" if v.dtype == torch.float32 else "ieee", BM=bm, BN=bn, BK=bk, GROUP=8, warps=warps,
        )  # fmt: skip
    return _sum_by_sample(partial, sample, samples)


def embedding_contraction(index: Tensor, b: Tensor, v: Tensor, sample: Tensor | None, samples: int) -> Tensor:
    (n, width), wide = b.shape, accumulate_dtype(b.dtype)
    if index.shape != (n,) or index.dtype != torch.int64:
        raise ValueError(f"synkern: index must be int64 of shape ({n},), got {tuple(index.shape)} and {index.dtype}")
    b, v = _matrix(b), _rows_matrix(v, "v", v.shape[0], b.dtype)
    if v.shape[1] != width:
        raise ValueError(f"synkern: v must have shape (entries, {width}), got {tuple(v.shape)}")
    partial = b.new_empty((1, n), dtype=wide)
    tile = row_tile(n, width, 2 * wide.itemsize, False)
    if n:
        launch(
            contraction.embedding_kernel, triton.cdiv(n, tile.rows), b, index.contiguous(), b, v, partial, n, width,
            v.shape[0], b.stride(0), v.stride(0), **tile.options,
        )  # fmt: skip
    return _sum_by_sample(partial, sample, samples)


def norm_contraction(
    x: Tensor, b: Tensor, mean: Tensor | None, rstd: Tensor, v_weight: Tensor | None, v_bias: Tensor | None,
    sample: Tensor | None, samples: int,
) -> Tensor:
    (n, width), wide = b.shape, accumulate_dtype(b.dtype)
    x, b = _rows_matrix(x, "x", n, b.dtype), _matrix(b)
    if x.shape != b.shape:
        raise ValueError(f"synkern: x and b must have the same shape, got {tuple(x.shape)} and {tuple(b.shape)}")
    mean, rstd = _vector(mean, "mean", n, wide), _vector(rstd, "rstd", n, wide)
    v_weight, v_bias = _vector(v_weight, "v_weight", width, wide), _vector(v_bias, "v_bias", width, wide)
    partial = b.new_empty((1, n), dtype=wide)
    tile = row_tile(n, width, 2 * wide.itemsize, False)
    if n:
        launch(
            contraction.norm_kernel, triton.cdiv(n, tile.rows), b, x, b, mean, rstd, v_weight, v_bias, partial, n,
            width, x.stride(0), b.stride(0), **tile.options,
        )  # fmt: skip
    return _sum_by_sample(partial, sample, samples)


OPERATORS = {
    f.__name__: f
    for f in (
        row_loss, row_loss_and_gradient, row_loss_rescale, row_loss_backward, row_loss_tangent, row_loss_hvp,
        linear_contraction, embedding_contraction, norm_contraction,
    )
}  # fmt: skip
