"""The contract between a kind of layer and the contraction engine, and the rules of linear, lookup and norm layers.

A layer's share of sample i's score is <v, d l_i / d theta>, with v the direction of the layer's parameters. With the
layer's input a and the gradient b at its output no gradient of a parameter is needed: for a linear layer the share is
sum_t <b_it, V a_it>, one matrix product. A rule replaces a module's forward by an autograd ``Function`` with the same
output, whose backward has a and b and hands what it finds to :meth:`Layer.finish`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _library  # noqa: F401  (the operators must exist before they are looked up)
from .context import MethodUnavailable
from .linear import Gradients, LinearMap, linear_share, live_rows, wide

Layout = tuple[int, str]  # dimensions of an output, and how samples lie in it: "rows", "time first" or "grouped"
_ops = torch.ops.synkern
_aten = torch.ops.aten


class Layer:
    """A captured module while a context is open; what a rule is given.

    Attributes:
        name: how errors name the module.
        module: the module.
        parameters: its parameters, in the order of the rule's ``names``; some may be None.
        tensors: what the rule passes to ``Function.apply`` in their place: the parameters themselves, or constants
            where their gradients are not made by this backward.
        directions: the direction v of each, None where it is zero. Vectors are float32 (float64 for float64
            parameters), matrices that or the parameter's dtype.
        needs: whether each wants a gradient.
        verified: layouts of this layer's output in which samples are known not to mix.
    """

    __slots__ = (
        "directions", "engine", "has_direction", "module", "name", "needs", "parameters", "tensors", "verified",
    )  # fmt: skip

    def __init__(
        self, engine: Any, name: str, module: nn.Module, parameters: Gradients, directions: Gradients,
        verified: set[Layout],
    ) -> None:  # fmt: skip
        self.engine, self.name, self.module = engine, name, module
        self.parameters, self.directions, self.verified = parameters, directions, verified
        self.tensors = tuple(engine.inputs(parameters))
        self.needs = tuple(p is not None and p.requires_grad for p in parameters)
        self.has_direction = any(v is not None for v in directions)

    @property
    def anchor(self) -> Tensor:
        """A scalar that requires grad, for ``Function.apply``: backward reaches the layer through it even where
        neither inputs nor parameters require grad. Its gradient is None."""
        return self.engine.anchor

    @property
    def joint(self) -> bool:
        """Whether ``gradients`` will be called at once with None: they may come from the same call as the input's."""
        run = self.engine.run
        return run is None or run.joint

    def part(self, chosen: slice, length: int) -> Layer:
        """A layer of some of the parameters, filled up with None to ``length``."""
        rest = (None,) * (length - len(self.parameters[chosen]))
        parameters, directions = (*self.parameters[chosen], *rest), (*self.directions[chosen], *rest)
        return Layer(self.engine, self.name, self.module, parameters, directions, self.verified)

    def see(self, output: Tensor) -> Tensor:
        """Note an output in forward, so that its layout is verified; returns it."""
        self.engine.seen.add((self, output.shape[:2], output.dim()))
        return output

    def time_first(self, output: Tensor) -> bool:
        """In backward: whether samples lie in dimension 1 of an output, or of its gradient, and not in dimension 0."""
        run = self.engine.run
        return run is not None and self.engine.layout(self, output.shape[:2], output.dim())[1] == "time first"

    def samples_first(self, output: Tensor, *others: Tensor | None) -> list[Any]:
        """In backward: the output's gradient and tensors that lie as it does, with the samples in dimension 0."""
        tensors = [output, *others]
        return [x if x is None else x.transpose(0, 1) for x in tensors] if self.time_first(output) else tensors

    def finish(
        self,
        cotangent: Tensor | tuple[Tensor, ...] | None,
        contribution: Callable[[int], Tensor],
        gradients: Callable[[Tensor | None], Gradients],
    ) -> Gradients:
        """Hand over what a backward found; a Function's backward calls it once and returns what it gives.

        Args:
            cotangent: gradient at the output or outputs as it came, where the engine checks that samples do not mix;
                None where they lie otherwise (packed sequences): the contribution is checked instead.
            contribution: called with the number of samples N, returns the layer's share of the scores, (N,), float32
                or float64. Called only where some direction is not None.
            gradients: called with the weight of each sample (N,), or with None for weights of one; returns the
                gradient of each of ``tensors``, None where ``needs`` is False. It may be called after backward has
                returned, so it must hold what it needs, and must leave it as it is.

        Returns:
            The gradients that backward returns for ``tensors``.
        """
        return self.engine.finish(self, cotangent, contribution, gradients)


