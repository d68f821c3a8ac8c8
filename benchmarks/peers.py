"""Who is measured. A further peer is a row of ``PEERS``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from synkern import backends

from .cases import Case, Problem


@dataclass(frozen=True)
class Step:
    """One call of a peer.

    Attributes:
        run: what is timed.
        outcome: runs the call once and names what came out, for the check against float64.
    """

    run: Callable[[], Any]
    outcome: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Peer:
    """A competitor or a floor.

    Attributes:
        name: key in ``PEERS``.
        about: one line for the report.
        prepare: builds the call for a problem.
        modes: those it can do.
        computes: "case" for the case's loss, "cross_entropy" for a reference point that computes that, None for a
            floor, which computes no loss.
        missing: why it cannot run on a device here, or None.
        devices: those that it is for; on others it is not mentioned.
    """

    name: str
    about: str
    prepare: Callable[[Problem], Step]
    modes: tuple[str, ...]
    computes: str | None = "case"
    missing: Callable[[torch.device], str | None] = lambda _: None
    devices: tuple[str, ...] = ("cpu", "cuda")


LossFunction = Callable[..., Tensor]


def _fused(problem: Problem) -> LossFunction:
    return problem.case.spec.function


def _on_backend(backend: str) -> Callable[[Problem], LossFunction]:
    return lambda problem: partial(problem.case.spec.function, backend=backend)


def _liger(_: Problem) -> LossFunction:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def mean_loss(logits: Tensor, target: Tensor, **_: Any) -> Tensor:
        return liger_cross_entropy(logits, target)

    return mean_loss


def _quack(_: Problem) -> LossFunction:
    from quack.cross_entropy import cross_entropy

    def mean_loss(logits: Tensor, target: Tensor, **_: Any) -> Tensor:
        return cross_entropy(logits, target, reduction="mean")

    return mean_loss


def _eager_of(case: Case) -> LossFunction:
    rows = case.spec.reference

    def mean_loss(logits: Tensor, target: Tensor, **keywords: Any) -> Tensor:
        return rows(logits, target, **keywords).mean()

    return mean_loss


def _eager(problem: Problem) -> LossFunction:
    return _eager_of(problem.case)


@lru_cache(maxsize=1)
def _compiled_of(case: Case) -> LossFunction:
    # Code specialised on the shapes of this case is the best that the compiler gives. All its problems share it: one
    # function each would run into the compiler's limit of variants, and into eager code.
    torch._dynamo.reset()
    return torch.compile(_eager_of(case))


def _compiled(problem: Problem) -> LossFunction:
    return _compiled_of(problem.case)


def _cross_entropy(_: Problem) -> LossFunction:
    def mean_loss(logits: Tensor, target: Tensor, **_: Any) -> Tensor:
        return F.cross_entropy(logits, target)

    return mean_loss


def _loss_step(function_of: Callable[[Problem], LossFunction]) -> Callable[[Problem], Step]:
    """A loss as PyTorch's public interface differentiates it."""

    def prepare(problem: Problem) -> Step:
        function, keywords = function_of(problem), {**problem.operands, **problem.options}
        build = {"train": _train_step, "forward": _forward_step, "tangent": _jvp_step, "hvp": _double_backward_step}
        return build[problem.case.mode](problem, function, keywords)

    return prepare


def _train_step(problem: Problem, function: LossFunction, keywords: dict[str, Any]) -> Step:
    logits, target = problem.logits, problem.target

    def step() -> Tensor:
        loss = function(logits, target, **keywords)
        loss.backward()
        return loss

    def run() -> None:
        step()
        logits.grad = None  # by whom it was made: to free 64 MB takes 6 ms, which fell on the peer whose turn was next

    def outcome() -> dict[str, Tensor]:
        value, gradient = step().detach(), cast(Tensor, logits.grad)
        logits.grad = None
        return {"value": value, "gradient": gradient}

    return Step(run, outcome)


def _forward_step(problem: Problem, function: LossFunction, keywords: dict[str, Any]) -> Step:
    def run() -> Tensor:
        return function(problem.logits, problem.target, **keywords)

    return Step(run, lambda: {"value": run()})


