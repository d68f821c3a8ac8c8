"""The CUDA kernels run on the processor: tests/native/emulated stands in for the hardware, and the kernels, their
launch plans and their index arithmetic are the very ones that nvcc compiles."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from paths import ROOT
from torch import Tensor

from synkern._schema import MEAN, NONE, STATISTICS_ROWS, accumulate_dtype

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
INDEX_TYPES = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.uint8: 3}
ELEMENTS = ("float", "double", "bfloat16", "float16")

POINTERS = ("logits", "target", "weight", "ratio", "class_weight", "statistics")
NUMBERS = ("logits_stride", "dtype", "target_type", "rows", "classes", "ignore_index", "loss", "reduction")
OPTIONS = ("p0", "p1", "p2", "label_smoothing", "z_loss")
OUTPUTS = ("losses", "total", "gradient", "grad_weight", "grad", "v", "coefficient", "extra")


class Call(ctypes.Structure):
    """``struct Call`` of library.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_double) for name in OPTIONS),
        *((name, ctypes.c_void_p) for name in OUTPUTS),
        ("v_stride", ctypes.c_int64),
    ]


@dataclass
class Problem:
    """The operands of a row loss; options in the order of the schema."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    ratio: Tensor | None = None
    class_weight: Tensor | None = None
    loss: int = 0
    p: tuple[float, float, float] = (0.0, 0.0, 0.0)
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    statistics: Tensor | None = None
    options: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.options = (self.loss, *self.p, self.label_smoothing, self.z_loss, self.ignore_index)

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.logits, self.target, self.weight, self.ratio, self.class_weight

    def double(self) -> Problem:
        """The same numbers in float64."""
        wide = [None if x is None else x.double() for x in (self.logits, self.weight, self.ratio, self.class_weight)]
        return Problem(
            wide[0], self.target, *wide[1:], self.loss, self.p, self.label_smoothing, self.z_loss, self.ignore_index
        )  # type: ignore[arg-type]


class Layer(ctypes.Structure):
    """``struct Layer`` of library.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("dtype", "v_dtype", "rows", "samples", "inputs", "outputs", "entries")),
        *((name, ctypes.c_int64) for name in ("a_stride", "b_stride", "v_stride")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "v", "v_bias", "mean", "rstd", "sample", "out")),
    ]


@dataclass
class Launch:
    blocks: int
    threads: int
    cluster: int
    parts: int


