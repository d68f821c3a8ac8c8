"""What is measured of the meta-gradient: workloads, and the ways to do each. One more is a row of ``WORKLOADS``."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from synkern import fused_cross_entropy, fused_rce_loss
from synkern.meta import outer_direction, sample_scores
from synkern.meta.step import scored_step
from synkern.recipes.models import BiLSTMClassifier, BiLSTMConfig, EncodedText
from synkern.recipes.sungen import ScoredFit, cross_entropies, weighted_cross_entropy
from synkern.recipes.training import Fit, FitSettings, sorted_batches

Batch = dict[str, Tensor]
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Of the models and batches; ``smoke`` only has to run, ``base`` is BERT-base under bf16 autocast, for a GPU."""

    layers: int = 6
    width: int = 384
    vocabulary: int = 8192
    rows: int = 32  # the batch size of the papers
    tokens: int = 64
    clean_rows: int = 8
    autocast: bool = False


SIZES = {
    "full": Size(),
    "smoke": Size(layers=1, width=32, vocabulary=64, rows=4, tokens=8, clean_rows=2),
    "base": Size(layers=12, width=768, vocabulary=30522, rows=64, tokens=128, clean_rows=16, autocast=True),
}
AUTOCAST_TOLERANCE = 0.1  # 16-bit activations, whatever a way allows in float32


@dataclass(frozen=True)
class Way:
    """One way to do a workload's work.

    Attributes:
        run: what is timed; returns what is compared, or None where there is nothing to compare.
        tolerance: how far from the workload's reference way, relative to the largest entry; None: not compared.
        missing: why it cannot run here.
    """

    run: Callable[[], Tensor | None]
    tolerance: float | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Goal:
    """``way`` takes at most ``at_most`` of ``against``'s time (or ``peak memory``)."""

    way: str
    against: str
    at_most: float
    memory: bool = False


@dataclass(frozen=True)
class Workload:
    """Ways to the same result.

    Attributes:
        about: for the heading.
        prepare: builds the ways, by name, for a size and a device.
        reference: the way whose result is right; the others are held against it.
        unit: the way in whose time the others are also shown.
        goals: what is asked.
    """

    about: str
    prepare: Callable[[Size, torch.device], dict[str, Way]]
    reference: str
    unit: str
    goals: tuple[Goal, ...] = field(default=())


