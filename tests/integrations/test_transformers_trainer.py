"""A real Trainer against a plain loop over samples: losses, gradients, accumulation, processes, evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import tiny_models as tiny
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from transformers.modeling_outputs import CausalLMOutputWithPast, TokenClassifierOutput

from synkern.integrations.transformers import LabelsWithColumns, loss_function
from synkern.registry import LOSSES

OPERANDS = {
    name: {operand: operand for operand in spec.operands} | {"sample_weight": "weight"} for name, spec in LOSSES.items()
}


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch):
    """Some versions of the Trainer leave the precision of one test in the environment of the next."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)


def make_loss(name, operands=None, **options):
    columns = {f"{operand}_column": column for operand, column in (operands or OPERANDS[name]).items()}
    return loss_function(name, **columns, **options)


def check_against_plain(task, name, folder, per_token=False, operands=None, options=None, **arguments):
    operands = operands or OPERANDS[name]
    rows = tiny.make_rows(task, per_token)
    trainer, recorder = tiny.make_trainer(task, make_loss(name, operands, **(options or {})), folder, rows, **arguments)
    trainer.train()
    losses, gradients, model = tiny.plain_training(task, name, rows, operands, options)
    tiny.assert_same_gradients(recorder.gradients, gradients)
    # Some versions of the Trainer round what they log to four digits.
    assert tiny.losses_of(trainer) == pytest.approx(losses, rel=1e-4, abs=6e-5)
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_trains_a_sequence_classifier_as_a_plain_loop(name, tmp_path):
    check_against_plain("sequence", name, tmp_path)


@pytest.mark.parametrize("per_token", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("task", ["token", "causal", "masked"])
def test_tokens_train_as_a_plain_loop(task, per_token, tmp_path):
    check_against_plain(task, "dimp", tmp_path, per_token)


@pytest.mark.parametrize(("batch", "steps"), [(4, 2), (1, 8)])
@pytest.mark.parametrize("task", ["causal", "sequence"])
def test_gradient_accumulation_gives_the_gradient_of_one_batch(task, batch, steps, tmp_path):
    check_against_plain(
        task, "imp", tmp_path, per_token=task == "causal",
        per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
    )  # fmt: skip


@pytest.mark.parametrize("task", tiny.TASKS)
def test_cross_entropy_is_what_the_trainer_does_by_itself(task, tmp_path):
    rows, accumulation = tiny.make_rows(task), {}
    if task == "causal":  # the other models' own losses ignore num_items_in_batch, and change with accumulation
        accumulation = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    runs = []
    for loss in (None, loss_function("cross_entropy")):
        trainer, recorder = tiny.make_trainer(
            task, loss, tmp_path, rows, remove_unused_columns=loss is None, **accumulation
        )
        trainer.train()
        runs.append((tiny.losses_of(trainer), recorder.gradients))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4, abs=6e-5)
    tiny.assert_same_gradients(runs[1][1], runs[0][1])


def test_options_of_the_loss_and_class_weight(tmp_path):
    class_weight = torch.linspace(0.5, 2.0, tiny.CLASSES)
    options = {"label_smoothing": 0.1, "class_weight": class_weight}
    check_against_plain("token", "cross_entropy", tmp_path, options=options)


def test_worker_processes_keep_the_columns(tmp_path):
    check_against_plain("token", "dimp", tmp_path, per_token=True, dataloader_num_workers=1)


def test_left_padding(tmp_path):
    rows = tiny.make_rows("causal", per_token=True)
    loss = make_loss("dimp")
    collator = tiny.make_collator("causal", tiny.make_tokenizer("left"))
    for row in rows:
        row["position_ids"] = list(range(len(row["input_ids"])))
    trainer, recorder = tiny.make_trainer("causal", loss, tmp_path, rows, collator=_padding_positions(collator))
    trainer.train()
    tiny.assert_same_gradients(recorder.gradients, tiny.plain_training("causal", "dimp", rows, OPERANDS["dimp"])[1])


def _padding_positions(collator):
    """Left-padded samples keep their own positions; the tokenizer pads only what it knows."""

    def collate(rows):
        positions = [row.pop("position_ids") for row in rows]
        batch = collator(rows)
        length = batch["input_ids"].shape[1]
        batch["position_ids"] = torch.tensor([[0] * (length - len(p)) + p for p in positions])
        return batch

    collate.tokenizer = collator.tokenizer
    return collate


def test_bf16_autocast(tmp_path):
    rows = tiny.make_rows("causal", per_token=True)
    trainer, recorder = tiny.make_trainer("causal", make_loss("dimp"), tmp_path, rows, bf16=True)
    trainer.train()
    losses, gradients, _ = tiny.plain_training("causal", "dimp", rows, OPERANDS["dimp"])
    assert tiny.losses_of(trainer) == pytest.approx(losses, rel=2e-2)
    got, expected = recorder.gradients[0], gradients[0]
    error = sum((got[n] - expected[n]).square().sum() for n in expected)
    assert 0 < error < 1e-3 * sum(x.square().sum() for x in expected.values())  # 0 would mean no bfloat16 was used


def test_bf16_model(tmp_path):
    rows = tiny.make_rows("token")
    model = tiny.make_model("token").to(torch.bfloat16)
    trainer, _ = tiny.make_trainer("token", make_loss("dimp"), tmp_path, rows, model=model)
    trainer.train()
    losses, _, _ = tiny.plain_training("token", "dimp", rows, OPERANDS["dimp"])
    assert tiny.losses_of(trainer) == pytest.approx(losses, rel=5e-2)


