"""Shapes of the operators' outputs for fake and meta tensors, and their batching rules for ``torch.func.vmap``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

from . import _library  # noqa: F401  (the operators must exist before they are looked up)
from ._schema import DENOMINATOR_ROW, MEAN, NONE, STATISTICS_ROWS, accumulate_dtype


def _row_loss(logits: Tensor, target: Tensor, weight: Any, ratio: Any, class_weight: Any, *options: Any) -> Any:
    dtype, rows = accumulate_dtype(logits.dtype), logits.shape[0]
    loss = logits.new_empty((rows,) if options[-1] == NONE else (), dtype=dtype)
    return loss, logits.new_empty((STATISTICS_ROWS, rows), dtype=dtype)


def _row_loss_backward(grad: Tensor, logits: Tensor, target: Tensor, weight: Any, *_: Any) -> tuple[Tensor, Tensor]:
    rows = 0 if weight is None else logits.shape[0]
    return logits.new_empty(logits.shape), logits.new_empty((rows,), dtype=accumulate_dtype(logits.dtype))


def _row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Any, ratio: Any, class_weight: Any, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, statistics = _row_loss(logits, target, weight, ratio, class_weight, *options)
    return loss, statistics, *_row_loss_backward(loss, logits, target, weight)


def _row_loss_rescale(*_: Any) -> None:
    return None


def _row_loss_tangent(v: Tensor, coefficient: Any, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=accumulate_dtype(logits.dtype))


def _row_loss_hvp(v: Tensor, coefficient: Any, extra: Any, logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty((logits.shape[0],), dtype=accumulate_dtype(logits.dtype))


def _front(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The operand with the batch in front, expanded where it has none."""
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Batch and rows as one dimension: every kernel works row by row."""
    front = _front(x, dim, size)
    return None if front is None else front.reshape(-1, *front.shape[2:])


def _fold_statistics(x: Tensor, dim: int | None, size: int) -> Tensor:
    front = _front(x, dim, size)
    assert front is not None
    return front.movedim(0, 1).reshape(front.shape[1], -1)


def _loop(operator: Any, size: int, in_dims: Any, args: Any) -> Any:
    """One call a sample, for batched class weights, which no single call can hold."""
    samples = []
    for i in range(size):
        samples.append(operator(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))))
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0,) * len(samples[0])


def _kept_weight(target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    kept = target != ignore_index
    if class_weight is None:
        return kept.sum(-1).to(dtype)
    return class_weight[target.long().masked_fill(~kept, 0)].masked_fill(~kept, 0).sum(-1)


def _vmap_row_loss(operator: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    size, (logits, target, weight, ratio, class_weight), options = info.batch_size, args[:5], args[5:]
    if in_dims[4] is not None:
        return _loop(operator, size, in_dims, args)
    rows = [_fold(x, d, size) for x, d in zip((logits, target, weight, ratio), in_dims, strict=False)]
    losses, statistics = operator(*rows, class_weight, *options[:-1], NONE)
    losses, statistics = losses.reshape(size, -1), statistics.reshape(statistics.shape[0], size, -1)
    if options[-1] == MEAN:
        front = _front(target, in_dims[1], size)
        assert front is not None
        denominator = _kept_weight(front, class_weight, options[-2], losses.dtype)[:, None]
        losses = losses / denominator
        statistics = torch.cat([statistics[:DENOMINATOR_ROW], denominator.expand(losses.shape)[None]])
    if options[-1] != NONE:
        losses = losses.sum(-1)
    return (losses, statistics), (0, 1)


def _vmap_row_loss_backward(operator: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    size, options = info.batch_size, args[7:]
    grad, logits, target, weight, ratio, class_weight, statistics = args[:7]
    if in_dims[5] is not None:
        return _loop(operator, size, in_dims, args)
    rows = [_fold(x, d, size) for x, d in zip((logits, target, weight, ratio), in_dims[1:5], strict=True)]
    statistics = _fold_statistics(statistics, in_dims[6], size)
    row_grad = _front(grad, in_dims[0], size)
    assert row_grad is not None
    if options[-1] != NONE:
        row_grad = row_grad[:, None] / statistics[DENOMINATOR_ROW].reshape(size, -1)
    grad_logits, grad_weight = operator(
        row_grad.reshape(-1), *rows, class_weight, statistics, *options[:-1], NONE
    )
    return (grad_logits.reshape(size, -1, grad_logits.shape[-1]), grad_weight.reshape(size, -1)), (0, 0)


def _vmap_row_loss_tangent(operator: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    size, options = info.batch_size, args[7:]
    if in_dims[5] is not None:
        return _loop(operator, size, in_dims, args)
    rows = [_fold(x, d, size) for x, d in zip(args[:5], in_dims, strict=False)]
    result = operator(*rows, args[5], _fold_statistics(args[6], in_dims[6], size), *options)
    return result.reshape(size, -1), 0


def _vmap_row_loss_hvp(operator: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    size, options = info.batch_size, args[8:]
    if in_dims[6] is not None:
        return _loop(operator, size, in_dims, args)
    rows = [_fold(x, d, size) for x, d in zip(args[:6], in_dims, strict=False)]
    hvp, along = operator(*rows, args[6], _fold_statistics(args[7], in_dims[7], size), *options)
    return (hvp.reshape(size, -1, hvp.shape[-1]), along.reshape(size, -1)), (0, 0)


def _contraction(*args: Any) -> Tensor:
    """(..., b or v, ..., samples): the last argument is an int, and all matrices share an accumulation type."""
    matrix = next(x for x in args if isinstance(x, Tensor) and x.is_floating_point())
    return matrix.new_empty((args[-1],), dtype=accumulate_dtype(matrix.dtype))


def _lstm(projection: Tensor, w_hh: Tensor, first: Tensor, first_cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    samples, steps, width = projection.shape
    return (
        torch.empty_like(projection, memory_format=torch.contiguous_format),
        projection.new_empty(samples, steps + 1, width // 4),
        projection.new_empty(samples, steps, width // 4),
    )


def _lstm_backward(gates: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    first = gates.new_empty(gates.shape[0], gates.shape[2] // 4)
    return torch.empty_like(gates, memory_format=torch.contiguous_format), first, torch.empty_like(first)


def register_native(library: torch_library.Library) -> None:
    """Registers the fake kernels of the operators that the compiled library alone has."""
    torch_library.register_fake("synkern::lstm", _lstm, lib=library)
    torch_library.register_fake("synkern::lstm_backward", _lstm_backward, lib=library)


def register(library: torch_library.Library, namespace: str) -> None:
    """Registers the fake kernels of every operator, and the batching rules of those that transforms meet."""
    for name, fake, batched in (
        ("row_loss_and_gradient", _row_loss_and_gradient, None),
        ("row_loss_rescale", _row_loss_rescale, None),
        ("row_loss", _row_loss, _vmap_row_loss),
        ("row_loss_backward", _row_loss_backward, _vmap_row_loss_backward),
        ("row_loss_tangent", _row_loss_tangent, _vmap_row_loss_tangent),
        ("row_loss_hvp", _row_loss_hvp, _vmap_row_loss_hvp),
        ("linear_contraction", _contraction, None),
        ("embedding_contraction", _contraction, None),
        ("norm_contraction", _contraction, None),
    ):
        qualified = f"{namespace}::{name}"
        torch_library.register_fake(qualified, fake, lib=library)
        if batched is not None:
            operator = getattr(getattr(torch.ops, namespace), name).default
            torch_library.register_vmap(qualified, partial(batched, operator), lib=library)
