"""`synkern train` from files to report: outputs, determinism, resumption after every kind of break, caching."""

from __future__ import annotations

import dataclasses
import json
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
from safetensors.torch import load_file

from synkern.recipes import training
from synkern.recipes.checkpoint import Interrupted, load_state
from synkern.recipes.errors import RecipeError
from synkern.recipes.models import load_classifier
from synkern.recipes.report import WEIGHTS
from synkern.recipes.settings import TrainSettings
from synkern.recipes.train import Experiment, read_data, run_train

MakeSettings = Callable[..., TrainSettings]


def run(settings: TrainSettings, **options: Any) -> dict[str, Any]:
    return run_train(settings, show_progress=False, **options)


def everything(folder: Path) -> dict[str, Any]:
    """All numbers of an output folder; two runs that did the same have equal ones, bit for bit."""
    results = json.loads((folder / "results.json").read_text())
    # where the files were is no number
    for name in ("train", "real", "test", "out"):
        results["settings"].pop(name)
    for part in results["data"].values():
        part.pop("source")
    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("models/*/model.safetensors")):
        tensors |= {f"{path.parent.name}/{name}": value for name, value in load_file(path).items()}
    for path in sorted(folder.glob("runs/*.safetensors")):
        state = load_state(path)
        tensors |= {f"{path.name}/{name}": state[name] for name in ("weight", "probability")}
    return {"results": results, "tensors": {name: value.numpy().tobytes() for name, value in tensors.items()}}


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Makes the given optimisation step of the whole run end with an action."""

    def install(step: int, action: Callable[[], None]) -> None:
        original, count = training.Fit._step, 0

        def counted(self: training.Fit, rows: np.ndarray) -> float:
            nonlocal count
            count += 1
            if count == step:
                action()
            return original(self, rows)

        monkeypatch.setattr(training.Fit, "_step", counted)

    return install


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """Results of runs without a break, each computed once."""
    return {}


def test_outputs(make_settings: MakeSettings, draws_plots: None) -> None:
    settings = make_settings(seeds=2)
    results = run(settings)
    folder = settings.folder
    assert json.loads((folder / "results.json").read_text()) == results
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [
        (method, seed) for seed in (0, 1) for method in ("ce", "focal", "imp", "dimp")
    ]
    for record in results["runs"]:
        assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2]
        accuracies = [epoch["real"]["accuracy"] for epoch in record["epochs"]]
        assert record["best_epoch_on_real"] == int(np.argmax(accuracies)) + 1
    last = [r["epochs"][-1]["test"]["accuracy"] for r in results["runs"] if r["method"] == "dimp"]
    summary = results["summary"]["dimp"]["last_epoch"]["accuracy"]
    assert summary["mean"] == pytest.approx(np.mean(last)) and summary["std"] == pytest.approx(np.std(last, ddof=1))
    assert (summary["min"], summary["max"]) == (min(last), max(last))
    assert [(c["checker"], c["seed"]) for c in results["checkers"]] == [
        (kind, seed) for seed in (0, 1) for kind in ("quality", "diversity")
    ]
    for name in ("accuracy_by_epoch", "weights_histogram", "weights_by_group", "checker_scores"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.md").read_text()
    assert all(f"| {method} " in table for method in ("ce", "focal", "imp", "dimp", "quality checker"))
    assert not list(folder.rglob(".*")), "no temporary file may be left"
    assert not list((folder / "checkpoints").iterdir())
    assert sorted(path.name for path in (folder / "models").iterdir()) == [
        "ce-seed0", "dimp-seed0", "focal-seed0", "imp-seed0",
    ]  # fmt: skip


def test_weights_of_every_row(make_settings: MakeSettings) -> None:
    settings = make_settings()
    run(settings)
    table = pd.read_parquet(settings.folder / WEIGHTS)
    rows = len(read_data(settings.resolved()).train)
    assert rows == 80
    assert len(table) == rows * 4 * 2
    assert table[["weight", "probability"]].notna().all(axis=None)
    by = {method: part for method, part in table.groupby("method")}
    assert (by["ce"]["weight"] == 1).all()
    np.testing.assert_allclose(by["focal"]["weight"], (1 - by["focal"]["probability"]) ** 2, rtol=1e-5)
    np.testing.assert_allclose(by["imp"]["weight"], by["imp"]["quality"] / by["imp"]["diversity"], rtol=1e-5)
    np.testing.assert_allclose(by["dimp"]["weight"], by["dimp"]["quality"] / by["dimp"]["probability"], rtol=1e-5)
    truth = table[(table["method"] == "ce") & (table["epoch"] == 1)]
    assert truth["noise"].value_counts().to_dict() == {"duplicated": 40, "original": 20, "swapped": 20}


def test_max_weight_caps_imp_and_dimp(make_settings: MakeSettings) -> None:
    settings = make_settings(methods=("imp", "dimp"), max_weight=0.9)
    run(settings)
    table = pd.read_parquet(settings.folder / WEIGHTS)
    assert table.groupby("method")["weight"].max().to_dict() == pytest.approx({"dimp": 0.9, "imp": 0.9})


def test_the_noisy_rows_are_written_and_can_be_used_again(make_settings: MakeSettings) -> None:
    settings = make_settings(methods=("ce",))
    run(settings)
    noisy = str(settings.folder / "train_noisy.jsonl")
    again = dataclasses.replace(settings, train=noisy, noise=False, out=settings.out + "2")
    one, other = read_data(settings), read_data(again)
    columns = ["text", "label", "noise", "true_label"]
    pd.testing.assert_frame_equal(one.train.frame[columns], other.train.frame[columns])


def test_it_learns(make_settings: MakeSettings, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", make_rows(200, seed=5))
    write_jsonl(tmp_path / "real.jsonl", make_rows(100, seed=6))
    results = run(make_settings(methods=("dimp",), noise=False, epochs=4, checker_epochs=6, batch_size=8))
    assert results["runs"][0]["epochs"][-1]["test"]["accuracy"] >= 0.95


def test_the_same_run_twice_gives_the_same_bits(make_settings: MakeSettings) -> None:
    settings = make_settings()
    run(settings)
    before = everything(settings.folder)
    again = dataclasses.replace(settings, out=settings.out + "2")
    torch.manual_seed(99)  # what came before must not matter
    run(again)
    assert everything(again.folder) == before
    other = dataclasses.replace(settings, out=settings.out + "3", noise_seed=1)
    assert run(other)["runs"] != before["results"]["runs"]


def _stop() -> None:
    signal.raise_signal(signal.SIGINT)


def _crash() -> None:
    raise RuntimeError("power cut")


# the quality checker takes 4 steps, the diversity checker and each method 10: in imp, dimp, at an epoch's end
@pytest.mark.parametrize(
    ("step", "action"), [(3, _stop), (17, _stop), (30, _stop), (8, _crash), (24, _crash), (34, _crash)]
)
def test_resumption_gives_the_same_bits(
    step: int, action: Callable[[], None], make_settings: MakeSettings,
    interrupt_at: Callable[[int, Callable[[], None]], None], undisturbed: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    broken = make_settings(methods=("imp", "dimp"))
    if "imp" not in undisturbed:
        whole = dataclasses.replace(broken, out=broken.out + "2")
        run(whole)
        undisturbed["imp"] = everything(whole.folder)
    interrupt_at(step, action)
    with pytest.raises(Interrupted if action is _stop else RuntimeError):
        run(broken)
    assert not (broken.folder / "results.json").exists()
    monkeypatch.undo()
    steps = _count_steps(monkeypatch)
    run(broken, resume=True)
    assert everything(broken.folder) == undisturbed["imp"]
    total = 4 + 3 * 10
    if action is _stop:  # saved after the very step
        assert len(steps) == total - step
    else:  # only the steps of the epoch that was not finished are repeated
        assert total - step < len(steps) <= total - step + 5


def _count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    original, steps = training.Fit._step, []

    def counted(self: training.Fit, rows: np.ndarray) -> float:
        steps.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(training.Fit, "_step", counted)
    return steps


def test_a_signal_during_the_last_evaluation_is_not_lost(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(methods=("ce",))
    original = Experiment.evaluate
    calls = []

    def evaluate(self: Experiment, model: torch.nn.Module) -> dict[str, Any]:
        calls.append(model)
        if len(calls) == 2:
            _stop()
        return original(self, model)

    monkeypatch.setattr(Experiment, "evaluate", evaluate)
    with pytest.raises(Interrupted):
        run(settings)
    steps = _count_steps(monkeypatch)
    assert len(run(settings, resume=True)["runs"][0]["epochs"]) == 2
    assert not steps


def _command(settings: TrainSettings) -> list[str]:
    options: list[str] = []
    for name, value in settings.to_json().items():
        if value is True:
            options.append(f"--{name.replace('_', '-')}")
        elif value not in (None, False):
            text = ",".join(value) if name == "methods" else str(value)
            options += ["--method" if name == "methods" else f"--{name.replace('_', '-')}", text]
    return [sys.executable, "-m", "synkern.cli", "train", *options]


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_killed_process_can_be_resumed(
    signum: signal.Signals, code: int, make_settings: MakeSettings, undisturbed: dict[str, Any]
) -> None:
    settings = make_settings(methods=("dimp",), epochs=30)
    broken = dataclasses.replace(settings, out=settings.out + "2")
    process = subprocess.Popen(_command(broken), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoint = broken.folder / "checkpoints" / "dimp-seed0.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signum)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == code, messages
    if signum != signal.SIGKILL:
        assert f"interrupted; go on with: synkern train --resume --out {broken.out}" in messages
        assert "Traceback" not in messages
    done = load_state(checkpoint)["state"]["epoch"]
    assert 1 <= done < 30
    if "dimp" not in undisturbed:
        run(settings)
        undisturbed["dimp"] = everything(settings.folder)
    run(broken, resume=True)
    assert everything(broken.folder) == undisturbed["dimp"]


def test_checkers_are_fitted_once(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []
    original = training.Fit.run

    def recorded(self: training.Fit) -> training.FitState:
        fitted.append(self.name)
        return original(self)

    monkeypatch.setattr(training.Fit, "run", recorded)
    settings = make_settings(methods=("imp", "dimp"))
    first = run(settings)
    checkers = ["quality checker seed 0", "diversity checker seed 0"]
    assert sorted(fitted) == sorted([*checkers, "imp seed 0", "dimp seed 0"])
    fitted.clear()
    assert run(settings, overwrite=True) == first
    assert fitted == ["imp seed 0", "dimp seed 0"]
    fitted.clear()
    run(dataclasses.replace(settings, gamma=3.0, epochs=1), overwrite=True)
    assert not set(checkers) & set(fitted), "neither gamma nor the epochs of the task model decide a checker's scores"
    fitted.clear()
    run(dataclasses.replace(settings, batch_size=20), overwrite=True)
    assert set(checkers) < set(fitted), "the batch size does"
    fitted.clear()
    run(dataclasses.replace(settings, methods=("ce", "focal")), overwrite=True)
    assert fitted == ["ce seed 0", "focal seed 0"], "nothing is fitted that no method asks for"


def test_methods_and_seeds_can_be_added(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(methods=("ce",))
    first = run(settings)
    steps = _count_steps(monkeypatch)
    more = dataclasses.replace(settings, methods=("ce", "focal"), seeds=2)
    results = run(more, resume=True)
    assert len(steps) == 3 * 10
    assert results["runs"][0] == first["runs"][0]
    assert len(results["runs"]) == 4


def test_an_output_folder_is_never_mixed_up(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings(methods=("ce",), epochs=1)
    with pytest.raises(RecipeError, match="expected an earlier run"):
        run(settings, resume=True)
    run(settings)
    with pytest.raises(RecipeError, match="go on with --resume, start again with --overwrite"):
        run(settings)
    with pytest.raises(RecipeError, match="expected --epochs 1 as in the earlier run, got 3"):
        run(dataclasses.replace(settings, epochs=3), resume=True)
    write_jsonl(Path(settings.test), make_rows(10, seed=77))
    with pytest.raises(RecipeError, match="expected the same test rows as in the earlier run"):
        run(settings, resume=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(RecipeError, match="got other files"):
        run(dataclasses.replace(settings, out=str(foreign)), overwrite=True)
    assert (foreign / "thesis.tex").read_text() == "precious"


def test_a_mistake_in_the_data_does_not_cost_the_old_results(make_settings: MakeSettings) -> None:
    settings = make_settings(methods=("ce",), epochs=1)
    run(settings)
    before = everything(settings.folder)
    with pytest.raises(RecipeError):
        run(dataclasses.replace(settings, test="absent.jsonl"), overwrite=True)
    assert everything(settings.folder) == before


def test_a_checkpoint_of_other_content_is_refused(make_settings: MakeSettings) -> None:
    settings = make_settings(methods=("ce",))
    run(settings)
    path = settings.folder / "runs" / "ce-seed0.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RecipeError, match=r"ce-seed0\.safetensors: expected a state saved by synkern"):
        run(settings, resume=True)


def test_test_rows_among_the_training_rows_are_reported(make_settings: MakeSettings) -> None:
    settings = make_settings(methods=("ce",), epochs=1, noise=False)
    write_jsonl(Path(settings.test), make_rows(60, seed=0)[:7] + make_rows(40, seed=2))
    with pytest.warns(UserWarning, match=r"7 texts of .*test\.jsonl \(test\) also stand in .*train\.jsonl \(train\)"):
        results = run(settings)
    assert len(results["warnings"]) == 1


def test_a_saved_model_predicts_as_it_did(make_settings: MakeSettings) -> None:
    settings = make_settings(methods=("dimp",), noise=False)
    results = run(settings)
    classifier = load_classifier(settings.folder / "models" / "dimp-seed0")
    assert classifier.labels == ("0", "1")
    test = read_data(settings).test.frame
    probability = classifier.predict_probability(test["text"].tolist(), batch_size=7)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)
    accuracy = (probability.argmax(1) == test["label"]).mean()
    assert accuracy == pytest.approx(results["runs"][0]["epochs"][-1]["test"]["accuracy"])
    with pytest.raises(RecipeError, match="expected a model saved by `synkern train`"):
        load_classifier(settings.folder)


def _pairs(path: str) -> None:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    write_jsonl(Path(path), [{"text_a": "one text", "text_b": row["text"], "label": row["label"]} for row in rows])


def test_text_pairs(make_settings: MakeSettings) -> None:
    settings = make_settings(methods=("dimp",))
    for name in ("train", "real"):
        _pairs(getattr(settings, name))
    with pytest.raises(RecipeError, match="expected text pairs as in the training data, got single texts"):
        run(settings)
    _pairs(settings.test)
    run(settings, overwrite=True)
    classifier = load_classifier(settings.folder / "models" / "dimp-seed0")
    encoded = classifier.tokenizer("one film", "was fine")["input_ids"]
    assert classifier.tokenizer.convert_ids_to_tokens(encoded) == ["one", "film", "[SEP]", "was", "fine"]
    assert classifier.predict_probability(["one text"], ["the film was fine"]).shape == (1, 2)


def test_a_transformers_model_with_dropout_resumes_to_the_same_bits(
    make_settings: MakeSettings, tiny_bert: str, interrupt_at: Callable[[int, Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = make_settings(methods=("dimp",), model=tiny_bert, epochs=3)
    results = run(settings)
    assert results["settings"]["learning_rate"] == 6e-5
    broken = dataclasses.replace(settings, out=settings.out + "2")
    interrupt_at(4 + 7, _stop)
    with pytest.raises(Interrupted):
        run(broken)
    monkeypatch.undo()
    run(broken, resume=True)
    assert everything(broken.folder) == everything(settings.folder)
    classifier = load_classifier(settings.folder / "models" / "dimp-seed0")
    test = read_data(settings).test.frame
    accuracy = (classifier.predict_probability(test["text"].tolist()).argmax(1) == test["label"]).mean()
    assert accuracy == pytest.approx(results["runs"][0]["epochs"][-1]["test"]["accuracy"])


def test_a_model_that_does_not_exist(make_settings: MakeSettings, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected bilstm, or a transformers model"):
        run(make_settings(model=str(tmp_path / "no-model")))
