"""Things that take long to build, built once for all workers and runs."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from paths import ROOT

SOURCES = ("csrc/**/*", "tests/native/emulated/**/*", "CMakeLists.txt")


def fingerprint(*parts: str) -> str:
    """Changes with any source and with the parts."""
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def once(cache: Path, name: str, key: Iterable[str], build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` filled, in this or an earlier run; other workers wait for the one that builds."""
    folder = cache / f"{name}-{fingerprint(*key)}"
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            for stale in cache.glob(f"{name}-*"):
                shutil.rmtree(stale)
            folder.mkdir(parents=True, exist_ok=True)
            build(folder)
            (folder / "complete").touch()
    return folder
