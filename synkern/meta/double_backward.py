"""Scores by differentiating a gradient: the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .context import MethodUnavailable, PerSampleLoss, differentiable_kernels, per_sample_losses


def double_backward_scores(
    model: nn.Module, per_sample_loss: PerSampleLoss, batch: Any, direction: Mapping[str, tuple[Tensor, Tensor]]
) -> Tensor:
    """s_i = d/dw_i <v, grad_theta sum_j w_j l_j>, with weights w that are never given a value other than one.

    Costs five forward passes and twice the memory of a training step. Attention runs in plain matrix products, because
    fused attention has no double backward.

    Args:
        model: without wrapper.
        per_sample_loss: ``per_sample_loss(model, batch)`` returns (N,).
        batch: what ``per_sample_loss`` takes.
        direction: {name: (parameter, v)}, from :func:`~synkern.meta.direction.check_direction`.

    Returns:
        (N,) scores in the dtype of the losses.

    Raises:
        MethodUnavailable: an operator has no double backward.
        ValueError: the losses have no gradient at all.

    Source: SunGen (Gao et al., ICLR 2023), Eq. 11; learning to reweight (Ren et al., ICML 2018).
    """
    parameters = [parameter for parameter, _ in direction.values()]
    with torch.enable_grad(), differentiable_kernels(model):
        losses = per_sample_losses(per_sample_loss, model, batch)
        if not losses.requires_grad:
            raise ValueError(
                "sample_scores: the losses do not depend on any parameter that requires grad; compute them from the "
                "model that per_sample_loss is given, without torch.no_grad() or .detach()"
            )
        weight = torch.ones_like(losses, requires_grad=True)
        try:
            gradients = torch.autograd.grad((weight * losses).sum(), parameters, create_graph=True, allow_unused=True)
            along = _inner_product(gradients, [v for _, v in direction.values()], losses.device)
            if along is None:  # the losses depend on other parameters only
                return torch.zeros_like(losses, requires_grad=False)
            if _severed(along):
                raise NotImplementedError("a backward marked with @once_differentiable")
            return torch.autograd.grad(along, weight)[0]
        except RuntimeError as error:  # NotImplementedError is one
            if not isinstance(error, NotImplementedError) and "is not implemented" not in str(error):
                raise
            raise MethodUnavailable(
                f"sample_scores: method 'double_backward' needs second derivatives, which an operator of "
                f"{type(model).__name__} lacks: {str(error).splitlines()[0]}; use method='auto'"
            ) from error


def _inner_product(gradients: Any, direction: list[Tensor], device: torch.device) -> Tensor | None:
    terms = [
        (gradient * v).sum().to(device)
        for gradient, v in zip(gradients, direction, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    return torch.stack([term.double() for term in terms]).sum() if terms else None


def _severed(root: Tensor) -> bool:
    """Whether some gradient came from a backward that is differentiable once: torch cuts the graph there, and would
    leave its part of the second derivative out without an error."""
    stack = [root.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
    return False
