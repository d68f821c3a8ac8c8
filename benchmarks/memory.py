"""Peak memory of one call, in a process of its own: another peer's memory cannot hide it."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from synkern import empty_cache

from .cases import Case, make_problem
from .devices import DEVICES
from .peers import PEERS

# Below this the pages of a thread's stack and of the allocator are as large as the arrays.
LEAST_ARRAY_BYTES = 16 << 20


def peak_extra_arrays(case: Case, peer: str, device: str, threads: int) -> float:
    """The most memory that one call of ``peer`` holds beyond its inputs, in multiples of an (N, C) array's bytes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        extra = executor.submit(_measure, case, peer, device, threads).result()
    return extra / case.array_bytes


def _measure(case: Case, peer: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    problem = make_problem(case, DEVICES[device].torch_device)
    call = PEERS[peer].prepare(problem).run
    for _ in range(2):  # loads and compiles what the call needs
        call()
    empty_cache()  # a gradient's memory kept from the calls above counts
    return DEVICES[device].peak_extra_bytes(call)
