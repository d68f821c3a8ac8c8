"""The CUDA library: compiles for every architecture without warnings, keeps what it works on in registers, and
registers under a torch that has CUDA, with or without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from built import once
from paths import ROOT

from synkern import _library, backends

KERNELS = {
    "forward_small", "backward_small", "tangent_small", "hvp_small",
    "forward_wide", "backward_wide", "tangent_wide", "hvp_wide",
    "kept_weight_kernel", "loss_sum_kernel", "loss_kernel", "class_weight_sum_kernel", "scale_float32_kernel",
    "linear_mma", "linear_fma", "embedding_rows", "norm_rows", "sum_by_sample",
}  # fmt: skip
OPERATORS = (
    "row_loss", "row_loss_and_gradient", "row_loss_rescale", "row_loss_backward", "row_loss_tangent", "row_loss_hvp",
    "linear_contraction", "embedding_contraction", "norm_contraction",
)  # fmt: skip
REPORT = "report.txt"


@dataclass
class Entry:
    """What the assembler says of one kernel."""

    name: str
    architecture: str
    stack: int
    spilled: int


def configure(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    options = (
        "-DSYNKERN_CUDA=ON", "-DCMAKE_CUDA_FLAGS=-Werror all-warnings -Xptxas=-v",
        "-DSYNKERN_NUMPY=OFF", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSYNKERN_TORCH_ROOT={Path(torch.__file__).parent}",
    )  # fmt: skip
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), *generator, *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def build(folder: Path) -> None:
    done = configure(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    command = ["cmake", "--build", str(folder / "build"), "--target", "synkern_cuda", "--parallel"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    (folder / REPORT).write_text(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def entries(request: pytest.FixtureRequest) -> dict[str, list[Entry]]:
    """The assembler's report, by architecture."""
    for tool in ("nvcc", "cmake"):
        if not shutil.which(tool):
            pytest.skip(f"no {tool}")
    folder = once(request.config.cache.mkdir("synkern"), "cuda", (torch.__version__, Path(__file__).read_text()), build)
    return parse((folder / REPORT).read_text())


def parse(report: str) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = defaultdict(list)
    pattern = (
        r"Compiling entry function '(\S+)' for '(sm_\w+)'\n"
        r"ptxas info\s*: Function properties for \1\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    for name, architecture, stack, stores, loads in re.findall(pattern, report):
        found[architecture].append(Entry(name, architecture, int(stack), int(stores) + int(loads)))
    return found


def test_parse_sees_spills() -> None:
    report = (
        "ptxas info    : Compiling entry function '_Z3f' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z3f\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    )
    assert parse(report) == {"sm_90": [Entry("_Z3f", "sm_90", 8, 16)]}


def test_every_kernel_is_compiled_for_every_architecture(entries: dict[str, list[Entry]]) -> None:
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    newest = max(int(number) for number in re.findall(r"compute_(\d+)", known))
    assert set(entries) == {"sm_80", "sm_90", f"sm_{newest}"}
    for architecture, compiled in entries.items():
        names = {kernel for entry in compiled for kernel in KERNELS if f"{len(kernel)}{kernel}" in entry.name}
        assert names == KERNELS, architecture
    assert len({len(compiled) for compiled in entries.values()}) == 1


def test_no_kernel_uses_local_memory(entries: dict[str, list[Entry]]) -> None:
    compiled = [entry for of_one in entries.values() for entry in of_one]
    assert compiled
    assert [entry for entry in compiled if entry.stack or entry.spilled] == []


def test_without_a_compiler_the_build_says_what_to_do(tmp_path: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    done = configure(tmp_path, CUDACXX=str(tmp_path / "no-nvcc"))
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "no CUDA compiler works here; put nvcc" in message
    assert "SYNKERN_CUDA=OFF" in message


def test_missing_kernels_have_a_reason() -> None:
    reason = _library.cuda_missing
    if torch.version.cuda is None:
        assert reason is not None and "was built without CUDA" in reason
    if reason is not None:
        assert backends.report()["backends"]["cuda"] == reason  # type: ignore[index]
        assert "cuda" not in backends.available()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_register_under_a_torch_with_cuda(name: str) -> None:
    if _library.cuda_missing is not None:
        pytest.skip(_library.cuda_missing)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"synkern::{name}", "CUDA")
    assert Path(_library._find("libsynkern_cuda.so") or "").is_file()
