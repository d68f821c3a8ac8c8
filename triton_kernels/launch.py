"""How a kernel is started, on a GPU or in Triton's interpreter, and how large its tiles are."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from .scalars import INTERPRETED

is_interpreted: bool = INTERPRETED.value


class Tile(NamedTuple):
    """Rows and classes of a program's tile, its warps, and the most registers of a thread (None: any)."""

    rows: int
    classes: int
    warps: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What ``launch`` and a row kernel take."""
        return {"R": self.rows, "B": self.classes, "warps": self.warps, "registers": self.registers}


# Elements of a tile of short rows, in 4-byte accumulators, and what a warp takes of it. A row's own few numbers, in
# float64, are worked out by every thread that holds a part of it: one row a thread, for two do not fit its registers.
# Left to itself, the assembler spills a few of their words for one program more on a processor.
SHORT_ELEMENTS = 512
SHORT_PER_WARP = 128
SHORT_REGISTERS = 168
# A longer row is held on chip up to this length, 32 elements a thread, and walked beyond it, in steps that leave room
# for several programs on a processor.
HELD_CLASSES = 16384
HELD_PER_WARP = 1024
STEP_CLASSES = 4096
STEP_PER_WARP = 512
# Elements of a batch that a single program takes whole, for one launch in place of three.
WHOLE_ELEMENTS = 1024


def short_tile(rows: int, classes: int) -> Tile:
    """Whole rows, of which no two warps share one."""
    return Tile(rows, classes, max(1, min(rows, rows * classes // SHORT_PER_WARP)), SHORT_REGISTERS)


@functools.lru_cache(maxsize=4096)
def row_tile(rows: int, classes: int, bytes_per_class: int, held: bool) -> Tile:
    """The tile for (rows, classes).

    Args:
        rows, classes: of the matrix.
        bytes_per_class: of the accumulators that a program keeps for its tile.
        held: whether the kernel keeps whole rows on chip where they fit.
    """
    share = max(1, bytes_per_class // 4)
    whole = triton.next_power_of_2(max(1, classes))
    if whole <= SHORT_ELEMENTS // share:
        together = min(SHORT_ELEMENTS // share // whole, triton.next_power_of_2(max(1, rows)))
        return short_tile(together, whole)
    if held and whole <= HELD_CLASSES // share:
        return Tile(1, whole, max(1, whole * share // HELD_PER_WARP))
    step = min(whole, STEP_CLASSES // share)
    return Tile(1, step, max(1, step * share // STEP_PER_WARP))


def launch(
    kernel: Any, programs: int, like: Tensor, *arguments: Any, warps: int = 4, registers: int | None = None,
    **constants: Any,
) -> None:
    """Runs ``programs`` programs of a kernel on the device and the current stream of ``like``."""
    if is_interpreted:
        with np.errstate(all="ignore"):  # numpy warns of what is meant: log 0, inf - inf
            kernel[(programs,)](*arguments, **constants)
        return
    if registers is not None and torch.version.cuda is not None:
        constants["maxnreg"] = registers
    with _on(like.device):
        kernel[(programs,)](*arguments, num_warps=warps, **constants)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton starts kernels on the current device, whatever device its tensors are on."""
    if device.index is None or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
