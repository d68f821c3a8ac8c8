"""Scores a batch on several processes and steps the weights; run by a test, one process for each rank.

Usage: meta_ddp_script.py FOLDER RANK WORLD PORT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import meta_models as small
import torch
from safetensors.torch import save_file
from torch import nn

from synkern.meta import SampleWeights, gather_scores, outer_direction, sample_scores, scored_step

METHODS = ("contraction", "forward", "difference", "double_backward")


def part(batch: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    return {name: x.tensor_split(world)[rank] for name, x in batch.items()}


def main(folder: Path, rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    workload = small.mlp()
    model: nn.Module = workload.model
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
        model = nn.parallel.DistributedDataParallel(model)
    batch = part(workload.batch, rank, world)
    index = torch.arange(small.SAMPLES).tensor_split(world)[rank]
    direction = outer_direction(model, [batch], lambda m, b: workload.loss(m, b).sum(), normalize="norm")
    result = {f"direction.{name}": v for name, v in direction.items()}
    result |= {f"scores.{method}": sample_scores(model, workload.loss, batch, direction, method=method)
               for method in METHODS}  # fmt: skip

    weights = SampleWeights(small.SAMPLES + 2)
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        scores = sample_scores(model, workload.loss, batch, direction)
        weights.apply_scores(*gather_scores(index, scores), scale="mean", clip_norm=0.5)
        optimizer.step()
    result["weights"] = weights().detach()
    result["subset"] = weights.sample_subset(3, torch.Generator().manual_seed(0))

    # the model still trains as it did: no_sync and the hooks of the wrapper are as before
    with scored_step(model, direction) as step:
        losses = workload.loss(model, batch)
        step.reduce(losses, reduction="mean", normalizer=small.SAMPLES / world).backward()
    result["scores.step"] = step.scores
    result |= {f"gradient.{n.removeprefix('module.')}": p.grad for n, p in model.named_parameters()}
    save_file({name: x.contiguous() for name, x in result.items()}, folder / f"{world}-{rank}.safetensors")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