def _data(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Emulator:
    def __init__(self, path: Path) -> None:
        self.emulation = ctypes.CDLL(str(path))
        self.emulation.emulated_configure.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
        self.configure()

    def configure(self, multiprocessors: int = 132, shared_bytes: int = 220 * 1024, clusters: bool = True) -> None:
        """The device whose launch plans are taken; forgets past launches."""
        self.emulation.emulated_configure(multiprocessors, shared_bytes, clusters)

    def launches(self) -> list[Launch]:
        numbers = (ctypes.c_int64 * 400)()
        count = self.emulation.emulated_launches(numbers, 100)
        return [Launch(*numbers[4 * i : 4 * i + 4]) for i in range(min(count, 100))]

    def _call(self, name: str, problem: Problem, reduction: int, **tensors: Tensor | int | None) -> None:
        call = Call()
        for field_name, tensor in zip(POINTERS, (*problem.operands, problem.statistics), strict=True):
            setattr(call, field_name, _data(tensor))
        rows, classes = problem.logits.shape
        call.logits_stride, call.rows, call.classes = problem.logits.stride(0), rows, classes
        call.dtype, call.target_type = DTYPES[problem.logits.dtype], INDEX_TYPES[problem.target.dtype]
        call.ignore_index, call.loss, call.reduction = problem.ignore_index, problem.loss, reduction
        call.p0, call.p1, call.p2 = problem.p
        call.label_smoothing, call.z_loss = problem.label_smoothing, problem.z_loss
        for field_name, value in tensors.items():
            setattr(call, field_name, value if isinstance(value, int) else _data(value))
        error = getattr(self.emulation, f"emulated_{name}")(ctypes.byref(call))
        assert error == 0, f"emulated {name}: error {error}"

    def forward(
        self, problem: Problem, reduction: int, gradient: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, statistics, gradient, gradient of the weight), the last two empty where not asked for."""
        dtype, (rows, classes) = accumulate_dtype(problem.logits.dtype), problem.logits.shape
        losses, total = poisoned((rows,), dtype), poisoned((), dtype)
        problem.statistics = poisoned((STATISTICS_ROWS, rows), dtype)
        grad_logits = poisoned((rows, classes) if gradient else (0,), problem.logits.dtype)
        weighted = gradient and problem.weight is not None
        grad_weight = poisoned((rows if weighted else 0,), dtype)
        self._call(
            "forward", problem, reduction, losses=losses, total=None if reduction == NONE else total,
            gradient=grad_logits if gradient else None, grad_weight=grad_weight if weighted else None,
        )
        return losses if reduction == NONE else total, problem.statistics, grad_logits, grad_weight

    def rescale(self, problem: Problem, grad: Tensor, gradient: Tensor, grad_weight: Tensor) -> None:
        weights = grad_weight if problem.weight is not None else None
        self._call("rescale", problem, MEAN, grad=grad, gradient=gradient, grad_weight=weights)

    def backward(self, problem: Problem, grad: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(problem.logits.dtype)
        gradient = poisoned(problem.logits.shape, problem.logits.dtype)
        grad_weight = poisoned((0 if problem.weight is None else len(problem.target),), dtype)
        weights = None if problem.weight is None else grad_weight
        self._call("backward", problem, reduction, grad=grad, gradient=gradient, grad_weight=weights)
        return gradient, grad_weight

    def tangent(self, problem: Problem, v: Tensor, coefficient: Tensor | None) -> Tensor:
        out = poisoned((len(problem.target),), accumulate_dtype(v.dtype))
        self._call("tangent", problem, NONE, v=v, v_stride=v.stride(0), coefficient=coefficient, losses=out)
        return out

    def hvp(self, problem: Problem, v: Tensor, coefficient: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        out = poisoned(problem.logits.shape, v.dtype)
        along = poisoned((len(problem.target),), accumulate_dtype(v.dtype))
        self._call(
            "hvp", problem, NONE, v=v, v_stride=v.stride(0), coefficient=coefficient, extra=extra, gradient=out,
            losses=along,
        )
        return out, along


    def contraction(self, name: str, samples: int, b: Tensor, **operands: Tensor | None) -> Tensor:
        """``linear``, ``embedding`` (index as ``a``) or ``norm`` (x as ``a``, the weight's direction as ``v``)."""
        out = poisoned((samples,), accumulate_dtype(b.dtype))
        a, v = operands["a"], operands.get("v")
        layer = Layer(dtype=DTYPES[b.dtype], rows=len(b), samples=samples, outputs=b.shape[1], b_stride=b.stride(0))
        assert a is not None
        if a.dim() == 2:
            layer.inputs, layer.a_stride = a.shape[1], a.stride(0)
        if v is not None and v.dim() == 2:
            layer.v_dtype, layer.entries, layer.v_stride = DTYPES[v.dtype], len(v), v.stride(0)
        for key, tensor in {"b": b, "out": out, **operands}.items():
            setattr(layer, key, _data(tensor))
        error = getattr(self.emulation, f"emulated_{name}")(ctypes.byref(layer))
        assert error == 0, f"emulated {name}: error {error}"
        return out


def poisoned(shape: Any, dtype: torch.dtype) -> Tensor:
    """An output that shows what was never written."""
    return torch.full(tuple(shape), 12345.0).to(dtype)


def commands(folder: Path, compiler: str) -> Iterator[list[str]]:
    """One command an object; the last links them."""
    emulated, source = ROOT / "tests" / "native" / "emulated", ROOT / "csrc" / "cuda"
    options = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # A misaligned vector is an error on a GPU, and goes unnoticed here without a check.
    options += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    options += [f"-I{emulated}", f"-I{ROOT / 'csrc'}"]
    objects: list[tuple[str, Path, list[str]]] = [("library", emulated / "library.cpp", [])]
    objects += [(name, source / f"{name}.cu", []) for name in ("reductions", "contraction")]
    objects += [(name, source / "rows.cu", [f"-DSYNKERN_ELEMENT={name}"]) for name in ELEMENTS]
    for name, path, more in objects:
        yield [compiler, *options, *more, "-x", "c++", "-c", str(path), "-o", str(folder / f"{name}.o")]
    yield [compiler, "-shared", "-o", str(folder / "libemulated.so"), *(str(folder / f"{o[0]}.o") for o in objects)]


def why_not(folder: Path) -> str | None:
    """What keeps the kernels from being built for this processor, or None."""
    compiler = compiler_here()
    if not compiler:
        return "no C++ compiler"
    probe = folder / "probe.cpp"
    probe.write_text("#include <ucontext.h>\n_Float16 x = 1; int main() { return int(x); }\n")
    if subprocess.run([compiler, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode != 0:
        return f"{compiler} has no ucontext.h or no _Float16"
    return None


def compiler_here() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def build(folder: Path) -> None:
    *objects, link = commands(folder, str(compiler_here()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), objects):
            assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