class Rule:
    """How one kind of module is captured. Register an instance in ``RULES`` under the module's class."""

    names: tuple[str, ...] = ("weight", "bias")
    one_input = False  # whether forward takes one argument, by whatever name a caller gives it

    def parameter_names(self, module: nn.Module) -> tuple[str, ...]:
        """Attributes that hold the module's own parameters, in the order of ``Layer.tensors``; some may be None."""
        return self.names

    def uses(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """Children whose parameters the original forward reads without calling them, and :meth:`forward` calls."""
        return ()

    def reason(self, module: nn.Module) -> str | None:
        """Why this module cannot be captured, or None."""
        return None

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with the output of the original; grad mode is on."""
        raise NotImplementedError


def layer_backward(function: Callable[..., Any]) -> Any:
    """Decorates the backward of a layer's Function: no double backward, and never under autocast, which would round
    what forward kept in float32."""

    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.layer.engine.caller}: {ctx.layer.name} is captured, and has no double backward; expected "
                "backward without create_graph=True"
            )
        device = ctx.layer.engine.leaf.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return function(ctx, *cotangents)
        return function(ctx, *cotangents)

    return staticmethod(backward)


def cast_for_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast does to the arguments of a matrix product. Its cache of cast weights is not used: filled in a
    Function's forward, it would lose the gradient of a weight that is used again."""
    kind = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def weighted(x: Tensor, row_weight: Tensor | None) -> Tensor:
    """x, its samples (dimension 0, equal groups) times their weights; in x's dtype, rounded once."""
    if row_weight is None:
        return x
    return (x.reshape(len(row_weight), -1) * row_weight.unsqueeze(1)).to(x.dtype).view(x.shape)


def sample_dots(x: Tensor, y: Tensor, groups: int) -> Tensor:
    """<x, y> over each of ``groups`` equal leading parts, (groups,), in float32 or float64, without the product."""
    dtype = wide(x.dtype)
    x, y = x.reshape(groups, 1, -1).to(dtype), y.reshape(groups, -1, 1).to(dtype)
    return torch.bmm(x, y).view(groups)


class _Linear(torch.autograd.Function):
    """x W^T + bias, or x W + bias where ``transposed``."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, transposed: bool, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        x, weight, bias = cast_for_autocast(x, weight, bias)  # type: ignore[assignment]
        ctx.layer, ctx.transposed = layer, transposed
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @layer_backward
    def backward(ctx: Any, b: Tensor) -> Any:
        layer, transposed = ctx.layer, ctx.transposed
        x, weight = ctx.saved_tensors
        rows, a = (y.reshape(-1, y.shape[-1]) for y in layer.samples_first(b, x))
        live = live_rows(rows, rows.shape[0] * weight.numel())
        grad_x = None
        if ctx.needs_input_grad[3]:
            grad_x = _of_input(rows, weight.t() if transposed else weight, live)
            if layer.time_first(b):
                grad_x = grad_x.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
            else:
                grad_x = grad_x.view(x.shape)
        done = LinearMap(layer, a, rows, layer.directions, layer.needs, transposed=transposed, live=live)
        return None, None, None, grad_x, *layer.finish(b, done.share, done.gradients)


def _of_input(b: Tensor, weight: Tensor, live: Tensor | None) -> Tensor:
    if live is None:
        return b.mm(weight)
    return b.new_zeros(b.shape[0], weight.shape[1]).index_copy_(0, live, b.index_select(0, live).mm(weight))


class LinearRule(Rule):
    """nn.Linear, and transformers' Conv1D, whose weight is stored (inputs, outputs)."""

    one_input = True

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def forward(self, layer: Layer, x: Tensor) -> Tensor:  # type: ignore[override]
        return linear(layer, x, self.transposed)


def linear(layer: Layer, x: Tensor, transposed: bool = False) -> Tensor:
    """The linear map of a layer whose ``tensors`` are weight and bias."""
    return layer.see(_Linear.apply(layer, transposed, layer.anchor, x, *layer.tensors))  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Layer, options: tuple[Any, ...], anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        x, weight, bias = cast_for_autocast(x, weight, bias)  # type: ignore[assignment]
        ctx.layer, ctx.options = layer, options
        ctx.save_for_backward(x, weight)
        return torch.convolution(x, weight, bias, *options)

    @layer_backward
    def backward(ctx: Any, b: Tensor) -> Any:
        layer, options, needs_x = ctx.layer, ctx.options, ctx.needs_input_grad[3]
        x, weight = ctx.saved_tensors
        v, v_bias = layer.directions

        def gradients(weights: Tensor | None, input_too: bool = False) -> Gradients:
            # the engine of a convolution returns all three at once
            mask = [input_too and needs_x, *(layer.needs[:2])]
            sizes = None if layer.tensors[1] is None else [weight.shape[0]]
            return _aten.convolution_backward(weighted(b, weights), x, weight, sizes, *options, mask)  # type: ignore[no-any-return]

        def contribution(n: int) -> Tensor:
            if v is None:
                return linear_share(x, b.movedim(1, -1).reshape(-1, b.shape[1]), None, v_bias, n)
            bias = None if v_bias is None else v_bias.to(x.dtype)
            return sample_dots(torch.convolution(x, v.to(x.dtype), bias, *options), b, n)

        if layer.joint:
            grad_x, *plain = gradients(None, input_too=True)
            tensors = layer.finish(b, contribution, lambda _: tuple(plain))
        else:
            tensors = layer.finish(b, contribution, lambda weights: gradients(weights)[1:])
            grad_x = None
            if needs_x:
                grad_x = _aten.convolution_backward(b, x, weight, None, *options, [True, False, False])[0]
        return None, None, None, grad_x, *tensors


class ConvolutionRule(Rule):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d."""

    one_input = True

    def forward(self, layer: Layer, x: Tensor) -> Tensor:  # type: ignore[override]
        module: Any = layer.module
        dimensions = len(module.kernel_size)
        if x.dim() != dimensions + 2:
            raise MethodUnavailable(
                f"{layer.engine.caller}: {layer.name} got an input of shape {tuple(x.shape)}; expected one with the "
                f"samples in dimension 0, {dimensions + 2} dimensions in all"
            )
        padding = module.padding
        if module.padding_mode != "zeros" or padding == "same":
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode), (0,) * dimensions
        elif padding == "valid":
            padding = (0,) * dimensions
        options = (module.stride, padding, module.dilation, False, (0,) * dimensions, module.groups)
        return layer.see(_Convolution.apply(layer, options, layer.anchor, x, *layer.tensors))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, anchor: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(index)
        return F.embedding(index, weight)

    @layer_backward
    def backward(ctx: Any, b: Tensor) -> Any:
        layer = ctx.layer
        module: Any = layer.module
        grad, (index,) = b, ctx.saved_tensors
        b, index = layer.samples_first(b, index)
        padding = -1 if module.padding_idx is None else module.padding_idx
        entries = layer.tensors[0].shape[0]

        def contribution(n: int) -> Tensor:
            v, rows, places = layer.directions[0], b.reshape(-1, b.shape[-1]), index.reshape(-1).long()
            if v.dtype != rows.dtype:
                v, rows = v.to(wide(v.dtype)), rows.to(wide(v.dtype))
            if padding >= 0:  # its row gets no gradient from here, though a tied output layer may give it one
                rows = rows.masked_fill((places == padding).unsqueeze(1), 0)
            return _ops.embedding_contraction(places, rows, v, None, n)  # type: ignore[no-any-return]

        def gradients(weights: Tensor | None) -> Gradients:
            if not layer.needs[0]:
                return (None,)
            return (_aten.embedding_backward(weighted(b, weights), index, entries, padding, False, module.sparse),)

        return None, None, None, *layer.finish(grad, contribution, gradients)


class EmbeddingRule(Rule):
    """nn.Embedding. One row of indices for all samples, such as positions (1, T) or (T,), is repeated for each sample:
    its gradient would otherwise arrive summed over them."""

    one_input = True
    names = ("weight",)

    def reason(self, module: Any) -> str | None:
        if module.max_norm is not None:
            return "max_norm changes the weight in the forward pass"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq divides by counts over the batch, so that no gradient belongs to one sample"
        return None

    def forward(self, layer: Layer, index: Tensor) -> Tensor:  # type: ignore[override]
        index = layer.engine.for_each_sample(layer, index)
        return layer.see(_Embedding.apply(layer, layer.anchor, index, *layer.tensors))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LinearRule(),
    nn.Conv1d: ConvolutionRule(),
    nn.Conv2d: ConvolutionRule(),
    nn.Conv3d: ConvolutionRule(),
    nn.Embedding: EmbeddingRule(),
}
"""The rule of each class; a subclass takes it over as long as it has the same forward. The other modules of this
package add theirs, and so may a user."""

FOREIGN: list[Callable[[nn.Module], Rule | None]] = []
"""Rules of classes that other libraries define, which are not imported for their sake."""


def find_rule(module: nn.Module) -> Rule | None:
    """The rule whose class has exactly this module's forward."""
    for base in type(module).__mro__:
        rule = RULES.get(base)
        if rule is not None:
            return rule if type(module).forward is base.forward else None  # type: ignore[attr-defined]
    return next((rule for rule in (find(module) for find in FOREIGN) if rule is not None), None)


_TRANSPOSED = LinearRule(transposed=True)


def _transformers_conv1d(module: nn.Module) -> Rule | None:
    kind = type(module)
    is_conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return _TRANSPOSED if is_conv1d else None


FOREIGN.append(_transformers_conv1d)
