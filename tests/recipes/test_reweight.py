"""`synkern reweight` from files to report: outputs, noise found, determinism, resumption, errors."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from recipe_rows import make_rows, write_jsonl
from typer.testing import CliRunner

from synkern.cli import app
from synkern.recipes import sungen, training
from synkern.recipes.checkpoint import Interrupted, load_state
from synkern.recipes.data import LabelSet, read_labelled
from synkern.recipes.detection import area_under_roc, detection, precision_at_wrong, wrong_labels
from synkern.recipes.errors import RecipeError
from synkern.recipes.models import load_classifier
from synkern.recipes.reweight import METHODS, read_data, run_reweight
from synkern.recipes.settings import ReweightSettings, TrainSettings
from synkern.recipes.train import run_train

MakeSettings = Callable[..., ReweightSettings]
runner = CliRunner()


@pytest.fixture
def make(sources: dict[str, str], tmp_path: Path) -> MakeSettings:
    def settings(**options: Any) -> ReweightSettings:
        defaults = {
            "train": sources["train"],
            "test": sources["test"],
            "out": str(tmp_path / "out"),
            "seeds": 1,
            "iterations": 3,
            "inner_epochs": 1,
            "inner_batch_size": 16,
            "outer_size": 30,
            "epochs": 2,
            "batch_size": 16,
            "flip_labels": 0.3,
            "threads": 1,
            "device": "cpu",
        }
        return ReweightSettings(**{**defaults, **options})

    return settings


def run(settings: ReweightSettings, **options: Any) -> dict[str, Any]:
    return run_reweight(settings, show_progress=False, **options)


def everything(folder: Path) -> dict[str, Any]:
    """All numbers of an output folder; two runs that did the same have equal ones, bit for bit."""
    results = json.loads((folder / "results.json").read_text())
    for name in ("train", "test", "real", "out"):
        results["settings"].pop(name)
    for part in results["data"].values():
        part.pop("source")
    tensors = {}
    for path in sorted(folder.glob("runs/*.safetensors")):
        for name, value in load_state(path).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{path.name}/{name}"] = value.numpy().tobytes()
    files = {name: (folder / name).read_bytes() for name in ("table.md", "rows.md", "subset.jsonl", "weights.parquet")}
    return {"results": results, "tensors": tensors, "files": files}


def test_outputs(make: MakeSettings, draws_plots: None) -> None:
    settings = make(seeds=2, methods=("sungen", "zerogen"), iterations=6)
    results = run(settings)
    folder = settings.folder
    assert json.loads((folder / "results.json").read_text()) == results
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [
        ("sungen", 0), ("zerogen", 0), ("sungen", 1), ("zerogen", 1),
    ]  # fmt: skip
    assert results["scaled"] == {"outer_rows": 30, "inner_epochs": 1, "inner_batch_size": 16, "budget_rows": 30}
    first = results["runs"][0]
    assert first["recorded"] == [0, 5, 6]
    assert [record["iteration"] for record in first["iterations"]] == [1, 2, 3, 4, 5, 6]
    assert ["test" in record for record in first["iterations"]] == [False] * 4 + [True, True]
    assert first["detection"]["wrong"] == 18 and first["detection"]["rows"] == 60
    assert first["iterations"][-1]["auroc"] == first["detection"]["auroc"]
    last = [r["epochs"][-1]["test"]["accuracy"] for r in results["runs"] if r["method"] == "zerogen"]
    assert results["summary"]["zerogen"]["last_epoch"]["accuracy"]["mean"] == pytest.approx(np.mean(last))
    for name in ("accuracy_by_epoch", "weights_by_iteration", "outer_loss"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.md").read_text()
    assert "| SunGen " in table and "| plain (ZeroGen) " in table and "18 wrong labels among 60 rows" in table
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["sungen-seed0", "zerogen-seed0"]
    assert not list((folder / "checkpoints").iterdir()) and not list(folder.rglob(".*"))
    classifier = load_classifier(folder / "models" / "sungen-seed0")
    test = read_data(settings).test.frame
    accuracy = (classifier.predict_probability(test["text"].tolist()).argmax(1) == test["label"]).mean()
    assert accuracy == pytest.approx(first["epochs"][-1]["test"]["accuracy"])


def test_the_weights_of_every_row_and_their_history(make: MakeSettings) -> None:
    settings = make(seeds=2)
    run(settings)
    table = pd.read_parquet(settings.folder / "weights.parquet")
    assert len(table) == 2 * 60 and set(table["method"]) == {"sungen"}
    history = np.stack(table["history"])
    assert history.shape == (120, 2), "iterations 0 and 3"
    assert (history[:, 0] == 0.5).all()
    np.testing.assert_array_equal(history[:, 1], table["weight"])
    assert table["weight"].between(0, 1).all() and table["weight"].nunique() > 30
    assert (table["label"] != table["true_label"]).sum() == 2 * 18
    seeds = [part["weight"].to_numpy() for _, part in table.groupby("seed")]
    assert not np.array_equal(*seeds)


def test_subset_and_shown_rows_follow_the_weights(make: MakeSettings) -> None:
    settings = make(budget=0.5, parametrization="clamp", outer_learning_rate=0.5, iterations=6)
    run(settings)
    weight = pd.read_parquet(settings.folder / "weights.parquet")["weight"]
    lines = (settings.folder / "subset.jsonl").read_text().splitlines()
    chosen = pd.Series([json.loads(line)["weight"] for line in lines])
    labels = LabelSet(("0", "1"))
    assert len(read_labelled(str(settings.folder / "subset.jsonl"), labels=labels)) == len(chosen)
    assert 15 < len(chosen) < 45, "about half of 60"
    assert (chosen > 0).all() and chosen.mean() > weight.mean()
    rows = (settings.folder / "rows.md").read_text()
    removed, selected = rows.split("# Selected")
    shown = [float(line.split("|")[-2]) for line in removed.splitlines() if line.endswith(" |") and "0." in line]
    np.testing.assert_allclose(shown, weight.sort_values()[: len(shown)], atol=6e-5)
    assert f"{weight.max():.4f}" in selected


def test_weights_find_flipped_labels(make: MakeSettings, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "more.jsonl", make_rows(200, seed=5))
    training = {"inner_epochs": 5, "learning_rate": 5e-3, "epochs": 1}
    settings = make(train=str(path), iterations=4, outer_size=200, flip_labels=0.2, **training)
    results = run(settings)
    found = results["runs"][0]["detection"]
    assert found["wrong"] == 40
    assert found["auroc"] > 0.9 and found["precision_at_wrong"] > 0.7
    assert found["mean_weight_wrong"] < 0.5 < found["mean_weight_right"]


@pytest.mark.parametrize(
    "options",
    [
        {"outer_loss": "mae"},
        {"outer_loss": "gce", "parametrization": "clamp"},
        {"outer_loss": "ce", "temperature": 2.0},
        {"outer_top": 0.5},
        {"restart": "continue"},
        {"restart": "same"},
        {"class_balance": False},
        {"inner_batch_size": 8},
        {"paper_scale": True},
        {"score_method": "contraction"},
        {"score_method": "double_backward"},
        {"score_in_training": True, "restart": "same"},
        {"train_on_subset": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_variant_changes_the_weights_or_the_training(
    options: dict[str, Any], make: MakeSettings, plain_variant: dict[str, Any]
) -> None:
    base = make(iterations=2, epochs=1)
    if not plain_variant:
        run(base)
        plain_variant.update(load_state(base.folder / "runs" / "sungen-seed0.safetensors"))
    settings = dataclasses.replace(base, out=base.out + "2", **options)
    run(settings)
    saved = load_state(settings.folder / "runs" / "sungen-seed0.safetensors")
    difference = (saved["weight"] - plain_variant["weight"]).abs().max()
    if "train_on_subset" in options:
        assert difference == 0
        assert int(saved["probability"].shape[1]) == 60
        assert 10 < int(plain_variant["probability"].shape[1]) < 60
    elif "score_method" in options:
        assert difference < 0.02, "another way to the same scores"
    else:
        assert difference > 0


@pytest.fixture(scope="module")
def plain_variant() -> dict[str, Any]:
    return {}


def test_the_direction_is_that_of_plain_autograd(make: MakeSettings) -> None:
    """One iteration by hand: scores from one backward pass per row, then one step of Adam."""
    from synkern import fused_cross_entropy, fused_rce_loss
    from synkern.recipes.models import logits_of
    from synkern.recipes.reweight import Reweighting

    settings = make(iterations=1).resolved()
    experiment = Reweighting(settings, read_data(settings), show_progress=False)
    loop = sungen.SunGen(experiment._task("sungen", 0))
    weights, _ = loop.run()
    model, train = loop.model, experiment.encoded["train"]
    parameters = list(model.parameters())
    inputs, target = loop.task.outer.batch(np.arange(30), torch.device("cpu"))
    outer = fused_rce_loss(logits_of(model, inputs), target, reduction="sum")
    direction = torch.autograd.grad(outer, parameters)
    scores = []
    for row in range(60):
        inputs, target = train.batch([row], torch.device("cpu"))
        loss = fused_cross_entropy(logits_of(model, inputs), target)
        gradients = torch.autograd.grad(loss, parameters)
        scores.append(sum(float((v * g).sum()) for v, g in zip(direction, gradients, strict=True)))
    # each class around its mean, divided by the mean magnitude; the slope of the sigmoid at 0.5; the norm clipped at 3
    score, target = torch.tensor(scores), train.target
    for label in (0, 1):
        score[target == label] -= score[target == label].mean()
    gradient = 0.25 * score / score.abs().mean()
    gradient *= min(1.0, 3 / float(gradient.norm()))
    # Adam's first step
    expected = torch.sigmoid(0.25 * gradient / (gradient.abs() + 3 / 60**0.5))
    torch.testing.assert_close(weights().detach(), expected, rtol=1e-3, atol=1e-4)
    assert weights().detach().std() > 0.01


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [2, 6, 13], ids=["first iteration", "second iteration", "final training"])
@pytest.mark.parametrize("variant", [{}, {"restart": "continue", "score_in_training": True}], ids=["plain", "variant"])
def test_resumed_runs_end_with_the_same_bits(
    step: int, variant: dict[str, Any], make: MakeSettings, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    settings = make(iterations=2, methods=("sungen", "confidence"), **variant)
    key = settings.restart
    if key not in whole:
        undisturbed = dataclasses.replace(settings, out=settings.out + "2")
        run(undisturbed)
        whole[key] = everything(undisturbed.folder)
    original, count = training.Fit._step, 0

    def counted(self: training.Fit, rows: np.ndarray) -> float:
        nonlocal count
        count += 1
        if count == step:
            _stop()
        return original(self, rows)

    monkeypatch.setattr(training.Fit, "_step", counted)
    with pytest.raises(Interrupted):
        run(settings)
    monkeypatch.undo()
    assert not (settings.folder / "results.json").exists()
    run(settings, resume=True)
    assert everything(settings.folder) == whole[key]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return {}


def test_a_signal_while_scores_are_computed(make: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make(iterations=2)
    original = sungen.sample_scores

    def stopping(*arguments: Any, **options: Any) -> torch.Tensor:
        _stop()
        return original(*arguments, **options)

    monkeypatch.setattr(sungen, "sample_scores", stopping)
    with pytest.raises(Interrupted):
        run(settings)
    monkeypatch.setattr(sungen, "sample_scores", original)
    run(settings, resume=True)
    run(dataclasses.replace(settings, out=settings.out + "2"))
    assert everything(settings.folder) == everything(Path(settings.out + "2"))


def test_finished_seeds_and_methods_are_kept(
    make: MakeSettings, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make(methods=("zerogen",))
    first = run(settings)
    steps = []
    original = training.Fit._step
    monkeypatch.setattr(
        training.Fit, "_step", lambda self, rows: steps.append(self.name) or original(self, rows)
    )
    results = run(dataclasses.replace(settings, methods=("zerogen", "label-smoothing")), resume=True)
    assert set(steps) == {"label-smoothing seed 0"}
    assert results["runs"][0] == first["runs"][0]
    with pytest.raises(RecipeError, match="expected --iterations 3 as in the earlier run, got 4"):
        run(dataclasses.replace(settings, iterations=4), resume=True)
    other = TrainSettings(train=settings.train, real=sources["real"], test=settings.test, out=settings.out)
    with pytest.raises(RecipeError, match="got one of another command"):
        run_train(other, resume=True, show_progress=False)


def test_a_transformers_model_with_dropout(make: MakeSettings, tiny_bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make(model=tiny_bert, methods=("sungen", "l2rw"), iterations=2, epochs=1)
    modes = []
    original = sungen.sample_scores

    def noted(model: torch.nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
        modes.append(model.training)
        return original(model, *arguments, **options)

    monkeypatch.setattr(sungen, "sample_scores", noted)
    results = run(settings)
    assert modes and not any(modes), "scores are taken without dropout"
    assert results["settings"]["learning_rate"] == 2e-5
    again = dataclasses.replace(settings, out=settings.out + "2", score_method="contraction")
    run(again)
    one, other = (load_state(s.folder / "runs" / "sungen-seed0.safetensors")["weight"] for s in (settings, again))
    torch.testing.assert_close(one, other, rtol=0, atol=0.01)
    assert one.std() > 0.01


def test_trusted_rows_can_be_the_outer_rows(make: MakeSettings, sources: dict[str, str]) -> None:
    plain = run(make(iterations=2))
    settings = make(iterations=2, real=sources["real"], out=make().out + "2")
    results = run(settings)
    assert results["scaled"]["outer_rows"] == 30 and results["data"]["real"]["rows"] == 30
    assert results["runs"][0]["iterations"][0]["outer_loss"] != plain["runs"][0]["iterations"][0]["outer_loss"]


def test_defaults_follow_the_size_of_the_data(make: MakeSettings) -> None:
    settings = make(outer_size=None, inner_epochs=None, inner_batch_size=None, epochs=None, batch_size=32).resolved()
    assert [settings.outer_rows(rows) for rows in (60, 10_000, 200_000, 2_000_000)] == [60, 1_000, 10_000, 50_000]
    inner = {rows: (settings.inner(rows).batch_size, settings.inner(rows).epochs) for rows in (1_000_000, 7_000, 800)}
    assert inner == {1_000_000: (32, 1), 7_000: (16, 1), 800: (8, 4)}
    assert [settings.budget_rows(rows) for rows in (60, 1)] == [30, 1]
    assert dataclasses.replace(settings, budget=500.0).budget_rows(10_000) == 500
    assert settings.resolved().epochs == 5
    bert = dataclasses.replace(settings, model="some/encoder", epochs=None, learning_rate=None).resolved()
    assert (bert.epochs, bert.learning_rate) == (3, 2e-5)
    assert (bert.inner(2_000).batch_size, bert.inner(2_000).epochs) == (32, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "adam"], "--method: expected one or more of sungen, zerogen, l2rw"),
        (["--iterations", "-1"], "--iterations: expected a whole number from 0, got -1"),
        (["--outer-loss", "dimp"], "--outer-loss: expected one of rce, mae, gce, ce, got 'dimp'"),
        (["--outer-top", "1.5"], "--outer-top: expected a number above 0 and at most 1, got 1.5"),
        (["--flip-labels", "1"], "--flip-labels: expected a share from 0 and below 1, got 1.0"),
        (["--budget", "0"], "--budget: expected a number above 0, got 0.0"),
        (["--score-method", "guess"], "--score-method: expected one of auto, contraction"),
        (["--parametrization", "relu"], "--parametrization: expected one of sigmoid, clamp"),
        (["--score-in-training"], "--score-in-training: expected --restart same or continue, got fresh"),
        (["--restart", "never"], "--restart: expected one of fresh, same, continue, got 'never'"),
        (["--limit-real", "5"], "--limit-real: expected --real as well"),
    ],
)
def test_options_that_cannot_be_used(options: list[str], message: str, sources: dict[str, str], tmp_path: Path) -> None:
    command = ["reweight", "--train", sources["train"], "--test", sources["test"], "--out", str(tmp_path / "out")]
    result = runner.invoke(app, [*command, *options])
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output


def test_the_command_prints_the_table_and_can_be_killed_and_resumed(sources: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--train", sources["train"], "--test", sources["test"], "--seeds", "1", "--threads", "1"]
    options += ["--iterations", "400", "--inner-epochs", "1", "--epochs", "1", "--flip-labels", "0.3"]
    command = [sys.executable, "-m", "synkern.cli", "reweight", *options, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint = out / "checkpoints" / "sungen-seed0-weights.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert f"interrupted; go on with: synkern reweight --resume --out {out}" in messages
    assert 1 <= len(load_state(checkpoint)["trace"]["records"]) < 400
    refused = runner.invoke(app, ["reweight", "--resume", "--out", str(out), "--iterations", "3"])
    assert refused.exit_code == 1 and "expected --iterations 400" in refused.output
    finished = runner.invoke(app, ["reweight", *options, "--out", str(out), "--iterations", "2", "--overwrite"])
    assert finished.exit_code == 0, finished.output
    assert "| SunGen " in finished.output and "train: 60 rows" in finished.output


def test_help_names_the_options_and_every_method() -> None:
    result = runner.invoke(app, ["reweight", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in ("--train", "--test", "--out", "--flip-labels", "--budget", "--iterations", "--resume", *METHODS):
        assert word in result.output


def test_detection() -> None:
    wrong = np.array([True, True, False, False, False])
    assert area_under_roc(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), wrong) == 1.0
    assert area_under_roc(np.array([0.5, 0.4, 0.3, 0.2, 0.1]), wrong) == 0.0
    assert area_under_roc(np.ones(5), wrong) == 0.5
    # of 6 pairs: 0.1 is below three, 0.3 is below one, above one, and ties with one
    assert area_under_roc(np.array([0.1, 0.3, 0.2, 0.3, 0.4]), wrong) == pytest.approx(4.5 / 6)
    assert area_under_roc(np.ones(5), np.zeros(5, bool)) is None
    assert precision_at_wrong(np.ones(5), np.zeros(5, bool)) is None
    assert precision_at_wrong(np.array([0.1, 0.3, 0.2, 0.4, 0.5]), wrong) == 0.5
    assert precision_at_wrong(np.array([0.1, 0.2, 0.2, 0.2, 0.2]), wrong) == pytest.approx((1 + 1 / 4) / 2)
    found = detection(np.array([0.0, 0.5, 1.0, 1.0, 0.5]), wrong)
    assert (found["mean_weight_wrong"], found["mean_weight_right"]) == (0.25, pytest.approx(2.5 / 3))
    assert wrong_labels(pd.DataFrame({"label": [1, 0]})) is None
    assert wrong_labels(pd.DataFrame({"label": [1, 0], "true_label": [1, 1]})).tolist() == [False, True]