def encoder(size: Size) -> nn.Module:
    """A BERT-type classifier with fused attention and no dropout, so that all ways see the same function."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 64),
        intermediate_size=4 * size.width,
        max_position_embeddings=size.tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=4,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return BertForSequenceClassification(config)


def make_batch(size: Size, rows: int, device: torch.device, seed: int) -> Batch:
    """Random tokens, every row's padding of another length."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, size.vocabulary, (rows, size.tokens), generator=generator)
    lengths = torch.randint(size.tokens // 2, size.tokens + 1, (rows, 1), generator=generator)
    mask = (torch.arange(size.tokens) < lengths).long()
    labels = torch.randint(0, 4, (rows,), generator=generator)
    return {"input_ids": (tokens * mask).to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def logits_of(model: nn.Module, batch: Batch, parameters: Parameters | None = None) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model(**inputs) if parameters is None else functional_call(model, parameters, kwargs=inputs)
    return output if isinstance(output, Tensor) else output.logits


def per_sample_loss(model: nn.Module, batch: Batch) -> Tensor:
    return fused_cross_entropy(logits_of(model, batch), batch["labels"], reduction="none")


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    return fused_cross_entropy(logits_of(model, batch), batch["labels"])


def plain_step(model: nn.Module, batch: Batch) -> None:
    model.zero_grad()
    mean_loss(model, batch).backward()


def forward_pass(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        per_sample_loss(model, batch)


def largest_gradient(model: nn.Module) -> Tensor:
    """The gradient of the last matrix, which every way to a training step must agree on."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None and p.dim() == 2]
    return gradients[-1].detach().clone()


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def encoder_scores(size: Size, device: torch.device) -> dict[str, Way]:
    return _scores(encoder(size).to(device), size, device, methods=("contraction", "forward", "difference"))


def bilstm_scores(size: Size, device: torch.device) -> dict[str, Way]:
    torch.manual_seed(0)
    model = BiLSTMClassifier(BiLSTMConfig(size.vocabulary, 4)).to(device)
    return _scores(model, size, device, methods=("contraction", "difference"))


def _scores(model: nn.Module, size: Size, device: torch.device, methods: tuple[str, ...]) -> dict[str, Way]:
    model.train()
    batch, outer = (make_batch(size, size.rows, device, seed) for seed in (1, 2))
    direction = outer_direction(model, [outer], mean_loss)

    def score(method: str) -> Callable[[], Tensor]:
        return lambda: sample_scores(model, per_sample_loss, batch, direction, method=method)

    ways = {
        "forward pass": Way(lambda: forward_pass(model, batch)),
        "training step": Way(lambda: plain_step(model, batch)),
        "double backward": Way(score("double_backward"), tolerance=0.0),
    }
    return ways | {m: Way(score(m), tolerance=1e-2 if m == "difference" else 1e-4) for m in methods}


def encoder_step(size: Size, device: torch.device) -> dict[str, Way]:
    model = encoder(size).to(device).train()
    batch, outer = (make_batch(size, size.rows, device, seed) for seed in (1, 2))
    direction = outer_direction(model, [outer], mean_loss)

    def plain() -> Tensor:
        plain_step(model, batch)
        return largest_gradient(model)

    def scored() -> Tensor:
        model.zero_grad()
        with scored_step(model, direction) as step:
            step.reduce(per_sample_loss(model, batch)).backward()
        return largest_gradient(model)

    def apart() -> Tensor:
        sample_scores(model, per_sample_loss, batch, direction, method="contraction")
        return plain()

    return {
        "training step": Way(plain, tolerance=0.0),
        "scored_step": Way(scored, tolerance=1e-4),
        "step, then sample_scores": Way(apart, tolerance=1e-4),
    }


def _l2rw_weights(scores: Tensor) -> Tensor:
    weights = scores.clamp(min=0)
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def encoder_reweighted(size: Size, device: torch.device) -> dict[str, Way]:
    """A step of L2RW (Ren et al. 2018): weights from the gradient of a few clean rows, then the weighted step."""
    model = encoder(size).to(device).train()
    batch, clean = make_batch(size, size.rows, device, 1), make_batch(size, size.clean_rows, device, 2)

    def weighted_step(weights: Tensor) -> Tensor:
        model.zero_grad()
        (per_sample_loss(model, batch) * weights).sum().backward()
        return largest_gradient(model)

    def one_pass() -> Tensor:
        direction = outer_direction(model, [clean], mean_loss)
        model.zero_grad()
        with scored_step(model, direction, reweight=_l2rw_weights) as step:
            step.reduce(per_sample_loss(model, batch), reduction="sum").backward()
        return largest_gradient(model)

    def double_backward() -> Tensor:
        parameters = dict(model.named_parameters())
        weights = torch.zeros(size.rows, device=device, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH):
            inner = (per_sample_loss(model, batch) * weights).sum()
            gradients = torch.autograd.grad(inner, parameters.values(), create_graph=True)
            moved = {name: p - g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
            outer = fused_cross_entropy(logits_of(model, clean, moved), clean["labels"])
            (gradient,) = torch.autograd.grad(outer, weights)
        return weighted_step(_l2rw_weights(-gradient))

    def higher_package() -> Tensor:
        import higher

        weights = torch.zeros(size.rows, device=device, requires_grad=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with sdpa_kernel(SDPBackend.MATH), higher.innerloop_ctx(model, optimizer) as (copy, differentiable):
            differentiable.step((per_sample_loss(copy, batch) * weights).sum())
            (gradient,) = torch.autograd.grad(mean_loss(copy, clean), weights)
        return weighted_step(_l2rw_weights(-gradient))

    return {
        "training step": Way(lambda: plain_step(model, batch)),
        "double backward": Way(double_backward, tolerance=0.0),
        "scored_step(reweight)": Way(one_pass, tolerance=1e-3),
        "higher": Way(higher_package, tolerance=1e-3, missing=_missing("higher")),
    }


def _texts(size: Size, rows: int) -> EncodedText:
    generator = np.random.default_rng(0)
    lengths = generator.integers(size.tokens // 2, size.tokens + 1, rows)
    tokens = [generator.integers(1, size.vocabulary, length).tolist() for length in lengths]
    target = torch.from_numpy(generator.integers(0, 4, rows))
    return EncodedText({"input_ids": tokens, "attention_mask": [[1] * n for n in lengths]}, target,
                       {"input_ids": 0, "attention_mask": 0})


def sungen_iteration(size: Size, device: torch.device) -> dict[str, Way]:
    """A tenth of an iteration over 10,000 rows: one epoch of the task model, v of a tenth of the rows, all scores."""
    texts = _texts(size, size.rows * 32)
    torch.manual_seed(0)
    fresh = BiLSTMClassifier(BiLSTMConfig(size.vocabulary, 4)).to(device)
    settings = FitSettings(epochs=1, batch_size=size.rows, learning_rate=1e-3, optimizer="adam", linear_decay=False)
    batches = [texts.batch(rows, device) for rows in sorted_batches(texts.lengths, np.arange(len(texts)))]
    weight = torch.full((len(texts),), 0.5, device=device)

    def direction(model: nn.Module) -> dict[str, Tensor]:
        outer = sorted_batches(texts.lengths, np.arange(len(texts) // 10))
        return outer_direction(model, (texts.batch(rows, device) for rows in outer), _outer_loss)

    old_direction = direction(fresh)

    def epoch() -> nn.Module:
        model = copy.deepcopy(fresh)
        Fit(model, texts, weighted_cross_entropy(weight), settings, seed=0, name="", device=device,
            announce=False).run()
        return model

    def then_scores(method: str) -> Tensor:
        model = epoch()
        v = direction(model)
        return torch.cat([sample_scores(model, cross_entropies, batch, v, method=method) for batch in batches])

    def scored_epoch() -> None:
        fit = ScoredFit(copy.deepcopy(fresh), texts, settings, weight=weight, direction=old_direction, seed=0, name="",
                        device=device, announce=False)
        fit.run()
        direction(fit.model)

    return {
        "inner epoch": Way(lambda: _ignore(epoch())),
        "then scores, contraction": Way(lambda: then_scores("contraction"), tolerance=0.0),
        "then scores, difference": Way(lambda: then_scores("difference"), tolerance=3e-2),
        "scores in training": Way(scored_epoch),
    }


def _outer_loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    return fused_rce_loss(model(**batch[0]), batch[1], reduction="sum")


def _ignore(_: object) -> None:
    """A way's result, where there is nothing to compare."""


WORKLOADS: dict[str, Workload] = {
    "encoder scores": Workload(
        "scores of a batch, BERT-type encoder, fused attention (double backward and forward mode: plain attention)",
        encoder_scores, reference="double backward", unit="forward pass",
        goals=(Goal("contraction", "forward pass", 3.2),),
    ),
    "encoder scored step": Workload(
        "loss + backward with and without scores, the same encoder",
        encoder_step, reference="training step", unit="training step",
        goals=(Goal("scored_step", "training step", 1.35), Goal("scored_step", "training step", 1.3, memory=True)),
    ),
    "encoder reweighted step": Workload(
        "a step of L2RW with its clean rows, the same encoder",
        encoder_reweighted, reference="double backward", unit="training step",
        goals=(Goal("scored_step(reweight)", "double backward", 1 / 2.5),),
    ),
    "bilstm scores": Workload(
        "scores of a batch, SunGen's BiLSTM",
        bilstm_scores, reference="double backward", unit="forward pass",
        goals=(Goal("contraction", "double backward", 1 / 4),),
    ),
    "sungen iteration": Workload(
        "a tenth of an iteration of SunGen on 10,000 rows, BiLSTM: an epoch, the direction, all scores",
        sungen_iteration, reference="then scores, contraction", unit="inner epoch",
        goals=(
            Goal("then scores, difference", "inner epoch", 1.35),
            Goal("scores in training", "inner epoch", 1.35),
        ),
    ),
}
