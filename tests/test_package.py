"""The package as a whole: imports, typing, documentation, and the examples of the README."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from paths import ROOT

import synkern
from synkern.registry import LOSSES

IMPORT_TIME = """
import time, torch
start = time.perf_counter()
import synkern
print(time.perf_counter() - start)
"""


def run_python(program: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_adds_little_to_importing_torch() -> None:
    # The least of three: what else the machine does only ever adds.
    assert min(float(run_python(IMPORT_TIME)) for _ in range(3)) < 0.3


def test_importing_does_not_load_what_training_needs() -> None:
    loaded = run_python("import synkern, sys; print(*sys.modules)").split()
    heavy = {
        "transformers",
        "datasets",
        "pandas",
        "pyarrow",
        "matplotlib",
        "typer",
        "accelerate",
        "triton",
        "torch._dynamo",
    }
    assert heavy.isdisjoint(loaded)


def test_importing_warns_of_nothing() -> None:
    run_python("import torch, warnings; warnings.simplefilter('error'); import synkern")


def test_typed_and_versioned() -> None:
    assert resources.files("synkern").joinpath("py.typed").is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", synkern.__version__)


def test_all_names_are_there_and_no_others() -> None:
    assert len(set(synkern.__all__)) == len(synkern.__all__)
    for name in synkern.__all__:
        assert hasattr(synkern, name), name
    for spec in LOSSES.values():
        assert getattr(synkern, spec.function.__name__) is spec.function
        assert getattr(synkern, spec.module.__name__) is spec.module
        assert {spec.function.__name__, spec.module.__name__} <= set(synkern.__all__)


def test_registry_is_of_one_piece() -> None:
    for name, spec in LOSSES.items():
        assert spec.name == name
        assert spec.variants[0] == {}
        parameters = inspect.signature(spec.function).parameters
        assert list(parameters)[:2] == ["logits", "target"]
        assert list(parameters)[2 : 2 + len(spec.operands)] == list(spec.operands)
        for options in spec.variants:
            assert set(options) <= set(parameters)
    assert len({str(case) for case in cases()}) == len(cases())


@pytest.mark.parametrize("name", [spec.function.__name__ for spec in LOSSES.values()])
def test_a_loss_documents_formula_arguments_result_errors_and_source(name: str) -> None:
    function = getattr(synkern, name)
    text = inspect.getdoc(function) or ""
    for part in (".. math::", "Args:", "Returns:", "Raises:", "Source:"):
        assert part in text, part
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", text), parameter
    assert "(*, C)" in text
    assert not re.search(r"<\w+>", text), "a placeholder that was not filled in"


@pytest.mark.parametrize("name", synkern.__all__)
def test_public_names_are_documented_and_typed(name: str) -> None:
    thing = getattr(synkern, name)
    if not callable(thing):
        return
    assert (inspect.getdoc(thing) or "").strip()
    if inspect.isclass(thing):
        assert "synkern.fused_" in (thing.__doc__ or ""), "names the function that it is the module of"
    target = thing.__init__ if inspect.isclass(thing) else thing
    for parameter in list(inspect.signature(target).parameters.values())[int(inspect.isclass(thing)) :]:
        assert parameter.annotation is not parameter.empty, parameter.name


def python_blocks(path: Path) -> list[Any]:
    """The fenced python examples of a text, each by the number of its first line."""
    text = path.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [pytest.param(match[1], id=f"line {text[: match.start()].count(chr(10)) + 1}") for match in found]


README = python_blocks(ROOT / "README.md")


def test_readme_has_examples() -> None:
    assert README


@pytest.mark.parametrize("example", README)
def test_readme_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "__readme__"})


MACHINE_PATH = re.compile(r"/(work|tmp|home|root)/")


@pytest.mark.parametrize("path", sorted((ROOT / "synkern").rglob("*.py")), ids=lambda path: path.name)
def test_sources_name_no_folder_of_this_machine(path: Path) -> None:
    assert not MACHINE_PATH.search(path.read_text())
