"""The derivatives of the row-loss operators, wired once, for every backend.

Each operator has a Python kernel at the Autograd dispatch key that runs a single-level ``Function`` whose backward and
jvp call operators again (backward, tangent, hvp), registered the same way. So every derivative up to the second runs in
kernels and passes through ``torch.func``, forward mode, ``torch.compile`` and export. ``register_autograd`` and
``custom_op`` give a zero tangent under ``torch.func.jvp`` without an error, which is why they are not used.

This is the only file that leans on private names of torch; it refuses to import where one is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library
from torch.autograd import forward_ad

from . import _abstract, _triton
from ._schema import DENOMINATOR_ROW, MEAN, NONE, RATIO_ROW, LossKind, accumulate_dtype

_C = torch._C

try:
    from torch._C._functorch import TransformType as _TransformType
    from torch._C._functorch import get_interpreter_stack as _interpreter_stack
    from torch._C._functorch import get_single_level_autograd_function_allowed as _single_level_allowed
    from torch._C._functorch import is_legacy_batchedtensor as _is_batched  # autograd.grad(is_grads_batched=True)
    from torch._C._functorch import set_single_level_autograd_function_allowed as _allow_single_level
    from torch.autograd.function import _SingleLevelFunction

    _below_autograd = _C._AutoDispatchBelowAutograd
    _any_requires_grad = _C._any_requires_grad
    _functorch_active = _C._are_functorch_transforms_active
    _dispatch_modes = _C._len_torch_dispatch_stack
    _forward_grad_enabled = _C._is_fwd_grad_enabled
    _set_forward_grad_enabled = _C._set_fwd_grad_enabled
    _set_grad_enabled = _C._set_grad_enabled
    _ = forward_ad._current_level
except (ImportError, AttributeError) as error:  # wrong derivatives would be worse than none
    raise ImportError(
        f"synkern: torch {torch.__version__} lacks a name its derivatives are wired with ({error}); "
        "use torch 2.11 to 2.15, or a newer synkern"
    ) from error


class _Below:
    """Runs an operator below this level's Autograd key while outer torch.func levels go on recording.

    Grad modes are switched on again inside: without that, nested transforms are silently wrong.
    """

    def __enter__(self) -> None:
        self.guard = _below_autograd()
        self.grad, self.forward_grad = torch.is_grad_enabled(), _forward_grad_enabled()
        self.guard.__enter__()
        _set_grad_enabled(True)
        _set_forward_grad_enabled(True)

    def __exit__(self, *exception: object) -> None:
        _set_forward_grad_enabled(self.forward_grad)
        _set_grad_enabled(self.grad)
        self.guard.__exit__(*exception)


class _ForwardGrad:
    """Switches forward mode on inside a jvp, where torch switches it off: an outer jvp would get a zero tangent."""

    def __enter__(self) -> None:
        self.enabled = _forward_grad_enabled()
        _set_forward_grad_enabled(True)

    def __exit__(self, *exception: object) -> None:
        _set_forward_grad_enabled(self.enabled)


def _primals(ctx: Any) -> list[Tensor | None]:
    """The saved tensors without this level's tangents, which are passed to jvp beside them."""
    return [None if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]


def _jvp_levels() -> int:
    return sum(interpreter.key() == _TransformType.Jvp for interpreter in _interpreter_stack() or ())


