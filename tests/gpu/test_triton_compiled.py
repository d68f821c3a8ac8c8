"""Every Triton kernel compiles for sm_90, and keeps what it works on in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the package triton is not installed")

SCRIPT = Path(__file__).with_name("compile_triton.py")
ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
KERNELS = {
    "forward_kernel", "backward_kernel", "tangent_kernel", "hvp_kernel", "scale_kernel", "kept_weight_kernel",
    "reduce_kernel", "linear_kernel", "embedding_kernel", "norm_kernel", "sum_groups_kernel", "sum_index_kernel",
}  # fmt: skip


def compiled(which: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), which], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not ASSEMBLER.exists(), reason=f"this build of triton brings no {ASSEMBLER.name}")
@pytest.mark.parametrize("which", ["part", pytest.param("everything", marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_sm_90_without_spills(which: str) -> None:
    records = compiled(which)
    assert {record["kernel"] for record in records} == KERNELS
    assert not [record for record in records if record["spills"]]
    on_matrix_units = {
        record["call"] for record in records if record["kernel"] == "linear_kernel" and record["matrix_instructions"]
    }
    assert {"torch.bfloat16 along torch.bfloat16", "torch.float16 along torch.float16"} <= on_matrix_units
