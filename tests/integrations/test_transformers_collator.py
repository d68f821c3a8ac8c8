"""The collator that keeps columns, the labels that carry them, and what the loss function refuses."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import tiny_models as tiny
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithFlattening
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    ModelOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from synkern import fused_dimp_loss, fused_imp_loss
from synkern.integrations.transformers import LabelsWithColumns, WeightedCollator, loss_function
from synkern.registry import LOSSES


def rows_without_text(task, per_token=False):
    return [{k: v for k, v in row.items() if k != "text"} for row in tiny.make_rows(task, per_token)]


def collated(task, side, per_token):
    rows = rows_without_text(task, per_token)
    names = ["quality", "diversity", "weight"]
    return rows, WeightedCollator(tiny.make_collator(task, tiny.make_tokenizer(side)), names)(rows)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("task", ["token", "causal"])
def test_token_columns_are_padded_as_the_labels(task, side):
    rows, batch = collated(task, side, per_token=True)
    labels, columns = batch["labels"], batch["labels"].columns
    assert set(columns) == {"quality", "diversity", "weight"}
    for i, row in enumerate(rows):
        n = len(row["labels"])
        place = slice(None, n) if side == "right" else slice(labels.shape[1] - n, None)
        assert labels[i, place].tolist() == row["labels"]
        torch.testing.assert_close(columns["quality"][i, place], torch.tensor(row["quality"]))
        outside = torch.ones(labels.shape[1], dtype=torch.bool)
        outside[place] = False
        assert (labels[i][outside] == -100).all() and (columns["quality"][i][outside] == 1).all()


def test_sample_columns_and_the_rest_of_the_batch():
    rows, batch = collated("sequence", "right", per_token=False)
    plain = tiny.make_collator("sequence")(
        [{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in rows]
    )
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[k], plain[k]) for k in plain)
    torch.testing.assert_close(batch["labels"].columns["weight"], torch.tensor([row["weight"] for row in rows]))


@pytest.mark.parametrize("kind", [float, int, torch.tensor, lambda x: torch.tensor(x).numpy()])
def test_numbers_of_any_kind(kind):
    rows = [{"input_ids": [3], "labels": i, "quality": kind(value)} for i, value in enumerate((1.0, 0.0))]
    batch = WeightedCollator(tiny.make_collator("sequence"), ["quality"])(rows)
    assert batch["labels"].columns["quality"].tolist() == [1.0, 0.0]
    assert batch["labels"].columns["quality"].dtype == torch.float32


def test_labels_made_by_the_collator():
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows_without_text("masked", per_token=True)]
    inner = DataCollatorForLanguageModeling(tiny.make_tokenizer(), mlm=True, mlm_probability=0.5)
    batch = WeightedCollator(inner, ["quality"])(
        [{k: row[k] for k in ("input_ids", "attention_mask", "quality")} for row in rows]
    )
    assert batch["labels"].shape == batch["labels"].columns["quality"].shape == batch["input_ids"].shape


def test_columns_of_targets_with_a_length_of_their_own():
    rows = [{"input_ids": [3] * n, "labels": [4] * m, "quality": [0.5] * m} for n, m in ((2, 5), (4, 1))]
    batch = WeightedCollator(DataCollatorForSeq2Seq(tiny.make_tokenizer()), ["quality"])(rows)
    assert batch["labels"].columns["quality"].tolist() == [[0.5] * 5, [0.5, 1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("per_token", [False, True])
def test_samples_joined_into_one_row(per_token):
    rows = rows_without_text("causal", per_token)
    keep = ("input_ids", "labels", "quality")
    rows = [{k: row[k] for k in keep} for row in rows]
    loss = loss_function("dimp", quality_column="quality")
    joined = loss.collator(DataCollatorWithFlattening())(rows)["labels"]
    padded = loss.collator(tiny.make_collator("causal"))(rows)["labels"]
    assert joined.shape == joined.columns["quality"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    table = torch.randn(joined.shape[1], 7)
    logits = torch.zeros(*padded.shape, 7)
    start = 0
    for i, row in enumerate(rows):
        n = len(row["labels"])
        logits[i, :n] = table[start : start + n]
        start += n
    as_classes = [LabelsWithColumns.attach(torch.where(y == -100, y, y % 7), y.columns) for y in (joined, padded)]
    a = loss(CausalLMOutputWithPast(logits=table[None]), as_classes[0])
    b = loss(CausalLMOutputWithPast(logits=logits), as_classes[1])
    torch.testing.assert_close(a, b)


def test_columns_that_the_model_does_not_take_are_dropped():
    rows = [{"input_ids": [3, 4], "labels": 1, "quality": 0.5, "text": "a", "idx": 7}]
    model = tiny.make_model("sequence")
    batch = WeightedCollator(tiny.make_collator("sequence"), ["quality"], model=model)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}

    class Adapter(torch.nn.Module):
        def get_base_model(self):
            return model

        def forward(self, *args, **kwargs):
            return model(*args, **kwargs)

    assert set(WeightedCollator(tiny.make_collator("sequence"), ["quality"], model=Adapter())(rows)) == set(batch)


def row(**changes):
    return {"input_ids": [3, 4], "labels": [0, 1], "quality": [0.5, 0.5]} | changes


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([row(), row(quality=None)], ValueError, r"'quality' is missing from sample 1 .*remove_unused_columns=False"),
        ([{"input_ids": [3, 4], "labels": [0, 1]}], ValueError, "'quality' is missing from sample 0"),
        ([row(quality=[0.5])], ValueError, "one number a token, expected 2, got 1 in sample 0"),
        ([row(quality=[0.5, float("nan")])], ValueError, "must not hold NaN"),
        ([row(quality="high")], TypeError, "must hold numbers, got str"),
        ([row(quality=[0.5, None])], TypeError, "must hold numbers, got list"),
        ([row(quality=[[0.5, 0.5]])], ValueError, r"got shape \(1, 2\)"),
        ([row(), row(quality=0.5)], ValueError, "got both"),
    ],
)
def test_refused_columns(rows, error, message):
    with pytest.raises(error, match=message):
        WeightedCollator(tiny.make_collator("token"), ["quality"])(rows)


def test_refused_batches():
    with pytest.raises(ValueError, match="one number a sample because labels have shape"):
        WeightedCollator(tiny.make_collator("sequence"), ["quality"])([row(labels=1)])
    with pytest.raises(TypeError, match="return_tensors='pt'"):
        WeightedCollator(lambda rows: {"labels": [1]}, ["quality"])([row()])
    with pytest.raises(ValueError, match="expected labels for 2 samples"):
        WeightedCollator(lambda rows: {"labels": torch.zeros(3, dtype=torch.long)}, ["q"])([{"q": 1.0}, {"q": 1.0}])
    with pytest.raises(ValueError, match="truncate"):
        WeightedCollator(lambda rows: {"labels": torch.zeros(1, 1, dtype=torch.long)}, ["quality"])([row()])
    with pytest.raises(ValueError, match="join whole samples in order"):
        WeightedCollator(lambda rows: {"labels": torch.zeros(1, 3, dtype=torch.long)}, ["quality"])([row(), row()])
    with pytest.raises(TypeError, match=r"\['quality'\]"):
        WeightedCollator(tiny.make_collator("token"), "quality")
    with pytest.raises(ValueError, match="padding_side"):
        WeightedCollator(tiny.make_collator("token"), ["quality"], padding_side="both")


def test_labels_keep_their_columns_through_moves_only():
    columns = {"sample": torch.rand(4), "token": torch.rand(4, 3)}
    labels = LabelsWithColumns.attach(torch.arange(12).view(4, 3), columns)
    for moved in (labels.to("cpu"), labels.to(torch.int32), labels.detach(), labels.clone(), copy.deepcopy(labels)):
        assert moved.tolist() == labels.tolist()
        assert all(torch.equal(moved.columns[k], columns[k]) for k in columns)
        assert all(c.dtype == torch.float32 for c in moved.columns.values())
    assert labels.to("meta").columns["token"].device.type == "meta"
    halves = torch.cat([labels[:1], labels[1:]], dim=0)
    assert torch.equal(halves.columns["token"], columns["token"])
    assert labels[1:3].columns["sample"].tolist() == columns["sample"][1:3].tolist()
    for plain in (labels[..., 1:], labels.ne(-100), labels + 1, labels[0], torch.cat([labels, labels], dim=1)):
        assert type(plain) is torch.Tensor


OUTPUTS = {
    SequenceClassifierOutput: False, TokenClassifierOutput: False, MaskedLMOutput: False, Seq2SeqLMOutput: False,
    CausalLMOutputWithPast: True,
}  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_output_decides_whether_labels_are_shifted(output):
    shape = (6,) if output is SequenceClassifierOutput else (6, 4)
    logits, target, quality = torch.randn(*shape, 5), torch.randint(5, shape), torch.rand(shape)
    target.view(-1)[2] = -100
    labels = LabelsWithColumns.attach(target, {"q": quality})
    got = loss_function("dimp", quality_column="q")(output(logits=logits), labels)
    if OUTPUTS[output]:
        logits, target, quality = logits[:, :-1], target[:, 1:], quality[:, 1:]
    torch.testing.assert_close(got, fused_dimp_loss(logits, target, quality))


@pytest.mark.parametrize("shift", [False, True])
def test_tuples_and_unknown_outputs_need_to_be_told(shift):
    @dataclass
    class ScoredOutput(ModelOutput):
        logits: torch.Tensor | None = None

    logits, target = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    for outputs in ((logits,), ScoredOutput(logits=logits)):
        with pytest.raises(ValueError, match="pass shift_labels=True"):
            loss_function("focal")(outputs, target)
        got = loss_function("focal", shift_labels=shift)(outputs, target)
        as_class = CausalLMOutputWithPast if shift else TokenClassifierOutput
        torch.testing.assert_close(got, loss_function("focal")(as_class(logits=logits), target))


def test_logarithms_options_and_count():
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    columns = {"a": torch.rand(6).log(), "b": torch.rand(6)}
    loss = loss_function("imp", log_quality_column="a", diversity_column="b", max_weight=1.5)
    assert loss.columns == ("a", "b")
    outputs, labels = SequenceClassifierOutput(logits=logits), LabelsWithColumns.attach(target, columns)
    expected = fused_imp_loss(
        logits, target, log_quality=columns["a"], diversity=columns["b"], max_weight=1.5, reduction="sum"
    )
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=4), expected / 4)
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=torch.tensor(8)), expected / 8)
    torch.testing.assert_close(loss(outputs, labels), expected / 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "hinge"}, ValueError, "one of cross_entropy, rce, .*dimp, got 'hinge'"),
        ({"name": "dimp"}, ValueError, "expected quality_column or log_quality_column, got neither"),
        ({"name": "imp", "quality_column": "q"}, ValueError, "expected diversity_column or log_diversity_column"),
        ({"name": "dimp", "quality_column": "q", "log_quality_column": "l"}, ValueError, "got both"),
        ({"name": "dimp", "quality_column": "q", "diversity_column": "d"}, ValueError, "got diversity_column"),
        ({"name": "focal", "margin_column": "m"}, ValueError, "among sample_weight_column, got margin_column"),
        ({"name": "dimp", "quality_column": torch.ones(3)}, TypeError, "must be the name of a column, got Tensor"),
        ({"name": "focal", "gama": 1.0}, TypeError, "expected options among gamma, .*got gama"),
        ({"name": "focal", "reduction": "sum"}, TypeError, "reduction cannot be set"),
        ({"name": "dimp", "quality_column": "q", "return_weights": True}, TypeError, "return_weights cannot be set"),
        ({"name": "focal", "evaluation_loss": "dimp"}, ValueError, "without operands"),
        ({"name": "focal", "evaluation_loss": "nll"}, ValueError, "got 'nll'"),
    ],
)
def test_refused_loss_functions(arguments, error, message):
    with pytest.raises(error, match=message):
        loss_function(**arguments)


def test_refused_calls():
    loss = loss_function("dimp", quality_column="q", evaluation_loss="cross_entropy")
    outputs, target = SequenceClassifierOutput(logits=torch.randn(3, 2)), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"columns 'q', got none; use loss.collator"):
        loss(outputs, target)
    with torch.no_grad():
        torch.testing.assert_close(loss(outputs, target), loss_function("cross_entropy")(outputs, target))
    with torch.no_grad(), pytest.raises(ValueError, match="evaluation_loss='cross_entropy'"):
        loss_function("dimp", quality_column="q")(outputs, target)
    with pytest.raises(ValueError, match="got None"):
        loss(outputs, None)
    with pytest.raises(ValueError, match="with logits, got last_hidden_state"):
        loss({"last_hidden_state": torch.zeros(1)}, target)
    with pytest.raises(ValueError, match="torchrun"):
        loss_function("focal")(outputs, target, num_items_in_batch=torch.ones(2, 1))


def test_every_registered_loss_has_a_loss_function():
    for name, spec in LOSSES.items():
        columns = {f"{operand}_column": f"column of {operand}" for operand in spec.operands}
        loss = loss_function(name, **columns, sample_weight_column="w")
        assert loss.columns == (*columns.values(), "w")
        assert repr(loss).startswith(f"loss_function({name!r}")
