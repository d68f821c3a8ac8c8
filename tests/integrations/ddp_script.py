"""Trains a small causal language model with DIMP and saves its losses and gradients; run under torchrun by a test.

Usage: ddp_script.py FOLDER BATCH ACCUMULATION
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
from safetensors.torch import save_file

from synkern.integrations.transformers import loss_function


def rows() -> list[dict[str, Any]]:
    return tiny.make_rows("causal", per_token=True)


def evaluation_rows() -> list[dict[str, Any]]:
    """Two labels a sample: in evaluation not every Trainer counts labels over all processes."""
    return [row | {"labels": [-100] * (len(row["input_ids"]) - 2) + row["input_ids"][-2:]} for row in rows()]


def main(folder: Path, batch: int, accumulation: int) -> None:
    torch.set_num_threads(1)
    trainer, recorder = tiny.make_trainer(
        "causal", loss_function("dimp", quality_column="quality", sample_weight_column="weight"), folder, rows(),
        evaluation=evaluation_rows(), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=batch * accumulation, average_tokens_across_devices=True,
    )  # fmt: skip
    trainer.train()
    evaluation = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        result = {"processes": torch.tensor(trainer.args.world_size), "eval_loss": torch.tensor(evaluation)}
        result |= {f"loss.{i}": torch.tensor(loss) for i, loss in enumerate(tiny.losses_of(trainer))}
        for i, gradients in enumerate(recorder.gradients):
            result |= {f"gradient.{i}.{name}": x.contiguous() for name, x in gradients.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(result, folder / "result.tmp")
        os.replace(folder / "result.tmp", folder / "result.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    gc.collect()  # the distributed model has to be gone before its process group, or its destructor may wait for ever
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
