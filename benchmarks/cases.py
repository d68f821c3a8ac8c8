"""What is measured: a loss, a size, a dtype, and which of its derivatives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from synkern.registry import LOSSES, LossSpec

SIZES = ((32, 3), (64, 14), (1024, 100), (512, 32000), (256, 128000))
# Of a GPU: what fills it at every length of a row, and a batch that is all latency.
CUDA_SIZES = (
    (32, 3), (1 << 20, 14), (1 << 17, 256), (16384, 1000), (16384, 8192), (8192, 32000), (4096, 128000), (2048, 256000),
)  # fmt: skip
DEVICE_SIZES = {"cpu": SIZES, "cuda": CUDA_SIZES}
SMOKE_SIZES = ((64, 14),)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEFAULT_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Mode:
    """What one timed call computes.

    Attributes:
        title: for headings.
        arrays: how many (N, C) arrays must be read or written at the least.
        floors: peers that move just these bytes; the fastest of them in the same run is the floor.
        differentiates: the logits require grad.
    """

    title: str
    arrays: int
    floors: tuple[str, ...]
    differentiates: bool


MODES = {
    "train": Mode("loss + backward", 2, ("copy",), True),
    "forward": Mode("loss without gradient", 1, ("read: sum",), False),
    "tangent": Mode("tangent (jvp)", 2, ("read: sum", "read: dot"), False),
    "hvp": Mode("Hessian-vector product", 3, ("add",), True),
}
DEFAULT_MODES = ("train", "tangent")


@dataclass(frozen=True)
class Case:
    """One heading of the table; ``options`` are the loss's own."""

    loss: str
    rows: int
    classes: int
    dtype: str
    mode: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def spec(self) -> LossSpec:
        return LOSSES[self.loss]

    @property
    def array_bytes(self) -> int:
        """Bytes of one (N, C) array."""
        return self.rows * self.classes * DTYPES[self.dtype].itemsize

    @property
    def least_bytes(self) -> int:
        """The fewest bytes that must move: every (N, C) array once; what has N entries does not count."""
        return MODES[self.mode].arrays * self.array_bytes

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.loss}{options} {self.rows}x{self.classes} {self.dtype}"


@dataclass
class Problem:
    """The tensors of a case: logits (N, C), target (N,), a direction (N, C) where the mode has one, operands (N,)."""

    case: Case
    logits: Tensor
    target: Tensor
    direction: Tensor | None
    operands: dict[str, Tensor] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.case.options)


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Logits of a half-trained model: the target's is raised, so that p runs from 1 / C to about a half."""
    generator = torch.Generator().manual_seed(seed)
    dtype, mode = DTYPES[case.dtype], MODES[case.mode]
    logits = torch.randn(case.rows, case.classes, generator=generator)
    target = torch.randint(0, case.classes, (case.rows,), generator=generator)
    logits[torch.arange(case.rows), target] += math.log(case.classes) * torch.rand(case.rows, generator=generator)
    direction = None
    if case.mode in ("tangent", "hvp"):
        direction = torch.randn(case.rows, case.classes, generator=generator).to(device, dtype)
    # Probabilities come from other models; they stay in float32 when the logits are narrower.
    operand_dtype = torch.promote_types(dtype, torch.float32)
    operands = {
        name: (0.2 + 0.8 * torch.rand(case.rows, generator=generator)).to(device, operand_dtype)
        for name in case.spec.operands
    }
    return Problem(
        case,
        logits.to(device, dtype).requires_grad_(mode.differentiates),
        target.to(device),
        direction,
        operands,
    )


def cases(
    losses: Iterable[str],
    sizes: Iterable[tuple[int, int]],
    dtypes: Iterable[str],
    modes: Iterable[str],
    variants: bool = False,
) -> list[Case]:
    """Every combination; with ``variants`` every registered set of options of a loss, else its defaults."""
    dtypes, modes, sizes = tuple(dtypes), tuple(modes), tuple(sizes)
    return [
        Case(loss, rows, classes, dtype, mode, tuple(options.items()))
        for mode in modes
        for loss in losses
        for options in (LOSSES[loss].variants if variants else LOSSES[loss].variants[:1])
        for dtype in dtypes
        for rows, classes in sizes
    ]