def _jvp_step(problem: Problem, function: LossFunction, keywords: dict[str, Any]) -> Step:
    def loss(logits: Tensor) -> Tensor:
        return function(logits, problem.target, **keywords)

    def run() -> Any:
        return torch.func.jvp(loss, (problem.logits,), (problem.direction,))

    def outcome() -> dict[str, Tensor]:
        value, tangent = run()
        return {"value": value, "mean tangent": tangent}

    return Step(run, outcome)


def _double_backward_step(problem: Problem, function: LossFunction, keywords: dict[str, Any]) -> Step:
    def run() -> Tensor:
        loss = function(problem.logits, problem.target, **keywords)
        (gradient,) = torch.autograd.grad(loss, problem.logits, create_graph=True)
        return torch.autograd.grad(gradient, problem.logits, problem.direction)[0]

    return Step(run, lambda: {"hvp": run()})


def _overwriting_step(problem: Problem, function: LossFunction) -> Step:
    """Of a loss that writes the gradient over its logits: timed on a copy of its own, checked on a fresh one."""
    scratch = replace(problem, logits=problem.logits.detach().clone().requires_grad_())

    def outcome() -> dict[str, Tensor]:
        fresh = replace(problem, logits=problem.logits.detach().clone().requires_grad_())
        return _train_step(fresh, function, {}).outcome()

    return Step(_train_step(scratch, function, {}).run, outcome)


def _graph_step(function_of: Callable[[Problem], LossFunction]) -> Callable[[Problem], Step]:
    """Loss and backward replayed from a CUDA graph: what is left of their latency without the host."""

    def prepare(problem: Problem) -> Step:
        logits, target, function = problem.logits, problem.target, function_of(problem)
        keywords = {**problem.operands, **problem.options}

        def work() -> tuple[Tensor, Tensor]:
            loss = function(logits, target, **keywords)
            return loss.detach(), torch.autograd.grad(loss, logits)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and allocates what the capture must not
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value, gradient = work()

        def outcome() -> dict[str, Tensor]:
            graph.replay()
            return {"value": value.clone(), "gradient": gradient.clone()}

        return Step(graph.replay, outcome)

    return prepare


