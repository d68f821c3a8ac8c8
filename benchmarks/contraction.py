"""The contraction of the meta-gradient, sum over a sample's rows of <b, v a>, beside the matrix product inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synkern.recipes.files import write_json, write_text

from .cases import DTYPES
from .checks import WrongResult
from .devices import DEVICES
from .report import duration, environment_text, markdown_table
from .timing import Plan, Timing, time_in_turns

# Relative to the largest score: rounding of v a to 16 bits, in the ways that store it.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
LEAST_SHARE_OF_MATRIX_RATE = 0.6  # asked of an H200 in bfloat16


@dataclass(frozen=True)
class Size:
    """rows x inputs of a, rows x outputs of b, in equal groups of rows."""

    rows: int
    inputs: int
    outputs: int
    samples: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.inputs}x{self.outputs}"

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs


SIZES = {"full": Size(16384, 4096, 4096, 128), "smoke": Size(64, 48, 80, 4)}


def ways(size: Size, dtype: str, device: torch.device, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to the scores, and the matrix product alone."""
    generator = torch.Generator().manual_seed(seed)
    a, b, v = (
        torch.randn(shape, generator=generator).to(device, DTYPES[dtype])
        for shape in ((size.rows, size.inputs), (size.rows, size.outputs), (size.outputs, size.inputs))
    )
    ours = torch.ops.synkern.linear_contraction.default
    return {
        "synkern": lambda: ours(a, b, v, None, None, size.samples),
        "product, then row dots": lambda: ((a @ v.T) * b).view(size.samples, -1).sum(1, dtype=torch.float32),
        "matrix product": lambda: a @ v.T,
    }


def check(found: dict[str, Callable[[], Tensor]], dtype: str) -> float:
    """The largest distance from the stored way, relative to the largest score."""
    expected, actual = (found[name]().double() for name in ("product, then row dots", "synkern"))
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE[dtype]:
        raise WrongResult(f"contraction, {dtype}: off by a relative {error:.3g}, allowed {TOLERANCE[dtype]:.3g}")
    return error


def table(size: Size, dtype: str, timings: dict[str, Timing]) -> str:
    unit = timings["matrix product"].median
    rows = [
        [name, duration(t.median), f"{size.operations / t.median / 1e12:.3g}", f"{100 * unit / t.median:.0f} %"]
        for name, t in timings.items()
    ]
    head = ("way", "median", "Tflop/s", "of the matrix rate")
    return f"## Contraction {size}, {dtype}\n\n{markdown_table(head, rows, left=1)}"


def verdict(dtype: str, timings: dict[str, Timing]) -> str:
    share = timings["matrix product"].median / timings["synkern"].median
    met = "met" if share >= LEAST_SHARE_OF_MATRIX_RATE else "NOT MET"
    return f"{dtype}: asked {LEAST_SHARE_OF_MATRIX_RATE:.0%} of the matrix rate, measured {share:.0%}: {met}"


def run(device: str, environment: dict[str, Any], plan: Plan, folder: Path, smoke: bool = False) -> list[Path]:
    """Measures, and writes device-contraction.md and .json.

    Raises:
        WrongResult: the scores are wrong.
    """
    size = SIZES["smoke" if smoke else "full"]
    parts, results = ["# The contraction", environment_text(environment)], {}
    for dtype in TOLERANCE:
        found = ways(size, dtype, DEVICES[device].torch_device, seed=0)
        error = check(found, dtype)
        timings = time_in_turns(dict(found), DEVICES[device], plan)
        parts.append(table(size, dtype, timings))
        if dtype == "bfloat16":
            parts.append(verdict(dtype, timings))
        results[dtype] = {"error": error, "timings": {name: asdict(timing) for name, timing in timings.items()}}
    text, data = folder / f"{device}-contraction.md", folder / f"{device}-contraction.json"
    write_text(text, "\n\n".join(parts) + "\n")
    write_json(data, {"environment": environment, "size": asdict(size), "results": results})
    return [text, data]
