"""Small models, data and a plain training loop that the tests of the Trainer share."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from synkern.integrations.transformers import TrainerLoss
from synkern.registry import LOSSES

VOCABULARY, CLASSES, SAMPLES, STEPS = 37, 5, 8, 2
TASKS = ("sequence", "token", "causal", "masked")


def make_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]", padding_side=padding_side
    )


def make_model(task: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if task == "causal":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0, bos_token_id=2, eos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=CLASSES,
    )  # fmt: skip
    models = {
        "sequence": BertForSequenceClassification, "token": BertForTokenClassification, "masked": BertForMaskedLM,
    }  # fmt: skip
    return models[task](config)


def make_rows(task: str, per_token: bool = False, n: int = SAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """Samples of different lengths with labels, the columns of every loss, and a text that no model takes."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        length = draw.randint(3, 9)
        tokens = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        labels: Any = draw.randrange(CLASSES)
        if task == "token":
            labels = [draw.choice([-100, *range(CLASSES)]) for _ in tokens]
        elif task == "causal":
            # Nothing predicts the first token, but not every Trainer leaves it out of num_items_in_batch.
            labels = [-100 if i == 0 or draw.random() < 0.2 else t for i, t in enumerate(tokens)]
        elif task == "masked":
            labels = [t if draw.random() < 0.5 else -100 for t in tokens]
        row = {"input_ids": tokens, "attention_mask": [1] * length, "labels": labels, "text": "never read"}
        for name in ("quality", "diversity", "weight"):
            values = [draw.uniform(0.1, 1.0) for _ in tokens]
            row[name] = values if per_token else values[0]
        rows.append(row)
    return rows


def make_collator(task: str, tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    tokenizer = tokenizer or make_tokenizer()
    return DataCollatorWithPadding(tokenizer) if task == "sequence" else DataCollatorForTokenClassification(tokenizer)


class Recorder(TrainerCallback):
    """Keeps the gradients of every optimiser step, after accumulation and after averaging over processes."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make_trainer(
    task: str, loss: TrainerLoss | None, folder: Path, rows: list[dict[str, Any]], *, evaluation: Any = None,
    model: nn.Module | None = None, compute_metrics: Any = None, collator: Any = None, **arguments: Any,
) -> tuple[Trainer, Recorder]:  # fmt: skip
    """A Trainer whose optimiser steps each see all rows, in whatever order, so that a plain loop can follow it."""
    model, collator = model or make_model(task), collator or make_collator(task)
    recorder = Recorder()
    settings = {
        "per_device_train_batch_size": len(rows), "per_device_eval_batch_size": len(rows), "max_steps": STEPS,
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **(settings | arguments)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if evaluation is None else Dataset.from_list(evaluation),
        data_collator=collator if loss is None else loss.collator(collator, model=model),
        compute_loss_func=loss,
        compute_metrics=compute_metrics,
        callbacks=[recorder],
    )
    return trainer, recorder


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain_loss(
    task: str, model: nn.Module, name: str, rows: list[dict[str, Any]], operands: dict[str, str],
    options: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """The mean over labels, one sample at a time with no padding, from the loss's plain-torch definition."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits.reshape(-1, _width(task)).float()
        labels = torch.tensor(row["labels"]).reshape(-1)
        columns = {k: torch.as_tensor(row[column]).expand(labels.shape) for k, column in operands.items()}
        if task == "causal":
            logits, labels, columns = logits[:-1], labels[1:], {k: v[1:] for k, v in columns.items()}
        kept = labels != -100
        columns = {k: v[kept] for k, v in columns.items()}
        weight = columns.pop("sample_weight", torch.ones(int(kept.sum())))
        loss = LOSSES[name].reference(logits[kept], labels[kept], **columns, **(options or {}))
        total = total + (weight * loss).sum()
        count += int(kept.sum())
    return total / count


def _width(task: str) -> int:
    return CLASSES if task in ("sequence", "token") else VOCABULARY


def plain_training(
    task: str, name: str, rows: list[dict[str, Any]], operands: dict[str, str], options: dict[str, Any] | None = None
) -> tuple[list[float], list[dict[str, Tensor]], nn.Module]:
    """Losses and gradients of plain gradient descent over all rows, and the trained model."""
    model = copy.deepcopy(make_model(task)).train()
    losses, gradients = [], []
    for _ in range(STEPS):
        model.zero_grad()
        loss = plain_loss(task, model, name, rows, operands, options)
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return losses, gradients, model


def assert_same_gradients(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(got) == len(expected) > 0
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.keys() == b.keys()
        assert max(x.abs().max() for x in b.values()) > 1e-3, "the gradients to compare vanish"
        for name in b:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name, s=step: f"{n}, step {s}: {m}"
            )
