"""Directions in the space of a model's parameters: how they are made from an outer loss, and checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .context import unwrap, without_sync

_HALF = (torch.bfloat16, torch.float16)
_WRAPPER = "module."  # what DistributedDataParallel puts in front of every name


def outer_direction(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    normalize: str | None = None,
) -> dict[str, Tensor]:
    """The gradient of an outer loss, v = sum over batches of grad L(model, batch), which scores are taken along.

    ``.grad`` of the parameters stays as it is, and the model in the mode (train or eval) it is in. Under
    DistributedDataParallel each process passes its own batches; the sum over the processes is the only communication
    that scores need.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        batches: the outer batches; wrap them in ``tqdm`` to see progress.
        loss: called as ``loss(model, batch)`` (without the wrapper), returns a 0-d loss. Its reduction decides how
            the batches weigh against each other.
        normalize: None, or "norm" to scale v to Euclidean norm 1 over all parameters (a zero gradient stays zero).

    Returns:
        One tensor for each parameter that requires a gradient, by its name in ``named_parameters()``: of the
        parameter's shape and dtype, float32 for 16-bit parameters.

    Raises:
        TypeError, ValueError: no parameter requires a gradient, no batches, a loss that is not 0-d or not
            differentiable, or an unknown ``normalize``.

    Source: SunGen (Gao et al., ICLR 2023), Eq. 11.
    """
    if normalize not in (None, "norm"):
        raise ValueError(f"outer_direction: normalize must be None or 'norm', got {normalize!r}")
    parameters = trainable_parameters(model, "outer_direction")
    total = {name: torch.zeros_like(p, dtype=_direction_dtype(p)) for name, p in parameters.items()}
    count = 0
    with without_sync(model), torch.enable_grad():
        for batch in batches:
            value = _outer_loss(loss, unwrap(model), batch)
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for sum_, gradient in zip(total.values(), gradients, strict=True):
                if gradient is not None:
                    sum_ += gradient
            count += 1
    distributed = isinstance(model, nn.parallel.DistributedDataParallel)
    if not count and not distributed:  # a process without batches still takes part in the sum
        raise ValueError("outer_direction: expected at least one batch, got none; an iterator can be read only once")
    if distributed:
        _all_reduce(list(total.values()), model.process_group)
    if normalize == "norm":
        norm = direction_norm(total.values())
        norm = torch.where(norm > 0, norm, 1.0)
        for sum_ in total.values():
            sum_ /= norm.to(sum_.device)
    return total


def _outer_loss(loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any) -> Tensor:
    value = loss(model, batch)
    if not isinstance(value, Tensor):
        raise TypeError(f"outer_direction: loss must return a torch.Tensor, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(
            f"outer_direction: loss must return one number, got shape {tuple(value.shape)}; use reduction='sum'"
        )
    if not value.requires_grad:
        raise ValueError(
            "outer_direction: the loss does not depend on any parameter that requires grad; compute it from the model "
            "that loss is given, without torch.no_grad() or .detach()"
        )
    return value


def _direction_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float32 if parameter.dtype in _HALF else parameter.dtype


def _all_reduce(tensors: list[Tensor], group: Any) -> None:
    """Sum over processes, in one message for each kind of tensor."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        torch.distributed.all_reduce(flat, group=group)
        for tensor, piece in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(piece.view_as(tensor))


def direction_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm (0-d) over all entries of the tensors, without waiting for the device."""
    norms = torch._foreach_norm(list(tensors))
    return torch.stack([norm.double().to(norms[0].device) for norm in norms]).norm()


def trainable_parameters(model: nn.Module, caller: str) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name, without the wrapper's prefix; shared ones once.

    Raises:
        ValueError: there are none, or they are sharded over processes.
    """
    parameters: dict[str, Tensor] = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"{caller}: no parameter of the model requires grad; use model.requires_grad_(True)")
    for name, parameter in parameters.items():
        if hasattr(parameter, "to_local"):
            raise ValueError(
                f"{caller}: parameter {name!r} is sharded over processes ({type(parameter).__name__}); expected whole "
                "parameters, as under DistributedDataParallel"
            )
    return parameters


def check_direction(
    model: nn.Module, direction: Mapping[str, Tensor], caller: str = "sample_scores"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair each entry of a direction with its parameter.

    A parameter that the direction does not name has direction zero. Values are not looked at: NaN makes the scores NaN.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        direction: tensors by parameter name, with or without the wrapper's ``module.``; of the parameter's shape and
            device, in its dtype or in float32.
        caller: the function that errors speak of.

    Returns:
        {name: (parameter, its direction, detached)}, in the order of ``named_parameters()``.

    Raises:
        TypeError, ValueError: direction is not such a mapping, or is empty.
    """
    if not isinstance(direction, Mapping):
        raise TypeError(
            f"{caller}: direction must map parameter names to tensors, got {type(direction).__name__}; "
            "use outer_direction, or dict(zip(names, tensors))"
        )
    if not direction:
        raise ValueError(f"{caller}: direction is empty; expected a tensor for at least one parameter")
    parameters = trainable_parameters(model, caller)
    given = {_plain_name(name, parameters): tensor for name, tensor in direction.items()}
    for name, tensor in given.items():
        _check_entry(caller, model, name, tensor, parameters)
    return {name: (p, given[name].detach()) for name, p in parameters.items() if name in given}


def _plain_name(name: str, parameters: Mapping[str, Tensor]) -> str:
    return name.removeprefix(_WRAPPER) if name not in parameters else name


def _check_entry(
    caller: str, model: nn.Module, name: str, tensor: Tensor, parameters: Mapping[str, Tensor]
) -> None:
    if name not in parameters:
        raise ValueError(f"{caller}: direction names {name!r}, {_why_unknown(unwrap(model), name, parameters)}")
    parameter = parameters[name]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{caller}: direction[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{caller}: direction[{name!r}] must have the parameter's shape {tuple(parameter.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.dtype not in (parameter.dtype, torch.float32):
        raise ValueError(
            f"{caller}: direction[{name!r}] must be {parameter.dtype} as the parameter, or torch.float32, "
            f"got {tensor.dtype}; use .to({parameter.dtype})"
        )
    if tensor.device != parameter.device:
        raise ValueError(
            f"{caller}: direction[{name!r}] must be on the parameter's device {parameter.device}, got {tensor.device}; "
            f"use .to({str(parameter.device)!r})"
        )


def _why_unknown(model: nn.Module, name: str, parameters: Mapping[str, Tensor]) -> str:
    every = dict(model.named_parameters(remove_duplicate=False))
    if name in every and not every[name].requires_grad:
        return "which does not require grad; leave it out of the direction, or unfreeze the parameter"
    if name in every:
        first = next(other for other, parameter in parameters.items() if parameter is every[name])
        return f"which is shared and goes by its first name; use {first!r}"
    near = difflib.get_close_matches(name, parameters, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "use the names of model.named_parameters()"
    return f"but the model has no such parameter; {hint}"
