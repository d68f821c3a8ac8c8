"""A weight for every sample of a data set, learned from scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synkern._files import write_atomic

_log = logging.getLogger("synkern.meta")

PARAMETRIZATIONS = ("sigmoid", "clamp")
SCALES = ("none", "mean")
_FORMAT = "synkern.meta.SampleWeights/1"


class SampleWeights(nn.Module):
    """A table of n learnable sample weights w, looked up by sample number.

    =============== ==================================== =========
    parametrization weight                               range
    =============== ==================================== =========
    sigmoid         w = sigmoid(table / temperature)     0 to 1
    clamp           w = table, put back into its range   0 to cap
    =============== ==================================== =========

    One step of the outer optimization, with any optimizer of torch::

        weights = SampleWeights(len(data))
        optimizer = torch.optim.Adam(weights.parameters(), lr=0.25)
        ...
        scores = sample_scores(model, per_sample_loss, batch, direction)
        optimizer.zero_grad()
        weights.apply_scores(index, scores, scale="mean")
        optimizer.step()

    An optimizer with momentum also moves weights that were not in the batch.

    Under DistributedDataParallel every process holds the whole table, outside the wrapped model, and an optimizer for
    it. Each scores its own samples; ``apply_scores(*gather_scores(index, scores), ...)`` then makes the same gradient,
    bit by bit, on all of them, so that the tables stay equal.

    Args:
        n: number of samples.
        init: first weight of all samples, or a tensor (n,).
        parametrization: "sigmoid" or "clamp".
        temperature: of the sigmoid.
        cap: largest weight of "clamp".

    Attributes:
        table: (n,) parameter.

    Raises:
        ValueError: an argument outside its range.

    Source: SunGen (Gao et al., ICLR 2023): weights start at 0.5; the two parametrizations are its released settings'.
    """

    def __init__(
        self,
        n: int,
        init: float | Tensor = 0.5,
        parametrization: str = "sigmoid",
        temperature: float = 1.0,
        cap: float = 1.0,
    ) -> None:
        super().__init__()
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"SampleWeights: parametrization must be one of {', '.join(PARAMETRIZATIONS)}, got {parametrization!r}"
            )
        if n < 1:
            raise ValueError(f"SampleWeights: n must be at least 1, got {n}")
        for name, value in (("temperature", temperature), ("cap", cap)):
            if not 0 < value < math.inf:
                raise ValueError(f"SampleWeights: {name} must be positive and finite, got {value}")
        if parametrization == "sigmoid" and cap != 1.0:
            raise ValueError(f"SampleWeights: cap belongs to parametrization='clamp', got cap={cap} with 'sigmoid'")
        self.parametrization, self.temperature, self.cap = parametrization, float(temperature), float(cap)
        self.table = nn.Parameter(self._table_of(n, init))

    def _table_of(self, n: int, init: float | Tensor) -> Tensor:
        weight = torch.as_tensor(init, dtype=torch.float32).detach()
        if weight.dim() and weight.shape != (n,):
            raise ValueError(f"SampleWeights: init must be a number or have shape ({n},), got {tuple(weight.shape)}")
        weight = weight.expand(n).clone()
        if self.parametrization == "sigmoid":
            inside, expected = (weight > 0) & (weight < 1), "between 0 and 1, both excluded"
        else:
            inside, expected = (weight >= 0) & (weight <= self.cap), f"from 0 to {self.cap:g}"
        if not bool(inside.all()):
            wrong = weight[~inside][0].item()
            raise ValueError(f"SampleWeights: init must be {expected}, got {wrong:g}")
        return self.temperature * weight.logit() if self.parametrization == "sigmoid" else weight

    def __len__(self) -> int:
        return self.table.shape[0]

    def extra_repr(self) -> str:
        options = f"temperature={self.temperature:g}" if self.parametrization == "sigmoid" else f"cap={self.cap:g}"
        return f"{len(self)}, parametrization={self.parametrization!r}, {options}"

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Weights, differentiable with respect to the table.

        Args:
            index: sample numbers (*), int64; None for all.

        Returns:
            Weights of the shape of ``index``, float32.
        """
        entries = self.table if index is None else self.table[index]
        if self.parametrization == "sigmoid":
            return (entries / self.temperature).sigmoid()
        return entries.clamp(0.0, self.cap)

    @torch.no_grad()
    def project_(self) -> SampleWeights:
        """Put the entries of a "clamp" table that an optimizer moved out of 0 to cap back to the nearer end.

        ``apply_scores`` begins with it: outside its range an entry would have no gradient and stay for ever.
        """
        if self.parametrization == "clamp":
            self.table.clamp_(0.0, self.cap)
        return self

    def apply_scores(
        self,
        index: Tensor,
        scores: Tensor,
        *,
        normalizer: float | None = None,
        learning_rate_inner: float = 1.0,
        scale: str = "none",
        clip_norm: float | None = None,
    ) -> None:
        """Add the meta-gradient of the outer loss to ``table.grad``, for an optimizer to step along.

        dL_outer/dw_i = -(eta / D) s_i, carried through the parametrization to the table.

        Args:
            index: (N,) sample numbers; a number that occurs twice gets both gradients.
            scores: (N,) s_i = <v, grad l_i>, from ``sample_scores``.
            normalizer: D, what the inner loss sum_i w_i l_i is divided by; N if None.
            learning_rate_inner: eta, of the inner step.
            scale: "none", or "mean" to divide the scores by the mean of their magnitudes, in this call. On small data
                sets the entries of -(eta / D) s_i fall below the epsilon of Adam, which then hardly moves.
            clip_norm: largest Euclidean norm of ``table.grad`` afterwards, over all that it has gathered.

        Raises:
            TypeError, ValueError: an argument that does not fit.

        Source: SunGen (Gao et al., ICLR 2023), Eq. 11, with the factor -(eta / D) it leaves out; its released settings
        clip the norm to 3.
        """
        if scale not in SCALES:
            raise ValueError(f"apply_scores: scale must be one of {', '.join(SCALES)}, got {scale!r}")
        index, scores = self._checked(index, scores)
        divisor = max(len(scores), 1) if normalizer is None else normalizer
        if not divisor > 0:
            raise ValueError(f"apply_scores: normalizer must be positive, got {divisor}")
        if scale == "mean" and len(scores):
            magnitude = scores.abs().mean()
            scores = scores / torch.where(magnitude > 0, magnitude, 1.0)  # all zero stays zero
        self.project_()
        with torch.enable_grad():
            weight = self(index)
        torch.autograd.backward(weight, -(learning_rate_inner / divisor) * scores, inputs=[self.table])
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([self.table], clip_norm)

    def _checked(self, index: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point:
            got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"apply_scores: scores must be a floating torch.Tensor (N,), got {got}")
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"apply_scores: index must be an int64 torch.Tensor (N,), got {got}; use torch.as_tensor")
        if scores.dim() != 1 or index.shape != scores.shape:
            raise ValueError(
                f"apply_scores: index and scores must both have shape (N,), got {tuple(index.shape)} and "
                f"{tuple(scores.shape)}"
            )
        table = self.table
        return index.to(table.device, torch.int64), scores.detach().to(table.device, table.dtype)

    def inclusion_probabilities(self, budget: float) -> Tensor:
        """The probabilities with which ``sample_subset`` keeps the samples: w'_i = min(1, c w_i), c such that they sum
        to the budget.

        Water-filling: the largest weights are held at 1 and the rest scaled up, until no scaled weight passes 1. A
        sample of weight zero has probability zero, so where the budget exceeds the number of positive weights, the sum
        is that number.

        Args:
            budget: expected number of kept samples, above 0.

        Returns:
            (n,) float64 on the CPU, in the order of the weights.

        Raises:
            ValueError: the budget is not positive, a weight is NaN, or all are zero.

        Source: SunGen (Gao et al., ICLR 2023), Algorithm 1; the cap at 1 is this library's.
        """
        if not budget > 0:
            raise ValueError(f"inclusion_probabilities: budget must be positive, got {budget}")
        weight = self().detach().double().cpu()
        if bool(weight.isnan().any()):
            raise ValueError(
                "inclusion_probabilities: expected numbers as weights, got NaN for sample "
                f"{int(weight.isnan().nonzero()[0])}; look at the scores that were applied"
            )
        positive = int((weight > 0).sum())
        if not positive:
            raise ValueError("inclusion_probabilities: expected a positive weight, got zero for every sample")
        if budget >= positive:
            if positive < min(budget, len(weight)):
                _log.warning("sample_subset: only %d samples have a positive weight, budget %g", positive, budget)
            return (weight > 0).double()
        return _fill(weight, budget)

    def sample_subset(self, budget: float, generator: torch.Generator | None = None) -> Tensor:
        """Keep each sample i with probability w'_i, independently; see :meth:`inclusion_probabilities`.

        Args:
            budget: expected number of kept samples.
            generator: of the CPU; with equal seeds and tables, processes keep the same samples.

        Returns:
            The kept sample numbers, int64, ascending. The standard deviation of their number is at most the root
            of the budget.
        """
        probability = self.inclusion_probabilities(budget)
        drawn = torch.rand(len(self), dtype=torch.float64, generator=generator)
        return (drawn < probability).nonzero().flatten()

    def save(self, path: str | Path) -> None:
        """Write table and settings to a safetensors file, atomically; :meth:`load` reads it.

        Raises:
            ImportError: safetensors is not installed.
        """
        save_file = _import("safetensors.torch", "SampleWeights.save").save_file
        tensors = {"table": self.table.detach().cpu().contiguous()}
        metadata = {
            "format": _FORMAT,
            "parametrization": self.parametrization,
            "temperature": repr(self.temperature),
            "cap": repr(self.cap),
        }
        write_atomic(Path(path), lambda temporary: save_file(tensors, str(temporary), metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> SampleWeights:
        """The weights that :meth:`save` wrote, on the CPU.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the file is not one of :meth:`save`.
        """
        safe_open = _import("safetensors", "SampleWeights.load").safe_open
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"SampleWeights.load: {path} must be a file of SampleWeights.save, format {_FORMAT}, "
                    f"got {metadata.get('format')}"
                )
            table = file.get_tensor("table")
        weights = cls(
            len(table),
            parametrization=metadata["parametrization"],
            init=0.5 if metadata["parametrization"] == "sigmoid" else 0.0,
            temperature=float(metadata["temperature"]),
            cap=float(metadata["cap"]),
        )
        weights.table.data.copy_(table)
        return weights

    def to_parquet(self, path: str | Path, rows: Sequence[Any] | None = None) -> None:
        """Write a parquet file with the columns ``row`` and ``weight``, atomically.

        Args:
            path: the file.
            rows: a name or number for each sample; 0 to n - 1 if None.

        Raises:
            ImportError: pyarrow is not installed.
            ValueError: not one row for each sample.
        """
        arrow = _import("pyarrow", "SampleWeights.to_parquet")
        parquet = _import("pyarrow.parquet", "SampleWeights.to_parquet")
        names = range(len(self)) if rows is None else rows
        if len(names) != len(self):
            raise ValueError(f"SampleWeights.to_parquet: expected {len(self)} rows, got {len(names)}")
        table = arrow.table({"row": list(names), "weight": self().detach().cpu().numpy()})
        write_atomic(Path(path), lambda temporary: parquet.write_table(table, temporary, compression="zstd"))


def _fill(weight: Tensor, budget: float) -> Tensor:
    """min(1, c w) with the sum ``budget``, less than the number of positive weights."""
    ordered = weight.sort(descending=True).values
    # rest[k] = sum of all but the k largest, added from the smallest on so that small weights are not lost
    rest = ordered.flip(0).cumsum(0).flip(0)
    scale = (budget - torch.arange(len(ordered), dtype=torch.float64)) / rest
    held = int((scale * ordered > 1).long().cumprod(0).sum())
    return (weight * scale[held]).clamp_max(1.0)


def gather_scores(index: Tensor, scores: Tensor, group: Any = None) -> tuple[Tensor, Tensor]:
    """The indices and scores of all processes, in the order of their ranks; the numbers may differ between them.

    Args:
        index: (N,) sample numbers of this process.
        scores: (N,) their scores.
        group: process group; the default one if None.

    Returns:
        The concatenated indices and scores, equal on all processes. Without ``torch.distributed``: the arguments.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return index, scores
    world = torch.distributed.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=scores.device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([len(scores)], device=scores.device), group=group)
    sizes = [int(count) for count in counts]
    return _gather(index.to(scores.device), sizes, group), _gather(scores, sizes, group)


def _gather(x: Tensor, sizes: list[int], group: Any) -> Tensor:
    padded = x.new_zeros(max(sizes))
    padded[: len(x)] = x.detach()
    pieces = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def _import(name: str, caller: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{caller} needs {name.partition('.')[0]}: pip install 'synkern[recipes]'") from error
