"""Threads and processes: the same bits at a fixed number of threads, and no lock that a fork inherits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, Inputs, cases, make_inputs
from torch import Tensor

ALL = cases()
DEFAULTS = cases(variants=False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(case: Case, inputs: Inputs, reduction: str = "mean") -> list[Tensor]:
    """Loss, gradients of logits and weights, and second derivatives."""
    logits, weight = inputs.logits.clone().requires_grad_(), inputs.sample_weight.clone().requires_grad_()
    loss = case.fused(logits, inputs.target, sample_weight=weight, reduction=reduction, **inputs.operands)
    first = torch.autograd.grad(loss, (logits, weight), torch.ones_like(loss), create_graph=True)
    second = torch.autograd.grad(first[0], (logits, weight), torch.ones_like(logits).cumsum(1).remainder(3))
    return [loss.detach(), *(x.detach() for x in first), *second]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [(5, 3), (3, 40_000), (700, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_the_same_bits_every_time(
    case: Case, dtype: torch.dtype, size: tuple[int, int], count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    inputs = make_inputs(case, *size, dtype)
    first = everything(case, inputs)
    for _ in range(3):
        for again, expected in zip(everything(case, inputs), first, strict=True):
            assert torch.equal(again, expected)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_rows_do_not_depend_on_the_number_of_threads(case: Case, threads: Callable[[int], None]) -> None:
    inputs = make_inputs(case, 300, 500, torch.float32)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(everything(case, inputs, "none"))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_deterministic_algorithms_are_accepted(case: Case) -> None:
    inputs = make_inputs(case, 6, 5)
    expected = everything(case, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        actual = everything(case, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def run_in_fork(work: Callable[[], None], seconds: int = 60) -> int:
    """The exit status of a forked child that does the work; one that hangs is ended by the alarm."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(seconds)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("size", [(8, 5), (64, 20_000)], ids=str)
def test_a_forked_child(size: tuple[int, int], threads: Callable[[int], None]) -> None:
    """The parent has run the kernels on several threads. The child runs them on one, as a data loader's worker does:
    OpenMP's threads do not survive a fork, in torch's own operators neither."""
    case = next(case for case in DEFAULTS if case.name == "dimp")
    inputs = make_inputs(case, *size, torch.float32)
    threads(2)
    expected = everything(case, inputs, "none")

    def work() -> None:
        torch.set_num_threads(1)
        for actual, true in zip(everything(case, inputs, "none"), expected, strict=True):
            assert torch.equal(actual, true)

    assert run_in_fork(work) == 0


WORKER = """
import torch, synkern
from torch.utils.data import DataLoader, Dataset

class Losses(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        logits = torch.randn(4, 50, generator=generator, requires_grad=True)
        loss = synkern.fused_dimp_loss(logits, torch.arange(4), torch.full((4,), 0.5))
        (gradient,) = torch.autograd.grad(loss, logits)
        return torch.cat([loss.detach()[None], gradient.flatten()])

if __name__ == "__main__":
    here = torch.stack([Losses()[i] for i in range(6)])
    torch.set_num_threads(2)
    large = torch.randn(500, 5000, requires_grad=True)
    synkern.fused_cross_entropy(large, torch.zeros(500, dtype=torch.long)).backward()
    for context in ("fork", "spawn"):
        loader = DataLoader(Losses(), batch_size=2, num_workers=2, multiprocessing_context=context)
        there = torch.cat(list(loader))
        assert torch.equal(here, there), context
    print("equal")
"""


def test_workers_of_a_data_loader(tmp_path: os.PathLike[str]) -> None:
    script = os.path.join(tmp_path, "worker.py")
    with open(script, "w") as file:
        file.write(WORKER)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


def test_threads_of_python() -> None:
    """Several Python threads call the kernels at once, each on its own tensors."""
    from concurrent.futures import ThreadPoolExecutor

    work = [(case, make_inputs(case, 50, 300, torch.float32, seed=k)) for k in range(3) for case in DEFAULTS]
    expected = [everything(*one) for one in work]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: everything(*one), work))
    for actual, true in zip(found, expected, strict=True):
        for one, other in zip(actual, true, strict=True):
            assert torch.equal(one, other)
