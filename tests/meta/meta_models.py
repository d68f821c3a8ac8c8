"""Small models with batches and per-sample losses, and scores by differentiating one loss at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synkern import fused_cross_entropy

SAMPLES, LENGTH, CLASSES, VOCABULARY = 6, 5, 4, 23


@dataclass(frozen=True)
class Workload:
    """A model, a batch, and the (N,) losses of the one on the other."""

    model: nn.Module
    batch: dict[str, Tensor]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]

    def losses(self) -> Tensor:
        return self.loss(self.model, self.batch)

    def to(self, dtype: torch.dtype) -> Workload:
        """A copy in another dtype."""
        batch = {k: x.to(dtype) if x.is_floating_point() else x for k, x in self.batch.items()}
        return replace(self, model=copy.deepcopy(self.model).to(dtype), batch=batch)


def direction_for(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Random numbers for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
    }


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference_scores(workload: Workload, direction: dict[str, Tensor]) -> Tensor:
    """<v, grad l_i> in float64, one plain backward a sample."""
    exact = workload.to(torch.float64)
    scores = []
    for loss in exact.losses():
        exact.model.zero_grad()
        loss.backward(retain_graph=True)
        gradients = gradients_of(exact.model)
        parts = [(direction[name].double() * gradients[name]).sum() for name in gradients.keys() & direction.keys()]
        scores.append(torch.stack(parts).sum())
    return torch.stack(scores)


def relative_error(scores: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest score."""
    assert expected.abs().max() > 1e-3, "the scores to compare vanish"
    return float((scores.double() - expected).abs().max() / expected.abs().max())


def _perturb(model: nn.Module) -> nn.Module:
    """Biases of zero and scales of one would hide a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def padded_tokens() -> dict[str, Tensor]:
    """Sequences of 2 to LENGTH tokens, padded with 0."""
    tokens = torch.randint(1, VOCABULARY, (SAMPLES, LENGTH))
    lengths = 2 + torch.arange(SAMPLES) % (LENGTH - 1)
    mask = (torch.arange(LENGTH) < lengths.unsqueeze(1)).long()
    return {"tokens": tokens * mask, "mask": mask, "target": torch.randint(0, CLASSES, (SAMPLES,))}


def encoder(**options: Any) -> Workload:
    """BERT with SDPA, its padded embedding row, and a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=LENGTH + 3, num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="sdpa", **options,
    )  # fmt: skip

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["tokens"], attention_mask=batch["mask"]).logits
        return fused_cross_entropy(logits, batch["target"], reduction="none")

    return Workload(_perturb(BertForSequenceClassification(config)), padded_tokens(), loss)


def decoder() -> Workload:
    """GPT-2: Conv1D layers, the output projection tied to the embedding, losses per token averaged over a sample."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=12, n_layer=2, n_head=3, n_positions=LENGTH + 3, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return Workload(_perturb(GPT2LMHeadModel(config)), padded_tokens(), token_loss)


def rms_decoder() -> Workload:
    """LLaMA: RMS norms of transformers' own class, grouped attention, no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH + 3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return Workload(_perturb(LlamaForCausalLM(config)), padded_tokens(), token_loss)


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Next-token losses, averaged over the tokens of each sample."""
    logits = model(input_ids=batch["tokens"], attention_mask=batch["mask"]).logits[:, :-1]
    kept = batch["mask"][:, 1:]
    target = batch["tokens"][:, 1:].masked_fill(kept == 0, -100)
    return fused_cross_entropy(logits.contiguous(), target, reduction="none").sum(1) / kept.sum(1)


def classifier_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return fused_cross_entropy(model(batch["x"]), batch["target"], reduction="none")


def on_features(model: nn.Module, *shape: int) -> Workload:
    """A classifier of floating inputs (N, *shape)."""
    batch = {"x": torch.randn(SAMPLES, *shape), "target": torch.randint(0, CLASSES, (SAMPLES,))}
    return Workload(_perturb(model), batch, classifier_loss)


def cnn() -> Workload:
    """2-d convolutions with strides, groups and paddings, group norm, batch norm in eval mode."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False, padding="valid"), nn.BatchNorm2d(8).eval(), nn.GELU(),
        nn.Conv2d(8, 6, (3, 1), padding="same", dilation=2, padding_mode="reflect"), nn.Tanh(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES),
    )  # fmt: skip
    model[4].running_mean += torch.randn(8)
    return on_features(model, 3, 12, 12)


def cnn_1d() -> Workload:
    """1-d convolutions, as over characters."""
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding="same"), nn.ReLU(), nn.GroupNorm(4, 8), nn.Conv1d(8, 4, 2, stride=2),
        nn.Flatten(), nn.Linear(20, CLASSES),
    )  # fmt: skip
    return on_features(model, 3, 10)


def mlp() -> Workload:
    """Linear layers and the norms over features, on two-dimensional activations."""
    model = nn.Sequential(
        nn.Linear(7, 16), nn.LayerNorm(16), nn.ReLU(inplace=True), nn.Linear(16, 12, bias=False),
        nn.RMSNorm(12, eps=1e-5), nn.Tanh(), nn.Linear(12, 12), nn.LayerNorm(12, bias=False), nn.GELU(),
        nn.Linear(12, 8), nn.RMSNorm(8), nn.Linear(8, CLASSES),
    )  # fmt: skip
    return on_features(model, 7)


class AttentionClassifier(nn.Module):
    """torch's own encoder layers, time first, then an attention over them with other sizes of key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12, padding_idx=0)
        self.position = nn.Embedding(LENGTH, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.key, self.query = nn.Linear(12, 5), nn.Linear(12, 8)
        self.pool = nn.MultiheadAttention(8, 2, kdim=5, vdim=12, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        padding, causal = mask == 0, nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=x.dtype)
        x = self.encoder(x.transpose(0, 1), causal, padding, is_causal=True).transpose(0, 1)
        query, key = self.query(x[:, :2]), self.key(x)
        pooled, weights = self.pool(query, key, x, key_padding_mask=padding)
        later, _ = self.cross(pooled.transpose(0, 1), query.transpose(0, 1), query.transpose(0, 1), need_weights=False)
        return self.head(pooled[:, 0] + later[1] * weights.pow(2).sum((1, 2)).unsqueeze(1))


def attention() -> Workload:
    """Every way through nn.MultiheadAttention."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return fused_cross_entropy(model(batch["tokens"], batch["mask"]), batch["target"], reduction="none")

    return Workload(_perturb(AttentionClassifier()), padded_tokens(), loss)


class Residual(nn.Module):
    """One block applied three times, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.unused = nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + F.gelu(self.inner(self.norm(x)))
        return self.head(x)


def shared() -> Workload:
    """Weights used several times in a forward pass."""
    return on_features(Residual(), 7)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    f.__name__: f for f in (encoder, decoder, rms_decoder, cnn, cnn_1d, mlp, attention, shared)
}
