"""Rules of the normalisation layers: only scale and shift have a direction, so that the share is
sum b (v_weight x_hat + v_bias), with x_hat the normalised input."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .linear import Gradients, wide
from .rules import FOREIGN, RULES, Layer, Rule, layer_backward, sample_dots, weighted

_ops = torch.ops.synkern
_aten = torch.ops.aten


def _autocast_norm(x: Tensor) -> Tensor:
    """Autocast normalises in float32 on CUDA; on the CPU it leaves norms alone."""
    kind = x.device.type
    return x.float() if kind != "cpu" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind) else x


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = layer.module
        output, mean, rstd = torch.native_layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        ctx.layer = layer
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return output

    @layer_backward
    def backward(ctx: Any, b: Tensor) -> Any:
        layer, needs_x = ctx.layer, ctx.needs_input_grad[2]
        x, mean, rstd, weight, bias = ctx.saved_tensors
        shape = layer.module.normalized_shape

        def native(b: Tensor, mask: list[bool]) -> Gradients:
            return _aten.native_layer_norm_backward(b, x, shape, mean, rstd, weight, bias, mask)  # type: ignore[no-any-return]

        def contribution(n: int) -> Tensor:
            grad, its_x, its_mean, its_rstd = layer.samples_first(b, x, mean, rstd)
            return _share(grad, its_x, its_mean, its_rstd, layer.directions, n)

        if layer.joint:
            grad_x, *plain = native(b, [needs_x, *layer.needs])
            return None, None, grad_x, *layer.finish(b, contribution, lambda _: tuple(plain))
        swap = layer.time_first(b)  # asked for now: gradients may be made when this backward is over

        def gradients(weights: Tensor | None) -> Gradients:
            scaled = weighted(b.transpose(0, 1), weights).transpose(0, 1) if swap else weighted(b, weights)
            return native(scaled, [False, *layer.needs])[1:]

        tensors = layer.finish(b, contribution, gradients)
        return None, None, native(b, [True, False, False])[0] if needs_x else None, *tensors


def _share(b: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, directions: Gradients, n: int) -> Tensor:
    """sum over rows of b (v_weight (x - mean) rstd + v_bias), (n,); a row is what one rstd belongs to."""
    v_weight, v_bias = (None if v is None else v.reshape(-1) for v in directions)
    rows = rstd.numel()
    x, b = x.reshape(rows, -1), b.reshape(rows, -1)
    if x.dtype != b.dtype:
        x, b = x.to(wide(x.dtype)), b.to(wide(b.dtype))
    dtype = wide(b.dtype)
    mean = None if mean is None else mean.reshape(-1).to(dtype)
    return _ops.norm_contraction(x, b, mean, rstd.reshape(-1).to(dtype), v_weight, v_bias, None, n)  # type: ignore[no-any-return]


class LayerNormRule(Rule):
    """nn.LayerNorm."""

    one_input = True

    def forward(self, layer: Layer, x: Tensor) -> Tensor:  # type: ignore[override]
        return layer.see(_LayerNorm.apply(layer, layer.anchor, _autocast_norm(x), *layer.tensors))


class _RMSNorm(torch.autograd.Function):
    """x_hat = x / sqrt(mean(x^2) + eps) over the dimensions of weight, in float32 or float64."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, eps: float, round_first: bool, anchor: Tensor, x: Tensor, w: Tensor) -> Tensor:
        high = x.float() if round_first else x.to(wide(x.dtype))
        ctx.over = tuple(range(-w.dim(), 0))
        rstd = torch.rsqrt(high.pow(2).mean(ctx.over, keepdim=True) + eps)
        ctx.layer = layer
        ctx.save_for_backward(x, rstd, w)
        normalised = high * rstd
        return w * normalised.to(x.dtype) if round_first else (normalised * w).to(x.dtype)

    @layer_backward
    def backward(ctx: Any, b: Tensor) -> Any:
        layer = ctx.layer
        x, rstd, weight = ctx.saved_tensors
        normalised = x * rstd
        rows, its_normalised, its_rstd, its_x = layer.samples_first(b, normalised, rstd, x)

        def gradients(weights: Tensor | None) -> Gradients:
            if not layer.needs[0]:
                return (None,)
            return ((weighted(rows, weights) * its_normalised).reshape(-1, *weight.shape).sum(0),)

        def contribution(n: int) -> Tensor:
            return _share(rows, its_x, None, its_rstd, (*layer.directions, None), n)

        tensors = layer.finish(b, contribution, gradients)
        grad_x = None
        if ctx.needs_input_grad[4]:
            scaled = b * weight
            grad_x = rstd * (scaled - normalised * (scaled * normalised).mean(ctx.over, keepdim=True))
        return None, None, None, None, grad_x, *tensors


class RMSNormRule(Rule):
    """nn.RMSNorm, and the class of that kind that decoder models of transformers bring along."""

    one_input = True
    names = ("weight",)

    def __init__(self, eps: str = "eps", round_first: bool = False) -> None:
        self.eps, self.round_first = eps, round_first

    def forward(self, layer: Layer, x: Tensor) -> Tensor:  # type: ignore[override]
        if not self.round_first:
            x = _autocast_norm(x)
        eps = getattr(layer.module, self.eps)
        eps = torch.finfo(wide(x.dtype)).eps if eps is None else eps
        return layer.see(_RMSNorm.apply(layer, eps, self.round_first, layer.anchor, x, *layer.tensors))


