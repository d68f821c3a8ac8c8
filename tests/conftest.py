"""Settings and fixtures of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from paths import DATA

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m gpu`` picks every test that a GPU backend is a parameter of, beside those that are marked themselves."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if any(getattr(value, "device", None) == torch.device("cuda") for value in parameters.values()):
            item.add_marker(pytest.mark.gpu)


# Derandomised, so that a run of the suite is a statement about the code and not about the draw.
settings.register_profile(
    "synkern", deadline=None, derandomize=True, max_examples=20, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("synkern"), derandomize=False, max_examples=500)
settings.load_profile(os.environ.get("SYNKERN_HYPOTHESIS_PROFILE", "synkern"))


# One thread a process: the cores go to pytest-xdist's workers. The tests of threads say how many they want.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compiled code of other tests would count as recompilation."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_inductor() -> Iterator[None]:
    """What inductor keeps on disk does not know when an operator of this library changed."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


def shared_data_path(name: str) -> Path:
    """The folder of a shared data set; skips the calling test where the data is not at hand."""
    path = DATA / name
    if not path.is_dir():
        pytest.skip(f"no data set {name!r}: {DATA} is not there; it is optional")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    return shared_data_path
