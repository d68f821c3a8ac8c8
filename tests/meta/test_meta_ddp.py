"""Two processes with half of the batch each give one process's scores; only the direction is reduced."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("meta_ddp_script.py")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(folder: Path, world: int) -> list[dict[str, torch.Tensor]]:
    port = free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank), str(world), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [load_file(folder / f"{world}-{rank}.safetensors") for rank in range(world)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_are_as_one(tmp_path):
    (one,) = run(tmp_path, 1)
    two = run(tmp_path, 2)
    for name, expected in one.items():
        if name.startswith("scores."):
            found = torch.cat([rank[name] for rank in two])
            tolerance = 5e-3 if name.endswith("difference") else 1e-5
            assert len(rank_sizes := {len(rank[name]) for rank in two}) == 1 and rank_sizes == {len(expected) // 2}
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
        else:
            assert torch.equal(two[0][name], two[1][name]), name  # replicas stay equal bit by bit
            torch.testing.assert_close(two[0][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert one["weights"].std() > 0.01
