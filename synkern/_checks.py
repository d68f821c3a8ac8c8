"""Argument checks of the public losses: what, expected, got, remedy."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
REDUCTIONS = ("mean", "weighted_mean", "sum", "none")


def check_inputs(name: str, logits: Tensor, target: Tensor) -> None:
    """Raises unless logits (*, C) and target (*) fit each other."""
    if (
        isinstance(logits, Tensor)
        and isinstance(target, Tensor)
        and logits.dtype in LOGITS_DTYPES
        and target.dtype in TARGET_DTYPES
        and logits.dim()
        and target.shape == logits.shape[:-1]
        and target.device == logits.device
    ):
        return
    _explain_inputs(name, logits, target)


def _explain_inputs(name: str, logits: Tensor, target: Tensor) -> NoReturn:
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        what, x = ("logits", logits) if not isinstance(logits, Tensor) else ("target", target)
        raise TypeError(f"{name}: {what} must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor({what})")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"{name}: logits must be float32, float64, bfloat16 or float16, got {logits.dtype}; use logits.float()"
        )
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(
            f"{name}: target must hold class indices as int64, int32, int16 or uint8, got {target.dtype}; "
            "use target.long(), or target.argmax(-1) for one-hot targets"
        )
    got, shape = tuple(target.shape), tuple(logits.shape)
    if shape and got == shape[:-1]:
        raise ValueError(
            f"{name}: target must be on the device of logits ({logits.device}), got {target.device}; "
            "use target.to(logits.device)"
        )
    if not shape:
        raise ValueError(f"{name}: logits must have shape (*, C), got (); use logits.reshape(1, -1)")
    remedy = "the class dimension of logits comes last"
    if got == (*shape[:-1], 1):
        remedy = "use target.squeeze(-1)"
    elif got == shape:
        remedy = "use target.argmax(-1) for one-hot targets"
    elif len(shape) > 2 and got == (shape[0], *shape[2:]):
        remedy = "the class dimension comes last: use logits.movedim(1, -1)"
    raise ValueError(f"{name}: target must have shape {shape[:-1]} to match logits {shape}, got {got}; {remedy}")


def check_operand(name: str, what: str, x: Tensor, logits: Tensor, target: Tensor) -> None:
    """Raises unless x is a floating tensor with one number a row, (N,) or the shape of target."""
    if isinstance(x, Tensor) and x.dtype.is_floating_point and x.shape == target.shape and x.device == logits.device:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {what} must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor({what})")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: {what} must be a floating tensor, got {x.dtype}; use {what}.float()")
    if x.shape != target.shape and (x.dim() != 1 or x.shape[0] != target.numel()):
        expected = tuple(target.shape)
        remedy = f"pass one {what} a row"
        if tuple(x.shape) == (*expected, 1):
            remedy = f"use {what}.squeeze({len(expected)})"
        elif x.dim() == 0:
            remedy = f"use {what}.expand({', '.join(map(str, expected))})"
        raise ValueError(
            f"{name}: {what} must have shape {expected} to match logits {tuple(logits.shape)}, "
            f"got {tuple(x.shape)}; {remedy}"
        )
    check_device(name, what, x, logits)


def check_class_weight(name: str, x: Tensor, logits: Tensor) -> None:
    """Raises unless x is a floating tensor (C,)."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name}: class_weight must be a floating torch.Tensor, got {got}; "
            "use torch.tensor(class_weight, dtype=torch.float32)"
        )
    if x.shape != logits.shape[-1:]:
        raise ValueError(
            f"{name}: class_weight must have shape {tuple(logits.shape[-1:])} to match logits {tuple(logits.shape)}, "
            f"got {tuple(x.shape)}; pass one weight a class"
        )
    check_device(name, "class_weight", x, logits)


def check_device(name: str, what: str, x: Tensor, logits: Tensor) -> None:
    """Raises unless x is on the device of logits."""
    if x.device != logits.device:
        raise ValueError(
            f"{name}: {what} must be on the device of logits ({logits.device}), got {x.device}; "
            f"use {what}.to(logits.device)"
        )


def check_reduction(name: str, reduction: str, normalizer: object) -> None:
    """Raises for an unknown reduction, and for a normalizer that would have no denominator to replace."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is not None and reduction not in ("mean", "weighted_mean"):
        raise ValueError(
            f"{name}: normalizer replaces the denominator of a mean, got reduction={reduction!r}; "
            "use reduction='mean', or leave normalizer out"
        )
    if isinstance(normalizer, Tensor) and normalizer.dim() != 0:
        raise ValueError(
            f"{name}: normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}; "
            "use normalizer.sum()"
        )


def pick_one(name: str, what: str, value: Tensor | None, log_value: Tensor | None) -> tuple[Tensor, bool]:
    """The operand given as a probability or as its logarithm, and which of the two it is."""
    if (value is None) == (log_value is None):
        got = "neither" if value is None else "both"
        raise ValueError(f"{name}: expected {what} or log_{what}, got {got}; pass exactly one of them")
    if value is not None:
        return value, False
    assert log_value is not None
    return log_value, True
