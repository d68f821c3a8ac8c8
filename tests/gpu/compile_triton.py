"""Compiles the Triton kernels for sm_90, as the operators would start them, and prints what each one takes as JSON.

A process of its own: Triton decides at its import whether kernels are interpreted or compiled. Neither a GPU nor a
driver is needed: the package brings ptxas.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import synkern.losses  # noqa: F401  (loads the operators)
from synkern._kinds import LossKind
from synkern.triton_kernels import operators

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]

# p0, p1, p2, label smoothing, z-loss
OPTIONS = {
    LossKind.CROSS_ENTROPY: (0.0, 0.0, 0.0, 0.1, 1e-3), LossKind.RCE: (-9.2, 0.0, 0.0, 0.0, 0.0),
    LossKind.GCE: (0.7, 0.5, 0.0, 0.0, 0.0), LossKind.SCE: (0.1, 1.0, -9.2, 0.0, 0.0),
    LossKind.FOCAL: (2.0, 0.0, 0.0, 0.0, 0.0), LossKind.IMP: (2.0, 0.0, 0.0, 0.0, 0.0),
    LossKind.DIMP: (2.0, 1.0, 0.0, 0.0, 0.0),
}  # fmt: skip


class Launches:
    """Stands in for ``launch``: keeps what would be started."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, int], dict[str, Any]]] = []

    def __call__(
        self, kernel: Any, *arguments: Any, warps: int = 4, registers: int | None = None, **constants: Any
    ) -> None:
        options = {"num_warps": warps} | ({} if registers is None else {"maxnreg": registers})
        self.found.append((kernel, arguments[2:], options, constants))  # without grid and device


def source(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """What Triton's launcher would specialise on: types, None, 1, and divisibility by 16."""
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = constants[parameter.name] if parameter.is_constexpr else arguments[index]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constexprs[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[(index,)] = "*" + NAMES[value.dtype], ALIGNED
        elif parameter.annotation_type:
            signature[parameter.name] = parameter.annotation_type
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = ALIGNED
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def resources(compiled: Any) -> dict[str, int]:
    """Registers and bytes of spills, as the assembler counts them, and instructions of the matrix units."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        command = [str(TOOLS / "ptxas"), "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    registers = re.findall(r"Used (\d+) registers", report)
    matrix = compiled.asm["ptx"].count("wgmma.mma_async")
    return {"spills": sum(map(int, spills)), "registers": max(map(int, registers)), "matrix_instructions": matrix}


def row_calls(rows: int, classes: int, dtype: torch.dtype, kind: LossKind, class_weighted: bool) -> None:
    """Every row operator once, on tensors that are never read."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = torch.empty((rows, classes), dtype=dtype, device="meta")
    vector = torch.empty(rows, dtype=wide, device="meta")
    target, statistics = torch.empty(rows, dtype=torch.int64, device="meta"), vector.new_empty(5, rows)
    ratio = vector if kind in (LossKind.IMP, LossKind.DIMP) else None
    weights = vector.new_empty(classes) if class_weighted else None
    options = (int(kind), *OPTIONS[kind], -100)
    operators.row_loss(z, target, vector, ratio, weights, *options, 0)
    operators.row_loss_and_gradient(z, target, vector, ratio, weights, *options, 2)
    operators.row_loss_backward(vector, z, target, vector, ratio, weights, statistics, *options, 0)
    operators.row_loss_rescale(vector[0], z, vector, z, target, vector, ratio, weights, statistics, *options)
    operators.row_loss_tangent(z, vector, z, target, ratio, weights, statistics, *options)
    operators.row_loss_hvp(z, vector, vector, z, target, ratio, weights, statistics, *options)


def contraction_calls(dtype: torch.dtype, v_dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, v = torch.empty(4096, 768, dtype=dtype, device="meta"), torch.empty(768, 768, dtype=v_dtype, device="meta")
    bias, row = a.new_empty(768, dtype=wide), a.new_empty(4096, dtype=wide)
    sample = a.new_empty(4096, dtype=torch.int64)
    operators.linear_contraction(a, a, v, bias, sample, 64)
    if dtype == v_dtype:
        operators.embedding_contraction(sample, a, v, None, 64)
        operators.norm_contraction(a, a, row, row, bias, bias, None, 64)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def calls(which: str) -> Iterator[tuple[str, Any]]:
    """Named groups of operator calls: a representative part, or everything."""
    if which == "part":
        long, dtypes = [(8192, 3), (8192, 32000)], (torch.bfloat16,)
        short = [(32, 3, torch.bfloat16, LossKind.DIMP, False)]
        short += [(8192, 100, torch.float32, kind, True) for kind in LossKind]
    else:
        long, dtypes = [(8192, 3), (8192, 16000), (4096, 128000)], FLOATS
        short = [
            (n, c, dtype, kind, weighted)
            for n, c in [(32, 3), (999, 3), (999, 77), (8192, 1000)]
            for dtype in (torch.float32, torch.bfloat16)
            for kind in LossKind
            for weighted in (False, True)
        ]
    rows = [(n, c, dtype, LossKind.DIMP, False) for n, c in long for dtype in dtypes]
    for n, c, dtype, kind, weighted in rows + short:
        name = f"{kind.name.lower()} {n}x{c} {dtype}" + (" with class weights" if weighted else "")
        yield name, lambda n=n, c=c, dtype=dtype, kind=kind, weighted=weighted: row_calls(n, c, dtype, kind, weighted)
    for dtype, v_dtype in [*((d, d) for d in FLOATS), (torch.bfloat16, torch.float32)]:
        yield f"{dtype} along {v_dtype}", lambda dtype=dtype, v_dtype=v_dtype: contraction_calls(dtype, v_dtype)


def main() -> None:
    seen = set()
    for name, call in calls(sys.argv[1]):
        launches = Launches()
        operators.launch = launches
        call()
        for kernel, arguments, options, constants in launches.found:
            made = source(kernel, arguments, constants)
            if (key := (made.hash(), *options.values())) in seen:
                continue
            seen.add(key)
            compiled = triton.compile(made, target=TARGET, options=options)
            record = {"kernel": kernel.__name__, "call": name, **options, **resources(compiled)}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
