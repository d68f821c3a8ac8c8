"""Who is measured. A further peer is a row of ``PEERS``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Problem


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
        missing: why it cannot run here, or None.
    """

    name: str
    about: str
    prepare: Callable[[Problem], Step]
    modes: tuple[str, ...]
    computes: str | None = "case"
    missing: Callable[[], str | None] = lambda: None


LossFunction = Callable[..., Tensor]


def _fused(problem: Problem) -> LossFunction:
    return problem.case.spec.function


def _eager(problem: Problem) -> LossFunction:
    rows = problem.case.spec.reference

    def mean_loss(logits: Tensor, target: Tensor, **keywords: Any) -> Tensor:
        return rows(logits, target, **keywords).mean()

    return mean_loss


def _compiled(problem: Problem) -> LossFunction:
    # Code specialised on the shapes of this case is the best that the compiler gives.
    torch._dynamo.reset()
    return torch.compile(_eager(problem))


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

    def run() -> Tensor:
        logits.grad = None  # as zero_grad does
        loss = function(logits, target, **keywords)
        loss.backward()
        return loss

    def outcome() -> dict[str, Tensor]:
        return {"value": run().detach(), "gradient": cast(Tensor, logits.grad)}

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


class _RecordOperator(TorchDispatchMode):
    """Keeps the arguments and outputs with which the public function calls ``row_loss``."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        if function is torch.ops.synkern.row_loss.default:
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


def _no_compiler() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and {compiler} is not installed"


ALL = ("train", "forward", "tangent", "hvp")
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("synkern", "the public function", _loss_step(_fused), ALL),
        Peer("synkern kernel", "the operator alone, after a forward pass", _kernel_step, ("tangent", "hvp")),
        Peer("eager", "plain PyTorch as a user writes it, in the dtype of the logits", _loss_step(_eager), ALL),
        # Its code is not differentiable twice, nor under torch.func from outside.
        Peer("compile", "the same under torch.compile", _loss_step(_compiled), ("train", "forward"),
             missing=_no_compiler),
        Peer("cross_entropy", "F.cross_entropy, unweighted: a reference point", _loss_step(_cross_entropy), ALL,
             computes="cross_entropy"),
        Peer("copy", "logits copied into a warm buffer", _copy, ("train",), computes=None),
        Peer("clone", "logits copied into fresh memory, with its page faults", _clone, ("train",), computes=None),
        Peer("read: sum", "torch.sum of each array read", _read_by_sum, ("forward", "tangent"), computes=None),
        Peer("read: dot", "torch.dot of the two arrays read", _read_by_dot, ("tangent",), computes=None),
        Peer("add", "the two arrays read, their sum written into a warm buffer", _add, ("hvp",), computes=None),
    )
}


def peers_for(mode: str, names: tuple[str, ...]) -> list[Peer]:
    """The named peers that can do ``mode``."""
    return [peer for peer in PEERS.values() if mode in peer.modes and peer.name in names]
