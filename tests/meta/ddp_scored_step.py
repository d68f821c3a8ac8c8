"""Scored and reweighted steps under DistributedDataParallel; run under torchrun by a test. Usage: FOLDER"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import meta_models as small
import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from synkern.meta import outer_direction, scored_step

WEIGHTS = torch.tensor([0.0, 1.5, -0.5, 0.25, 2.0, 1.0], dtype=torch.float64)


def workload() -> small.Workload:
    torch.manual_seed(3)
    return small.encoder().to(torch.float64)


def steps(work: small.Workload, model: nn.Module, rows: slice, processes: int) -> dict[str, Tensor]:
    """Scores, weights and gradients of some rows; the gradients of all rows, as DDP averages them."""
    batch = {name: x[rows] for name, x in work.batch.items()}
    direction = outer_direction(model, [batch], lambda m, b: work.loss(m, b).sum())
    result = {f"direction.{name}": v for name, v in direction.items()}
    for reweight in (None, lambda s: s.clamp(min=0)):
        model.zero_grad()
        with scored_step(model, direction, reweight=reweight) as step:
            given = {} if reweight else {"sample_weight": WEIGHTS[rows]}
            loss = step.reduce(work.loss(model, batch), normalizer=small.SAMPLES / processes, **given)
            loss.backward()
        kind = "weighted" if reweight is None else "reweighted"
        result[f"scores.{kind}"] = step.scores
        if reweight:
            result["weights"] = step.weights
        result |= {
            f"{kind}.{name.removeprefix('module.')}": p.grad.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
    return result


def one_process() -> dict[str, Tensor]:
    work = workload()
    return steps(work, work.model, slice(0, small.SAMPLES), 1)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    work = workload()
    model = nn.parallel.DistributedDataParallel(work.model)
    share = small.SAMPLES // processes
    result = steps(work, model, slice(rank * share, (rank + 1) * share), processes)
    for name in ("scores.weighted", "scores.reweighted", "weights"):
        parts = [torch.empty_like(result[name]) for _ in range(processes)]
        distributed.all_gather(parts, result[name])
        result[name] = torch.cat(parts)
    if rank == 0:
        save_file(result, folder / "result.tmp")
        os.replace(folder / "result.tmp", folder / "result.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    gc.collect()  # the distributed model has to be gone before its process group, or its destructor may wait for ever
    distributed.barrier()
    distributed.destroy_process_group()