class _RecordOperator(TorchDispatchMode):
    """Keeps the arguments and outputs with which the public function calls ``row_loss``."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        if function._schema.name.partition("::")[2] == "row_loss":  # of whichever backend
            self.arguments, self.outputs = args, outputs
        return outputs


def _kernel_step(problem: Problem) -> Step:
    """The tangent or hvp operator alone, with the statistics that the forward pass left."""
    keywords = {**problem.operands, **problem.options}
    with torch.no_grad(), _RecordOperator() as recorded:
        problem.case.spec.function(problem.logits, problem.target, **keywords)
    logits, target, _, ratio, class_weight, *options, _ = recorded.arguments
    statistics = recorded.outputs[1]
    shared = (logits.detach(), target, ratio, class_weight, statistics, *options)
    if problem.case.mode == "tangent":
        tangent = torch.ops.synkern.row_loss_tangent.default

        def run_tangent() -> Tensor:
            return tangent(problem.direction, None, *shared)

        return Step(run_tangent, lambda: {"row tangents": run_tangent()})

    coefficient = statistics.new_full((problem.case.rows,), 1 / problem.case.rows)
    hvp = torch.ops.synkern.row_loss_hvp.default

    def run_hvp() -> Tensor:
        return hvp(problem.direction, coefficient, None, *shared)[0]

    return Step(run_hvp, lambda: {"hvp": run_hvp()})


def _copy(problem: Problem) -> Step:
    source = problem.logits.detach()
    buffer = torch.empty_like(source)
    return Step(lambda: buffer.copy_(source), lambda: {"copy": buffer.copy_(source)})


def _clone(problem: Problem) -> Step:
    source = problem.logits.detach()
    return Step(source.clone, lambda: {"copy": source.clone()})


def _arrays(problem: Problem) -> list[Tensor]:
    return [problem.logits.detach()] if problem.direction is None else [problem.logits.detach(), problem.direction]


def _bits(x: Tensor) -> Tensor:
    """The memory of a 16-bit array as float32, because arithmetic in 16 bits is slower than reading."""
    flat = x.flatten()
    return flat[: flat.numel() // 2 * 2].view(torch.float32) if x.dtype.itemsize == 2 else flat


def _read_by_sum(problem: Problem) -> Step:
    arrays = [_bits(x) for x in _arrays(problem)]
    return Step(lambda: [x.sum() for x in arrays], dict)


def _read_by_dot(problem: Problem) -> Step:
    x, y = (_bits(x) for x in _arrays(problem))
    return Step(lambda: torch.dot(x, y), dict)


def _add(problem: Problem) -> Step:
    x, y = _arrays(problem)
    buffer = torch.empty_like(x)
    return Step(lambda: torch.add(x, y, out=buffer), lambda: {"sum": torch.add(x, y, out=buffer)})


def _no_compiler(_: torch.device) -> str | None:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and {compiler} is not installed"


def _no_backend(backend: str) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        try:
            backends.check("synkern", backend, device)
        except ValueError as error:
            return str(error)
        return None

    return missing


def _not_installed(package: str, module: str) -> Callable[[torch.device], str | None]:
    def missing(_: torch.device) -> str | None:
        return None if find_spec(module) else f"the package {package} is not installed (`pip install {package}`)"

    return missing


GPU = ("cuda",)
ALL = ("train", "forward", "tangent", "hvp")
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("synkern", "the public function", _loss_step(_fused), ALL),
        Peer("synkern kernel", "the operator alone, after a forward pass", _kernel_step, ("tangent", "hvp")),
        Peer("eager", "plain PyTorch as a user writes it, in the dtype of the logits", _loss_step(_eager), ALL),
        Peer("synkern cuda", "the public function on the CUDA kernels", _loss_step(_on_backend("cuda")), ALL,
             missing=_no_backend("cuda"), devices=GPU),
        Peer("synkern triton", "the public function on the Triton kernels", _loss_step(_on_backend("triton")), ALL,
             missing=_no_backend("triton"), devices=GPU),
        Peer("synkern graph", "the public function, replayed from a CUDA graph", _graph_step(_fused), ("train",),
             devices=GPU),
        # Its code is not differentiable twice, nor under torch.func from outside.
        Peer("compile", "the same under torch.compile", _loss_step(_compiled), ("train", "forward"),
             missing=_no_compiler),
        Peer("cross_entropy", "F.cross_entropy, unweighted: a reference point", _loss_step(_cross_entropy), ALL,
             computes="cross_entropy"),
        Peer("liger", "Liger-Kernel's cross entropy, unweighted, over its logits",
             lambda problem: _overwriting_step(problem, _liger(problem)), ("train",), computes="cross_entropy",
             missing=_not_installed("liger-kernel", "liger_kernel"), devices=GPU),
        Peer("quack", "quack's cross entropy, unweighted", _loss_step(_quack), ("train", "forward"),
             computes="cross_entropy", missing=_not_installed("quack-kernels", "quack"), devices=GPU),
        Peer("copy", "logits copied into a warm buffer", _copy, ("train",), computes=None),
        Peer("clone", "logits copied into fresh memory, with its page faults", _clone, ("train",), computes=None),
        Peer("read: sum", "torch.sum of each array read", _read_by_sum, ("forward", "tangent"), computes=None),
        Peer("read: dot", "torch.dot of the two arrays read", _read_by_dot, ("tangent",), computes=None),
        Peer("add", "the two arrays read, their sum written into a warm buffer", _add, ("hvp",), computes=None),
    )
}


def peers_for(mode: str, names: tuple[str, ...], device: str = "cpu") -> list[Peer]:
    """The named peers that can do ``mode`` and are for ``device``."""
    return [
        peer for peer in PEERS.values() if mode in peer.modes and peer.name in names and device in peer.devices
    ]
