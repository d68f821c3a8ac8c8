"""Scores in one forward pass that carries a tangent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .context import (
    MethodUnavailable,
    PerSampleLoss,
    describe_module,
    differentiable_kernels,
    per_sample_losses,
)

_NO_FORMULA = ("does not support", "is not implemented", "not been implemented")


def forward_scores(
    model: nn.Module, per_sample_loss: PerSampleLoss, batch: Any, direction: Mapping[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """s_i = d/de l_i(theta + e v) at e = 0, carried along a forward pass as dual numbers.

    Costs three forward passes and no graph. Attention runs in plain matrix products, because fused attention has no
    forward formula.

    Args:
        model: without wrapper.
        per_sample_loss: ``per_sample_loss(model, batch)`` returns (N,).
        batch: what ``per_sample_loss`` takes.
        direction: {name: (parameter, v)}, from :func:`~synkern.meta.direction.check_direction`.

    Returns:
        (N,) scores in the dtype of the losses.

    Raises:
        MethodUnavailable: an operator has no forward formula, or the model computes under ``torch.no_grad()`` with
            what depends on its parameters: forward mode would differentiate through it.
    """
    with torch.enable_grad(), differentiable_kernels(model), forward_ad.dual_level(), _dual(model, direction):
        try:
            with _Watch():
                losses = per_sample_losses(per_sample_loss, model, batch)
        except RuntimeError as error:  # NotImplementedError is one
            if not isinstance(error, NotImplementedError) and not any(text in str(error) for text in _NO_FORMULA):
                raise
            raise MethodUnavailable(
                f"sample_scores: method 'forward' needs a forward-mode formula, which an operator in "
                f"{_where(model, error)} lacks: {str(error).splitlines()[0]}; use method='auto'"
            ) from error
        except _Detached as error:
            raise MethodUnavailable(f"sample_scores: {error} in {_where(model, error)}") from error
        primal, tangent = forward_ad.unpack_dual(losses)
        return torch.zeros_like(primal) if tangent is None else tangent.detach().clone()


@contextmanager
def _dual(model: nn.Module, direction: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Gives the parameters their tangents, in place, so that every use of them is seen, also outside their modules.

    The copy onto itself changes no bit; the tangents end with the dual level. Nothing requires grad meanwhile, so that
    no graph is kept while grad mode is on.
    """
    with ExitStack() as stack:
        for parameter, v in direction.values():
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
                parameter.copy_(forward_ad.make_dual(parameter.detach(), v.to(parameter.dtype)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        yield


class _Detached(Exception):
    """A computation that backward does not see and forward mode does."""


class _Watch(TorchFunctionMode):
    """Refuses what would give a wrong tangent without an error.

    Forward mode goes on under no_grad, where backward stops; and operators of other libraries may drop the tangent.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        custom = isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
        if torch.is_grad_enabled() and not custom:
            return result
        if not any(_has_tangent(x) for x in (*args, *(kwargs or {}).values())):
            return result
        if not torch.is_grad_enabled() and _has_tangent(result):
            raise _Detached(
                "method 'forward' would differentiate what is computed under torch.no_grad(); "
                "use method='contraction' or 'double_backward'; found"
            )
        if custom and torch.is_grad_enabled() and not _has_tangent(result) and _is_floating(result):
            raise _Detached(f"operator {function} drops the tangent; use method='difference'; found")
        return result


def _has_tangent(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_has_tangent(item) for item in value)
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _is_floating(value: Any) -> bool:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return isinstance(first, Tensor) and first.dtype.is_floating_point


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost module that was at work when the error was raised."""
    inside, trace = model, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            inside = owner
        trace = trace.tb_next
    return describe_module(model, inside)