def test_iterable_data_set(tmp_path):
    rows = tiny.make_rows("token", per_token=True)
    trainer, recorder = tiny.make_trainer("token", make_loss("dimp"), tmp_path, rows)
    trainer.train_dataset = IterableDataset.from_generator(lambda: iter(rows * tiny.STEPS))
    trainer.train()
    tiny.assert_same_gradients(recorder.gradients, tiny.plain_training("token", "dimp", rows, OPERANDS["dimp"])[1])


@pytest.mark.parametrize("task", tiny.TASKS)
def test_evaluation_with_columns(task, tmp_path):
    seen = {}

    def metrics(prediction):
        seen["labels"] = prediction.label_ids
        return {"kept": int((prediction.label_ids != -100).sum())}

    rows = tiny.make_rows(task, per_token=task != "sequence")
    trainer, _ = tiny.make_trainer(task, make_loss("dimp"), tmp_path, rows, evaluation=rows, compute_metrics=metrics)
    result = trainer.evaluate()
    with torch.no_grad():
        expected = tiny.plain_loss(task, trainer.model.eval(), "dimp", rows, OPERANDS["dimp"])
    assert result["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert isinstance(seen["labels"], np.ndarray) and seen["labels"].dtype == np.int64
    assert result["eval_kept"] == sum(int((np.array(row["labels"]) != -100).sum()) for row in rows)


def test_evaluation_without_columns(tmp_path):
    rows = tiny.make_rows("sequence")
    names = ("input_ids", "attention_mask", "labels")
    clean = [{name: row[name] for name in names} for row in tiny.make_rows("sequence", seed=1)]
    loss = make_loss("dimp", evaluation_loss="cross_entropy")
    trainer, _ = tiny.make_trainer("sequence", loss, tmp_path, rows, evaluation=clean, eval_strategy="epoch")
    trainer.train()
    expected = tiny.plain_loss("sequence", trainer.model.eval(), "cross_entropy", clean, {}).item()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == tiny.STEPS
    assert logged[-1] == pytest.approx(expected, rel=1e-4, abs=6e-5)


def test_prediction_without_labels(tmp_path):
    rows = tiny.make_rows("sequence")
    trainer, _ = tiny.make_trainer("sequence", make_loss("dimp"), tmp_path, rows)
    bare = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in rows]
    assert trainer.predict(Dataset.from_list(bare)).predictions.shape == (tiny.SAMPLES, tiny.CLASSES)


@pytest.mark.parametrize("evaluation_loss", [None, "cross_entropy"])
def test_dropped_columns_are_refused_with_the_remedy(evaluation_loss, tmp_path):
    loss = make_loss("dimp", evaluation_loss=evaluation_loss)
    trainer, _ = tiny.make_trainer("sequence", loss, tmp_path, tiny.make_rows("sequence"), remove_unused_columns=True)
    with pytest.raises(ValueError, match=r"quality.*remove_unused_columns=False"):
        trainer.train()


def test_two_processes_equal_one(tmp_path):
    """The same script with one process and a batch of 8, and with 2 processes, batches of 2, 2 accumulation steps."""
    script = Path(__file__).with_name("ddp_script.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, str(script), str(tmp_path / "two"), "2", "2"], capture_output=True, text=True, timeout=180,
        env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    import ddp_script

    ddp_script.main(tmp_path / "one", batch=tiny.SAMPLES, accumulation=1)
    one, two = (load_file(tmp_path / n / "result.safetensors") for n in ("one", "two"))
    assert one.pop("processes").item() == 1 and two.pop("processes").item() == 2
    assert one.keys() == two.keys() and {"loss.0", "loss.1", "eval_loss"} <= one.keys()
    for name in one:
        tolerance = {"rtol": 1e-4, "atol": 6e-5} if "loss" in name else {"rtol": 1e-4, "atol": 2e-6}
        torch.testing.assert_close(two[name], one[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    plain, gradients, _ = tiny.plain_training("causal", "dimp", ddp_script.rows(), OPERANDS["dimp"])
    assert [two["loss.0"].item(), two["loss.1"].item()] == pytest.approx(plain, rel=1e-4, abs=6e-5)
    prefix = "gradient.0."
    got = {n.removeprefix(prefix): x for n, x in two.items() if n.startswith(prefix)}
    tiny.assert_same_gradients([got], gradients[:1])


class _LargeOutputs(TorchDispatchMode):
    """Operators that allocate a tensor about as large as the logits, or as the logits without one token."""

    def __init__(self, logits):
        super().__init__()
        storage = logits.untyped_storage()
        self.known, self.bytes, self.found = {storage.data_ptr()}, storage.nbytes() * 3 // 4, []
        self.alive = []  # so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.bytes:
                if x.untyped_storage().data_ptr() not in self.known:
                    self.found.append(str(func))
                self.known.add(x.untyped_storage().data_ptr())
                self.alive.append(x)
        return result


@pytest.mark.parametrize("output", [CausalLMOutputWithPast, TokenClassifierOutput])
def test_logits_are_not_copied(output):
    logits = torch.randn(3, 7, 50, requires_grad=True)
    columns = {"quality": torch.rand(3), "weight": torch.rand(3, 7)}
    labels = LabelsWithColumns.attach(torch.randint(50, (3, 7)), columns)
    with _LargeOutputs(logits) as large:
        loss = make_loss("dimp")(output(logits=logits), labels, num_items_in_batch=torch.tensor(20))
        torch.autograd.grad(loss, logits)
    assert len(large.found) == 1, large.found  # the gradient itself