def _nested(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """A jvp that outer forward-mode levels can differentiate."""

    def wrapper(ctx: Any, *tangents: Any) -> Any:
        if _jvp_levels() < 2:
            return jvp(ctx, ctx.saved_tensors, *tangents)
        primals = _primals(ctx)
        with _ForwardGrad():
            return jvp(ctx, primals, *tangents)

    return wrapper


def _requires_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _tracked(x: Tensor | None) -> bool:
    """Whether a derivative with respect to x is being recorded at this level."""
    if x is None:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _times(coefficient: Tensor | None, x: Tensor) -> Tensor:
    """coefficient * x, exactly zero where the coefficient is, also beside infinities."""
    if coefficient is None:
        return x
    return torch.where(coefficient == 0, torch.zeros_like(x), coefficient * x)


def _sum_of(*terms: Tensor | None) -> Tensor | None:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _per_row(grad: Tensor, statistics: Tensor, reduction: int) -> Tensor:
    return grad if reduction == NONE else grad / statistics[DENOMINATOR_ROW]


def _reduce(losses: Tensor, statistics: Tensor, reduction: int) -> Tensor:
    return losses if reduction == NONE else (losses / statistics[DENOMINATOR_ROW]).sum()


class Operators:
    """The row-loss operators of one namespace, looked up once: they are called in every training step."""

    def __init__(self, namespace: str) -> None:
        packets = getattr(torch.ops, namespace)
        self.namespace = namespace
        self.loss = packets.row_loss.default
        self.loss_and_gradient = packets.row_loss_and_gradient.default
        self.rescale = packets.row_loss_rescale.default
        self.backward = packets.row_loss_backward.default
        self.tangent = packets.row_loss_tangent.default
        self.hvp = packets.row_loss_hvp.default


def _bound(function: Any, operators: Operators) -> Any:
    """The ``Function`` for one namespace; what it records calls the operators of that namespace again."""
    return type(function)(function.__name__, (function,), {"operators": operators})


def _operators(ctx: Any) -> Operators:
    return ctx._forward_cls.operators


class _RowLoss(_SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, ratio: Tensor | None,
        class_weight: Tensor | None, *options: Any,
    ) -> tuple[Tensor, Tensor]:
        with _Below():
            loss, statistics = _operators(ctx).loss(logits, target, weight, ratio, class_weight, *options)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        saved = (logits, target, weight, ratio, class_weight, statistics)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.options = options
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        ops, padding = _operators(ctx), (None,) * (2 + len(ctx.options))
        if grad is None:
            return None, None, None, *padding
        logits, target, weight, ratio, class_weight, statistics = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:  # weight alone: its gradient needs no (N, C) array
            options, reduction = ctx.options[:-1], ctx.options[-1]
            losses = ops.loss(logits, target, None, ratio, class_weight, *options, NONE)[0]
            return None, None, _per_row(grad, statistics, reduction) * losses, *padding
        grad_logits, grad_weight = ops.backward(grad, *ctx.saved_tensors, *ctx.options)
        return grad_logits, None, None if weight is None else grad_weight, *padding

    @staticmethod
    @_nested
    def jvp(
        ctx: Any, saved: Any, logits_t: Tensor | None, _target: None, weight_t: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        logits, target, weight, ratio, class_weight, statistics = saved
        ops, options, reduction = _operators(ctx), ctx.options[:-1], ctx.options[-1]
        along = from_weight = None
        if logits_t is not None:
            along = ops.tangent(
                logits_t, weight, logits, target, ratio, class_weight, statistics, *options
            )
        if weight_t is not None:
            losses = ops.loss(logits, target, None, ratio, class_weight, *options, NONE)[0]
            from_weight = weight_t * losses
        tangent = _sum_of(along, from_weight)
        return None if tangent is None else _reduce(tangent, statistics, reduction), None


class _RowLossBackward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        with _Below():
            outputs = _operators(ctx).backward(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:7])
        ctx.save_for_forward(*args[:7])
        ctx.options = args[7:]
        return outputs

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, s: Tensor | None) -> tuple[Tensor | None, ...]:
        """u and s are the cotangents of the gradients with respect to logits and weight."""
        grad, logits, target, weight, ratio, class_weight, statistics = ctx.saved_tensors
        ops, options, reduction = _operators(ctx), ctx.options[:-1], ctx.options[-1]
        padding = (None,) * (4 + len(ctx.options))
        if weight is None:
            s = None
        if u is None and s is None:
            return None, None, None, None, *padding[1:]
        row_grad = _per_row(grad, statistics, reduction)
        shared = (logits, target, ratio, class_weight, statistics, *options)
        extra = None if s is None else s * row_grad
        along = losses = None
        if u is None:
            assert extra is not None
            grad_logits = _unweighted_gradient(ops, extra, *shared)
        else:
            coefficient = row_grad if weight is None else row_grad * weight
            grad_logits, along = ops.hvp(u, coefficient.contiguous(), extra, *shared)
        if s is not None:
            losses = s * ops.loss(logits, target, None, ratio, class_weight, *options, NONE)[0]
        grad_rows = _sum_of(None if along is None else _times(weight, along), losses)
        grad_grad = None if grad_rows is None else _reduce(grad_rows, statistics, reduction)
        grad_weight = None if weight is None or along is None else row_grad * along
        return grad_grad, grad_logits, None, grad_weight, *padding[1:]

    @staticmethod
    @_nested
    def jvp(
        ctx: Any, saved: Any, grad_t: Tensor | None, logits_t: Tensor | None, _target: None, weight_t: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor, Tensor]:
        grad, logits, target, weight, ratio, class_weight, statistics = saved
        ops, options, reduction = _operators(ctx), ctx.options[:-1], ctx.options[-1]
        row_grad = _per_row(grad, statistics, reduction)
        row_grad_t = None if grad_t is None else _per_row(grad_t, statistics, reduction)
        shared = (logits, target, ratio, class_weight, statistics, *options)
        extra = _sum_of(
            row_grad_t if row_grad_t is None or weight is None else row_grad_t * weight,
            None if weight_t is None else row_grad * weight_t,
        )
        along = None
        if logits_t is not None:
            coefficient = row_grad if weight is None else row_grad * weight
            gradient_t, along = ops.hvp(logits_t, coefficient.contiguous(), extra, *shared)
        else:
            assert extra is not None  # a jvp is only asked for where something has a tangent
            gradient_t = _unweighted_gradient(ops, extra, *shared)
        losses = None
        if weight is not None and row_grad_t is not None:
            losses = row_grad_t * ops.loss(logits, target, None, ratio, class_weight, *options, NONE)[0]
        weight_gradient_t = _sum_of(losses, None if weight is None or along is None else row_grad * along)
        if weight_gradient_t is None:  # torch takes no None for an output that is differentiable
            weight_gradient_t = statistics.new_zeros(0 if weight is None else weight.shape[0])
        return gradient_t, weight_gradient_t


