"""The kernels under the address and undefined-behaviour sanitizers, without Python around them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

OTHER_INSTRUCTION_SET = 77  # exit status of a program that cannot run as asked


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1500, env={**os.environ, **environment}, check=False
    )


def sanitizers_missing(folder: Path) -> str | None:
    """What keeps the program from being built here, or None."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        return "no C++ compiler"
    if not shutil.which("cmake"):
        return "no cmake"
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    options = ("-fsanitize=address,undefined", "-o", str(folder / "probe"))
    if run(compiler, str(folder / "probe.cpp"), *options).returncode != 0 or run(str(folder / "probe")).returncode != 0:
        return f"{compiler} has no working address and undefined-behaviour sanitizers"
    return None


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    if missing := sanitizers_missing(folder):
        pytest.skip(f"the sanitizers need a compiler that has them: {missing}")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    build = str(folder / "build")
    for command in (
        ("cmake", "-S", str(ROOT), "-B", build, "-DSYNKERN_SANITIZE=ON", *generator),
        ("cmake", "--build", build, "--target", "sanitize_rows", "--parallel"),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "build" / "sanitize_rows"


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_no_sanitizer_complains(program: Path, isa: str) -> None:
    done = run(str(program), SYNKERN_ISA=isa, UBSAN_OPTIONS="print_stacktrace=1")
    if done.returncode == OTHER_INSTRUCTION_SET:
        assert isa != "baseline", "every processor runs the baseline"
        pytest.skip(f"{platform.machine()}: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    assert done.stdout.startswith(f"{isa}: ")
    assert done.stdout.rstrip().endswith(" 0 failed checks")
