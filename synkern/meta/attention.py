"""The rule of nn.MultiheadAttention, whose own forward hands raw weights to a fused function: the same computation from
captured projections and ``scaled_dot_product_attention``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .context import MethodUnavailable
from .linear import Gradients, LinearMap
from .rules import RULES, Layer, Rule, cast_for_autocast, layer_backward, linear


def _thirds(weights: Gradients) -> tuple[list[Any], list[Any]]:
    """(weight, bias) of query, key and value from the parameters, or their directions, in the order of the rule."""
    packed, bias, *separate = weights
    matrices = separate if packed is None else list(packed.chunk(3))
    return matrices, [None] * 3 if bias is None else list(bias.chunk(3))


def _packed(gradients: list[Gradients], layer: Layer) -> Gradients:
    """The gradients of the parameters from those of query, key and value: the inverse of ``_thirds``."""
    matrices, biases = zip(*gradients, strict=True)
    bias = torch.cat(biases) if layer.needs[1] else None
    if layer.tensors[0] is None:
        return None, bias, *matrices
    return torch.cat(matrices) if layer.needs[0] else None, bias, None, None, None


class _Projections(torch.autograd.Function):
    """Query, key and value of inputs that are not the same tensor."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, anchor: Tensor, q: Tensor, k: Tensor, v: Tensor, *tensors: Any) -> Any:
        weights, biases = _thirds(tensors)
        inputs, saved, outputs = (q, k, v), [], []
        for arguments in zip(inputs, weights, biases, strict=True):
            x, weight, bias = cast_for_autocast(*arguments)
            saved += [x, weight]
            outputs.append(F.linear(x, weight, bias))  # type: ignore[arg-type]
        ctx.layer = layer
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @layer_backward
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        layer, saved = ctx.layer, ctx.saved_tensors
        inputs, weights = saved[::2], saved[1::2]
        b = [x.reshape(-1, x.shape[-1]) for x in cotangents]
        if layer.tensors[0] is None:
            needs = [(need, layer.needs[1]) for need in layer.needs[2:]]
        else:
            needs = [layer.needs[:2]] * 3
        maps = [
            LinearMap(layer, x.reshape(-1, x.shape[-1]), at, direction, need)
            for x, at, direction, need in zip(
                inputs, b, zip(*_thirds(layer.directions), strict=True), needs, strict=True
            )
        ]

        def contribution(n: int) -> Tensor:
            return torch.stack([part.share(n) for part in maps if part.has_direction]).sum(0)

        def gradients(weights: Tensor | None) -> Gradients:
            return _packed([part.gradients(weights) for part in maps], layer)

        tensors = layer.finish(cotangents, contribution, gradients)
        wanted = ctx.needs_input_grad[2:5]
        grads = [
            rows.mm(weight).view(x.shape) if want else None
            for rows, weight, x, want in zip(b, weights, inputs, wanted, strict=True)
        ]
        return None, None, *grads, *tensors


class MultiheadAttentionRule(Rule):
    """nn.MultiheadAttention; its output projection is a captured linear layer."""

    names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")

    def uses(self, module: Any) -> tuple[nn.Module, ...]:
        return (module.out_proj,)

    def reason(self, module: Any) -> str | None:
        if module.bias_k is not None or module.bias_v is not None:
            return "add_bias_kv=True appends a learned key and value to every sample"
        return "add_zero_attn=True is not supported" if module.add_zero_attn else None

    def forward(  # type: ignore[override]
        self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        module: Any = layer.module
        if query.dim() != 3:
            raise MethodUnavailable(
                f"{layer.engine.caller}: {layer.name} got a query of shape {tuple(query.shape)}; expected a batch, "
                "three dimensions"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        q, k, v = self._project(layer, query, key, value)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged_mask(attn_mask, key_padding_mask, q)
        dropout = module.dropout if module.training else 0.0
        if need_weights:
            output, weights = _explicit_attention(q, k, v, mask, dropout)
            shown = weights.mean(1) if average_attn_weights else weights
        else:
            output, shown = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        output = module.out_proj(output.transpose(1, 2).flatten(2))
        return output if module.batch_first else output.transpose(0, 1), shown

    def _project(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Query, key and value, (N, heads, T, head size) each, samples first."""
        module: Any = layer.module
        same = query is key and key is value
        if not module.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if same and module._qkv_same_embed_dim:
            projected = linear(layer.part(slice(2), 2), query).chunk(3, -1)
        else:
            projected = _Projections.apply(layer, layer.anchor, query, key, value, *layer.tensors)
            for output in projected:
                layer.see(output)
        return [x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in projected]


def _merged_mask(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """The additive mask, broadcastable to (N, heads, T, S), of attn_mask and key_padding_mask; True leaves out."""
    if mask is not None:
        mask = mask.unflatten(0, q.shape[:2]) if mask.dim() == 3 and len(mask) > 1 else mask
        mask = _additive(mask, q)
    if padding is None:
        return mask
    padding = _additive(padding, q)[:, None, None, :]
    return padding if mask is None else mask + padding


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    weights = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    weights = torch.softmax(weights if mask is None else weights + mask, -1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v, weights


RULES[nn.MultiheadAttention] = MultiheadAttentionRule()