def _unweighted_gradient(
    ops: Operators, row_grad: Tensor, logits: Tensor, target: Tensor, ratio: Tensor | None,
    class_weight: Tensor | None, statistics: Tensor, *options: Any,
) -> Tensor:
    return ops.backward(
        row_grad.contiguous(), logits, target, None, ratio, class_weight, statistics, *options, NONE
    )[0]


class _RowLossTangent(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with _Below():
            output = _operators(ctx).tangent(*args)
        ctx.save_for_backward(*args[:7])
        ctx.save_for_forward(*args[:7])
        ctx.options = args[7:]
        return output

    @staticmethod
    def backward(ctx: Any, s: Tensor) -> tuple[Tensor | None, ...]:
        v, coefficient, logits, target, ratio, class_weight, statistics = ctx.saved_tensors
        ops = _operators(ctx)
        shared = (logits, target, ratio, class_weight, statistics, *ctx.options)
        scaled = s if coefficient is None else s * coefficient
        grad_logits, along = ops.hvp(v, scaled.contiguous(), None, *shared)
        grad_v = _unweighted_gradient(ops, scaled, *shared) if ctx.needs_input_grad[0] else None
        grad_coefficient = None if coefficient is None else s * along
        return grad_v, grad_coefficient, grad_logits, *(None,) * (4 + len(ctx.options))

    @staticmethod
    @_nested
    def jvp(
        ctx: Any, saved: Any, v_t: Tensor | None, coefficient_t: Tensor | None, logits_t: Tensor | None, *_: Any
    ) -> Any:
        v, coefficient, logits, target, ratio, class_weight, statistics = saved
        ops = _operators(ctx)
        shared = (logits, target, ratio, class_weight, statistics, *ctx.options)
        terms = []
        if v_t is not None:
            terms.append(ops.tangent(v_t, coefficient, *shared))
        if coefficient_t is not None:
            terms.append(ops.tangent(v, coefficient_t, *shared))
        if logits_t is not None:
            ones = torch.ones_like(statistics[0]) if coefficient is None else coefficient
            curved = ops.hvp(v, ones.contiguous(), None, *shared)[0]
            terms.append((curved * logits_t).sum(-1, dtype=statistics.dtype))
        return _sum_of(*terms)


_THIRD = (
    "synkern: derivatives of a row loss beyond the second are not implemented; "
    "synkern.reference holds every loss in plain torch, differentiable to any order"
)


class _RowLossHvp(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        with _Below():
            return _operators(ctx).hvp(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(_THIRD)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(_THIRD)


def _composed(
    ops: Operators, logits: Tensor, target: Tensor, weight: Tensor | None, ratio: Tensor | None,
    class_weight: Tensor | None, loss: int, p0: float, p1: float, p2: float, label_smoothing: float, z_loss: float,
    ignore_index: int, reduction: int,
) -> tuple[Tensor, Tensor]:
    """The operator where ratio or class_weight are differentiated too: the kernels give t, the rest is (N,) torch.

    Rare enough (learned checkers, learned class weights) that the kernels stay linear in one weight.
    """
    kept = target != ignore_index
    kind = (LossKind.CROSS_ENTROPY, 0.0, 0.0, 0.0) if ratio is not None else (loss, p0, p1, p2)
    losses, statistics = ops.loss(logits, target, None, None, None, *kind, 0.0, 0.0, ignore_index, NONE)
    # Masked before every product: where() alone would send 0 * inf back through the branch it did not take.
    excluded = _excluded(losses, kept, weight)
    losses = losses.masked_fill(excluded, 0)
    weights = torch.ones_like(losses)
    if ratio is not None:
        losses, weights = _differentiable_ratio(loss, losses, ratio, p0, bool(p1), bool(p2))
    row_class_weight = kept.to(losses.dtype)
    if class_weight is not None:
        row_class_weight = class_weight[target.long().masked_fill(~kept, 0)].masked_fill(~kept, 0)
        losses = _times(row_class_weight * (1.0 - label_smoothing), losses)
    if label_smoothing or z_loss:
        losses = losses + _smoothing_terms(logits, class_weight, label_smoothing, z_loss, excluded)
    losses = _times(weight, losses.masked_fill(_excluded(losses, kept, weight), 0))
    if reduction != NONE:
        losses = losses.sum() / row_class_weight.sum() if reduction == MEAN else losses.sum()
    # Nobody differentiates through these statistics: the caller reads the weights from them and nothing else.
    weights = weights.detach().masked_fill(~kept, 0)[None]
    rows = [statistics[:RATIO_ROW], weights, statistics[RATIO_ROW + 1 :]]
    return losses, torch.cat(rows).detach()


def _differentiable_ratio(
    loss: int, cross_entropy: Tensor, ratio: Tensor, max_weight: float, is_log: bool, detach_weight: bool
) -> tuple[Tensor, Tensor]:
    if loss == LossKind.DIMP:
        inverse = cross_entropy.detach() if detach_weight else cross_entropy  # -log p
        weights = (ratio + inverse).exp() if is_log else _times(ratio, inverse.exp())
    else:
        weights = ratio.exp() if is_log else ratio
    weights = weights.clamp(max=max_weight)
    return _times(weights, cross_entropy), weights


def _excluded(losses: Tensor, kept: Tensor, weight: Tensor | None) -> Tensor:
    """Rows that must add exactly zero and would not: ignored ones, and those of weight zero whose loss is infinite."""
    return ~kept if weight is None else ~kept | ((weight == 0) & ~losses.isfinite())


def _smoothing_terms(
    logits: Tensor, class_weight: Tensor | None, label_smoothing: float, z_loss: float, excluded: Tensor
) -> Tensor:
    wide = logits.to(accumulate_dtype(logits.dtype)).masked_fill(excluded[:, None], 0)
    lse = wide.logsumexp(-1)
    total: Tensor = z_loss * lse * lse
    if label_smoothing and class_weight is not None:
        total = total + label_smoothing / logits.shape[1] * (class_weight.sum() * lse - wide @ class_weight)
    return total


def _apply(function: Any, args: tuple[Any, ...]) -> Any:
    previous = _single_level_allowed()
    _allow_single_level(True)
    try:
        return function.apply(*args)
    finally:
        _allow_single_level(previous)


def _register(
    library: torch_library.Library, name: str, operator: Any, function: Any, composed: Callable[..., Any] | None = None
) -> None:
    def kernel(*args: Any) -> Any:
        if (
            (torch.is_grad_enabled() and _any_requires_grad(*args))
            or forward_ad._current_level >= 0
            or _functorch_active()
        ):
            if composed is not None and (_tracked(args[3]) or _tracked(args[4])):
                return composed(*args)
            return _apply(function, args)
        with _below_autograd():
            return operator(*args)

    library.impl(name, kernel, "Autograd")


def _transformed() -> bool:
    """Whether forward mode, torch.func or a tracer watches the operators called."""
    return forward_ad._current_level >= 0 or _functorch_active() or _dispatch_modes() > 0


class _PlainRowLoss(_SingleLevelFunction):
    """``_RowLoss`` for a training step: reverse mode alone, and the loss as the only output.

    A reduced loss takes its gradient in the forward pass, where the logits are in cache or on chip: they are read once
    and one exponential an element is taken instead of two. The peak is the same, one (N, C) array beside the logits.
    Only what is differentiated is an argument of its own: every other one costs the engine half a microsecond.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor | None, constants: tuple[Any, ...]) -> Tensor:
        ops, target, ratio, class_weight, ctx.options = constants
        arguments = (logits, target, weight, ratio, class_weight, *ctx.options)
        ctx.gradients = None
        with _below_autograd():
            if ctx.options[-1] == NONE or not ctx.needs_input_grad[0]:
                loss, statistics = ops.loss(*arguments)
            else:
                loss, statistics, *ctx.gradients = ops.loss_and_gradient(*arguments)
        ctx.save_for_backward(logits, target, weight, ratio, class_weight, statistics)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or not ctx.needs_input_grad[0] or _transformed() or _is_batched(grad):
            grads = _RowLoss.backward(ctx, grad)
            return grads[0], grads[2], None
        # Handed over, not shared: a leaf then keeps the array as its .grad. A second backward makes it again.
        gradients, ctx.gradients = ctx.gradients, None
        saved = ctx.saved_tensors  # asked for even where unused: it raises if one was changed in place since
        # A number on a device stays there: its kernel looks whether there is anything to do.
        if gradients is None or type(grad) is not Tensor or not grad.is_cpu or grad.item() != 1.0:
            ops = _operators(ctx)
            with _below_autograd():
                if gradients is None:
                    gradients = ops.backward(grad, *saved, *ctx.options)
                else:
                    ops.rescale(grad, *gradients, *saved, *ctx.options[:-1])
        grad_logits, grad_weight = gradients
        return grad_logits, grad_weight if ctx.needs_input_grad[1] else None, None


def _row_loss(operators: Operators) -> Callable[..., Tensor]:
    plain = _bound(_PlainRowLoss, operators).apply

    def row_loss(
        logits: Tensor, target: Tensor, weight: Tensor | None, ratio: Tensor | None, class_weight: Tensor | None,
        *options: Any,
    ) -> Tensor:
        if torch.compiler.is_compiling() or _transformed():
            return operators.loss(logits, target, weight, ratio, class_weight, *options)[0]
        if torch.is_grad_enabled():
            if _requires_grad(ratio) or _requires_grad(class_weight):
                return _composed(operators, logits, target, weight, ratio, class_weight, *options)[0]
            if logits.requires_grad or _requires_grad(weight):
                return plain(logits, weight, (operators, target, ratio, class_weight, options))
        with _below_autograd():
            return operators.loss(logits, target, weight, ratio, class_weight, *options)[0]

    return row_loss


class Wiring:
    """The differentiable losses of one namespace, registered as long as the object lives.

    Attributes:
        operator: ``row_loss``: the loss and its statistics.
        row_loss: the loss alone, with the operator's arguments. A small batch is all overhead, so the plain training
            step (reverse mode, no transform, no compiler) skips the dispatcher's way to the Autograd key, about 7 us a
            call.
    """

    def __init__(self, namespace: str) -> None:
        ops = Operators(namespace)
        self._library = torch_library.Library(namespace, "IMPL")
        _register(self._library, "row_loss", ops.loss, _bound(_RowLoss, ops), functools.partial(_composed, ops))
        _register(self._library, "row_loss_backward", ops.backward, _bound(_RowLossBackward, ops))
        _register(self._library, "row_loss_tangent", ops.tangent, _bound(_RowLossTangent, ops))
        _register(self._library, "row_loss_hvp", ops.hvp, _bound(_RowLossHvp, ops))
        _abstract.register(self._library, namespace)
        self.operator = ops.loss
        self.row_loss = _row_loss(ops)


WIRINGS = {namespace: Wiring(namespace) for namespace in ("synkern", _triton.NAMESPACE)}
_abstract.register_native(WIRINGS["synkern"]._library)