def _channel_gradients(layer: Layer, scale: Tensor, shift: Tensor) -> Callable[[Tensor | None], Gradients]:
    """From each sample's gradient of weight and bias, (N, C) each."""

    def gradients(weights: Tensor | None) -> Gradients:
        if weights is None:
            sums: list[Tensor] = [scale.sum(0), shift.sum(0)]
        else:
            sums = [weights.to(x.dtype) @ x for x in (scale, shift)]
        return tuple(x if need else None for x, need in zip(sums, layer.needs, strict=True))

    return gradients


def _channel_finish(layer: Layer, b: Tensor, normalised: Tensor) -> Gradients:
    """Scale and shift by channel, samples in dimension 0 and channels in dimension 1."""
    samples, channels = b.shape[:2]
    scale = sample_dots(b, normalised, samples * channels).view(samples, channels)
    shift = b.reshape(samples, channels, -1).sum(-1, dtype=scale.dtype)
    v_weight, v_bias = layer.directions

    def contribution(n: int) -> Tensor:
        terms = [x @ v for x, v in ((scale, v_weight), (shift, v_bias)) if v is not None]
        return torch.stack(terms).sum(0).view(n, -1).sum(1)

    def gradients(weights: Tensor | None) -> Gradients:
        if weights is not None and len(weights) != samples:
            weights = weights.repeat_interleave(samples // len(weights))
        return _channel_gradients(layer, scale, shift)(weights)

    return layer.finish(b, contribution, gradients)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = layer.module
        x = x.contiguous()
        n, channels = x.shape[:2]
        ctx.sizes = (n, channels, x.numel() // max(n * channels, 1), module.num_groups)
        output, mean, rstd = _aten.native_group_norm(x, weight, bias, *ctx.sizes, module.eps)
        ctx.layer = layer
        ctx.save_for_backward(x, mean, rstd, weight)
        return output

    @layer_backward
    def backward(ctx: Any, b: Tensor) -> Any:
        x, mean, rstd, weight = ctx.saved_tensors
        b = b.contiguous()
        shape = (*mean.shape, 1)
        normalised = (x.view(*mean.shape, -1) - mean.view(shape)) * rstd.view(shape)
        tensors = _channel_finish(ctx.layer, b, normalised)
        grad_x = None
        if ctx.needs_input_grad[2]:
            mask = [True, False, False]
            grad_x = _aten.native_group_norm_backward(b, x, mean, rstd, weight, *ctx.sizes, mask)[0]
        return None, None, grad_x, *tensors


class GroupNormRule(Rule):
    """nn.GroupNorm."""

    one_input = True

    def forward(self, layer: Layer, x: Tensor) -> Tensor:  # type: ignore[override]
        return layer.see(_GroupNorm.apply(layer, layer.anchor, _autocast_norm(x), *layer.tensors))


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = layer.module
        ctx.layer = layer
        ctx.save_for_backward(x, weight, module.running_mean, module.running_var)
        return torch.batch_norm(
            x, weight, bias, module.running_mean, module.running_var, False, 0.0, module.eps,
            torch.backends.cudnn.enabled,
        )  # fmt: skip

    @layer_backward
    def backward(ctx: Any, b: Tensor) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        shape = (1, -1, *(1,) * (x.dim() - 2))
        rstd = torch.rsqrt(variance + ctx.layer.module.eps)
        tensors = _channel_finish(ctx.layer, b, (x - mean.view(shape)) * rstd.view(shape))
        grad_x = b * (weight * rstd).view(shape) if ctx.needs_input_grad[2] else None
        return None, None, grad_x, *tensors


class BatchNormRule(Rule):
    """Batch normalisation in eval mode; with the batch's own statistics the engine refuses any model."""

    one_input = True

    def forward(self, layer: Layer, x: Tensor) -> Tensor:  # type: ignore[override]
        return layer.see(_FrozenBatchNorm.apply(layer, layer.anchor, x, *layer.tensors))


RULES[nn.LayerNorm] = LayerNormRule()
RULES[nn.RMSNorm] = RMSNormRule()
RULES[nn.GroupNorm] = GroupNormRule()
RULES[nn.BatchNorm1d] = RULES[nn.BatchNorm2d] = RULES[nn.BatchNorm3d] = BatchNormRule()


class _RMSNormOfTransformers:
    """The forward that LlamaRMSNorm and its copies share, to be recognised by its code."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


_LIKE_TRANSFORMERS = RMSNormRule(eps="variance_epsilon", round_first=True)


def _same_code(a: types.CodeType, b: types.CodeType) -> bool:
    return (a.co_code, a.co_names, a.co_varnames) == (b.co_code, b.co_names, b.co_varnames)


def _rms_norm_of_transformers(module: nn.Module) -> Rule | None:
    code = getattr(type(module).forward, "__code__", None)
    known = _RMSNormOfTransformers.forward.__code__
    return _LIKE_TRANSFORMERS if code is not None and _same_code(code, known) else None


FOREIGN.append(_rms_norm_of_transformers)
