"""What a linear map's backward has to make out of its input a and the gradient b at its output: shares and gradients.

Rows of a and b are the tokens of all samples, in n equal groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (the operators must exist before they are looked up)

Gradients = tuple[Tensor | None, ...]
_ops = torch.ops.synkern

_FEWEST_ROWS = 48  # a sample, below which reading a sample's gradient costs more than a second matrix product
_LEAST_WORK = 1 << 20  # multiply-adds a sample, below which the calls cost more
_LEAST_DEAD = 0.125  # share of the rows; to find and to copy the others takes 5 % of a product of width 384


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def live_rows(b: Tensor, work: int) -> Tensor | None:
    """Numbers of the rows of b (R, P) that are not all zero, or None if leaving the others out does not pay.

    Padding has no gradient, nor in the last layer of a model that classifies by its first token have the other tokens:
    of the products of a BERT with 23 % of padding a third falls away. On the CPU, where to know how many there are
    stops nothing.

    Args:
        b: the gradient at the output of a linear map.
        work: multiply-adds of one product with b.
    """
    if not b.is_cpu or work < _LEAST_WORK:
        return None
    live = b[:, 0] != 0  # one column settles it for dense batches
    unsettled = live.logical_not().nonzero().squeeze(1)
    if len(unsettled) < _LEAST_DEAD * len(b):
        return None
    live[unsettled] = b.index_select(0, unsettled).any(1)
    kept = live.nonzero().squeeze(1)
    return kept if 0 < len(kept) <= (1 - _LEAST_DEAD) * len(b) else None


def linear_share(a: Tensor, b: Tensor, v: Tensor | None, v_bias: Tensor | None, n: int) -> Tensor:
    """sum over rows r of each sample of <b_r, V a_r + v_bias>; a (R, K), b (R, P), v (P, K) -> (n,)."""
    if v is not None:
        return _ops.linear_contraction(a, b, v, v_bias, None, n)  # type: ignore[no-any-return]
    assert v_bias is not None  # contributions are asked for only where there is a direction
    return b.view(n, -1, b.shape[1]).sum(1, dtype=wide(b.dtype)) @ v_bias


def linear_gradients(
    a: Tensor,
    b: Tensor,
    needs: tuple[bool, ...],
    row_weight: Tensor | None,
    transposed: bool = False,
    live: Tensor | None = None,
) -> Gradients:
    """Gradients of weight (P, K), or (K, P) if ``transposed``, and bias (P,), from a (R, K) and b (R, P).

    Args:
        row_weight: of each sample, (n,); None for ones.
        live: what :func:`live_rows` found.
    """
    bias = bias_gradient(b, row_weight) if needs[1] else None
    if not needs[0]:
        return None, bias
    weight = None if row_weight is None else row_weight.repeat_interleave(len(b) // len(row_weight))
    kept = _weighted_rows(weight, live)
    if kept is not None:
        a, b, weight = a.index_select(0, kept), b.index_select(0, kept), weight if weight is None else weight[kept]
    if weight is not None and a.shape[1] < b.shape[1]:  # the narrower one is cheaper to scale
        a = (a * weight.unsqueeze(1)).to(a.dtype)
    elif weight is not None:
        b = (b * weight.unsqueeze(1)).to(b.dtype)
    return (a.t().mm(b) if transposed else b.t().mm(a)), bias


def _weighted_rows(weight: Tensor | None, live: Tensor | None) -> Tensor | None:
    """Of the rows those whose weight (R,) is not zero, often half of them when weights are learned, on the CPU."""
    if weight is None or not weight.is_cpu:
        return live
    weighted = weight != 0
    kept = weighted.nonzero().squeeze(1) if live is None else live[weighted[live]]
    return kept if 0 < len(kept) <= 0.75 * len(weight) else live


def bias_gradient(b: Tensor, row_weight: Tensor | None) -> Tensor:
    """sum over rows of b (R, P), each sample's times its weight."""
    if row_weight is None:
        return b.sum(0, dtype=wide(b.dtype))
    if b.dtype == wide(b.dtype):  # reads b once, as fast as memory
        return row_weight.to(b.dtype).repeat_interleave(len(b) // len(row_weight)) @ b
    by_sample = b.view(len(row_weight), -1, b.shape[1]).sum(1, dtype=wide(b.dtype))
    return row_weight.to(by_sample.dtype) @ by_sample


def by_sample_pays(a: Tensor, b: Tensor, v: Tensor, n: int, live: Tensor | None) -> bool:
    """Whether shares are cheapest taken from each sample's gradient on its way into the sum, where a backward makes
    that anyway: on the CPU, where the gradient of one sample stays in cache."""
    rows = len(a if live is None else live) // n
    exact = a.is_cpu and a.dtype in (torch.float32, torch.float64) and a.dtype == b.dtype == v.dtype
    return exact and rows >= _FEWEST_ROWS and rows * a.shape[1] * b.shape[1] >= _LEAST_WORK


def gradient_by_sample(
    a: Tensor, b: Tensor, v: Tensor, n: int, row_weight: Tensor | None, live: Tensor | None
) -> tuple[Tensor, Tensor]:
    """sum_i w_i g_i and <v, g_i> (n,), of each sample's gradient g_i = b_i^T a_i of a weight (P, K), one by one."""
    rows = len(b) // n
    parts = None if live is None else live.split((live // rows).bincount(minlength=n).tolist())
    weights = [1.0] * n if row_weight is None else row_weight.tolist()
    total, gradient, shares = torch.zeros_like(v), torch.empty_like(v), torch.zeros(n, dtype=v.dtype)
    flat, direction = gradient.view(-1), v.reshape(-1)
    for i, weight in enumerate(weights):
        if parts is None:
            its_a, its_b = a[i * rows : (i + 1) * rows], b[i * rows : (i + 1) * rows]
        else:
            its_a, its_b = a.index_select(0, parts[i]), b.index_select(0, parts[i])
        if len(its_b):
            torch.mm(its_b.t(), its_a, out=gradient)
            torch.dot(flat, direction, out=shares[i])
            if weight:
                total.add_(gradient, alpha=weight)
    return total, shares


class LinearMap:
    """A linear map y = W x + bias of a captured layer, in its backward.

    Args:
        layer: the :class:`~synkern.meta.rules.Layer` it belongs to.
        a: its input (R, K).
        b: the gradient at its output (R, P).
        direction: v (P, K) of the weight and v (P,) of the bias, None where they are zero.
        needs: whether weight and bias want a gradient.
        transposed: the weight, and so v, is stored as (K, P).
        live: what :func:`live_rows` found of b.
    """

    def __init__(
        self, layer: Any, a: Tensor, b: Tensor, direction: Gradients, needs: tuple[bool, ...], *,
        transposed: bool = False, live: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.a, self.b, self.direction, self.needs = layer, a, b, direction, needs
        self.transposed, self.live = transposed, live
        self._weight_gradient: Tensor | None = None

    @property
    def has_direction(self) -> bool:
        """Whether its share may be other than zero."""
        return any(v is not None for v in self.direction)

    def share(self, n: int) -> Tensor:
        """Its share of the scores (n,)."""
        run = self.layer.engine.run
        v, v_bias = self.direction
        # <b, V^T a> = <a, V b>: a transposed v is read as it lies
        left, right = (self.b, self.a) if self.transposed else (self.a, self.b)
        at_once = run.wants_gradients and run.deferred is None and self.needs[0]
        if v is not None and at_once and by_sample_pays(left, right, v, n, self.live):
            self._weight_gradient, share = gradient_by_sample(left, right, v, n, run.row_weight, self.live)
        elif v is not None and self.transposed:
            share = linear_share(left, right, v, None, n)
        else:
            return linear_share(self.a, self.b, v, v_bias, n)
        return share if v_bias is None else share + linear_share(self.a, self.b, None, v_bias, n)

    def gradients(self, row_weight: Tensor | None) -> Gradients:
        """Gradients of weight and bias, of samples with weights (n,); after :meth:`share`, if that is called at all."""
        if self._weight_gradient is None:
            return linear_gradients(self.a, self.b, self.needs, row_weight, self.transposed, self.live)
        return self._weight_gradient, bias_gradient(self.b, row_weight) if self.needs[1] else None
