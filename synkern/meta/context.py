"""What every way to a score needs: refusals, the losses of a batch, kernels with derivatives, replayed randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PerSampleLoss = Callable[[nn.Module, Any], Tensor]


class MethodUnavailable(ValueError):
    """This way to the scores does not exist for this model; the message names the module or the operator."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a DistributedDataParallel wrapper, whose parameter names have no ``module.`` in front."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise where a normalisation takes its statistics from the batch: a sample's loss then depends on its neighbours.

    Raises:
        MethodUnavailable: names the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise MethodUnavailable(
                f"sample_scores: {described(name, module)} takes its statistics from the batch, so that no loss "
                "belongs to one sample; expected running statistics: call .eval() on it, or use nn.GroupNorm"
            )


def described(name: str, module: nn.Module) -> str:
    """How an error names a module, from its path in the model."""
    return f"module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def describe_module(model: nn.Module, module: nn.Module) -> str:
    """How an error names a module of a model: its path and its class."""
    names = {id(child): name for name, child in model.named_modules()}
    return described(names.get(id(module), "?"), module)


def per_sample_losses(per_sample_loss: PerSampleLoss, model: nn.Module, batch: Any) -> Tensor:
    """The (N,) losses of a batch.

    Raises:
        TypeError: not a floating tensor.
        ValueError: not one-dimensional.
    """
    losses = per_sample_loss(model, batch)
    if not isinstance(losses, Tensor) or not losses.dtype.is_floating_point:
        got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(
            f"sample_scores: per_sample_loss must return a floating torch.Tensor (N,), got {got}; "
            "return the losses with reduction='none'"
        )
    if losses.dim() != 1:
        remedy = "use reduction='none'" if losses.dim() == 0 else "sum or average the losses of each sample"
        raise ValueError(
            f"sample_scores: per_sample_loss must return one loss a sample, (N,), got {tuple(losses.shape)}; {remedy}"
        )
    return losses


@contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Kernels with derivatives of every kind: attention in plain matrix products, recurrent layers cell by cell."""
    mha, fast = torch.backends.mha, torch.backends.mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _plain_recurrence(model):
            yield
    finally:
        mha.set_fastpath_enabled(fast)


@contextmanager
def _plain_recurrence(model: nn.Module) -> Iterator[None]:
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        yield
    finally:
        for library, enabled in zip(libraries, before, strict=True):
            library.enabled = enabled


class RandomState:
    """The state of the random generators that a model may draw from, to draw the same dropout masks again."""

    def __init__(self, model: nn.Module) -> None:
        kinds = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        self.cpu = torch.get_rng_state()
        self.devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in kinds
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Draw again from here."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Keeps a DistributedDataParallel wrapper from waiting for a backward pass that will not come."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
