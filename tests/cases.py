"""What is tested: every registered loss, in every variant, on every backend that runs here; and inputs for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import synkern
from synkern.registry import LOSSES, LossSpec

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
REDUCTIONS = ("mean", "weighted_mean", "sum", "none")
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Case:
    """A loss with some options, on some backend."""

    spec: LossSpec
    options: dict[str, Any]
    backend: str

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def device(self) -> torch.device:
        """Where its tensors are; Triton's interpreter takes those of the CPU."""
        return torch.device("cuda" if self.backend != "cpu" and torch.cuda.is_available() else "cpu")

    @property
    def effective_options(self) -> dict[str, Any]:
        """The loss's own options, with defaults filled in."""
        parameters = inspect.signature(self.spec.reference).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {**defaults, **self.options}

    @property
    def is_detached(self) -> bool:
        """Some factor is held constant: the derivative is by design not that of the value."""
        return any(name.startswith("detach_") and value for name, value in self.effective_options.items())

    @property
    def is_shift_invariant(self) -> bool:
        return not self.effective_options.get("z_loss")

    def fused(self, logits: Tensor, target: Tensor, **arguments: Any) -> Any:
        return self.spec.function(logits, target, **self.options, backend=self.backend, **arguments)

    def rows(self, logits: Tensor, target: Tensor, **operands: Any) -> Tensor:
        return self.spec.reference(logits, target, **self.options, **operands)

    def reference(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        **operands: Tensor,
    ) -> Tensor:
        """The whole loss in plain PyTorch, with the leading dimensions and reductions of the public functions."""
        shape, target = target.shape, target.reshape(-1)
        kept = target != ignore_index
        safe = torch.where(kept, target, torch.zeros_like(target)).long()
        operands = {name: operand.reshape(-1) for name, operand in operands.items()}
        loss = self.rows(logits.reshape(-1, logits.shape[-1]), safe, class_weight=class_weight, **operands)
        weight = torch.ones_like(loss) if sample_weight is None else sample_weight.reshape(-1)
        loss = torch.where(kept, loss * weight, torch.zeros_like(loss))
        if reduction == "none":
            return loss.reshape(shape)
        if reduction == "sum":
            return loss.sum()
        if normalizer is not None:
            return loss.sum() / normalizer
        if reduction == "weighted_mean":
            return loss.sum() / (weight * kept).sum()
        return loss.sum() / (kept.sum() if class_weight is None else (class_weight[safe] * kept).sum())

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return "-".join(part for part in (self.name, options, self.backend) if part)


@dataclass(frozen=True)
class Inputs:
    """Tensors for one call. ``operands`` holds the loss's own per-row tensors."""

    logits: Tensor
    target: Tensor
    sample_weight: Tensor
    class_weight: Tensor
    operands: dict[str, Tensor] = field(default_factory=dict)

    def named(self, class_weight: bool = True) -> dict[str, Tensor]:
        """Every tensor that a loss is differentiated with respect to, logits first."""
        tensors = {"logits": self.logits, "sample_weight": self.sample_weight, **self.operands}
        return {**tensors, "class_weight": self.class_weight} if class_weight else tensors


def make_inputs(
    case: Case, n: int, c: int, dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 2.0
) -> Inputs:
    """Random inputs. Weights are of both signs, and in float32 where the logits are 16 bits wide."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)).to(wide)

    weight = uniform(0.3, 2.0, n)
    weight[1::3] *= -1
    inputs = Inputs(
        logits=(spread * torch.randn(n, c, generator=generator, dtype=torch.float64)).to(dtype),
        target=torch.randint(0, c, (n,), generator=generator),
        sample_weight=weight,
        class_weight=uniform(0.3, 2.0, c),
        operands={name: uniform(0.2, 1.0, n) for name in case.spec.operands},
    )
    return to_device(inputs, case.device)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    return Inputs(
        inputs.logits.to(device),
        inputs.target.to(device),
        inputs.sample_weight.to(device),
        inputs.class_weight.to(device),
        {name: operand.to(device) for name, operand in inputs.operands.items()},
    )


def cases(names: Iterable[str] | None = None, variants: bool = True) -> list[Case]:
    """Cases of the named losses, or of all."""
    chosen = LOSSES.values() if names is None else [LOSSES[name] for name in names]
    return [
        Case(spec, options, backend)
        for spec in chosen
        for options in (spec.variants if variants else spec.variants[:1])
        for backend in synkern.backends.available()
    ]
